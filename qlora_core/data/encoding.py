"""From conversations to tokens and labels, many rows at a call.

A rendering is always tokenised whole: pieces tokenised on their own and joined give other tokens
than the model saw in pretraining. So labels come from character offsets: a token is learned if it
shares a character with what the assistant says. Chats are tokenised without adding special tokens,
as the template has written them; plain text gets what the tokenizer adds by itself, and the
end-of-sequence token.

The tokenizer's Rust core works without Python's lock, so the texts of a call are shared out among
threads, one for each core, and come back in order: any number of threads gives the same bytes, and
rows can be rendered and labelled meanwhile. Where the core threads itself (that is its default;
`TOKENIZERS_PARALLELISM=false` ends it) it gets all texts at once: threads in threads cost a third
more.
Dims: L tokens of a row.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import TokenizersBackend

from qlora_core.data.chat import ChatRenderer, RenderedChat, Span
from qlora_core.data.formats import BREAK, Content
from qlora_core.data.prepared import IGNORED
from qlora_core.data.special_tokens import SpecialTokens
from qlora_core.data.tokenised import Tokenised
from qlora_core.errors import ModelError

_PLAIN = TokenizersBackend._encode_plus  # a few classes have their own, for layouts or Chinese
_OFF = ("", "0", "f", "false", "n", "no", "off")  # as the core itself reads it
_FEWEST = 64  # texts for which a thread is worth starting


class UnbreakableError(ValueError):
    """A special token in the text of a row cannot be read as ordinary characters."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """One tokenised row."""

    ids_L: NDArray[np.int32]
    labels_L: NDArray[np.int32]
    has_stop: bool
    """A stop token is among the supervised ones."""
    num_escaped: int
    """Special tokens in the row's text that were read as ordinary characters."""


class Encoder:
    """One tokenizer with its chat template.

    Args:
        tokenizer: A fast tokenizer of transformers.
        stops: Texts of the tokens at which generation ends; the first is written where a template
            writes none.
        escape: Read special tokens in the text of rows as ordinary characters.
        num_threads: That tokenise; none: one for each core this process may use. The result does
            not depend on it.

    Raises:
        ModelError: The tokenizer is not a fast one, or there is no stop token.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str],
        *,
        escape: bool,
        num_threads: int | None = None,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{type(tokenizer).__name__} does not say which characters a token stands for.",
                fix="Use a model with a fast tokenizer (one with a tokenizer.json).",
            )
        if not stops:
            raise ModelError(
                "The tokenizer has no end-of-sequence token, so no answer could ever end.",
                fix="Use a tokenizer with an eos_token.",
            )
        self.specials = SpecialTokens(tokenizer)
        self._tokenizer, self._stops, self._escape = tokenizer, tuple(stops), escape
        self._eos_id = int(tokenizer.convert_tokens_to_ids(self._stops[0]))
        self._num_threads = num_threads or _num_cores()
        self._threads = ThreadPoolExecutor(self._num_threads)  # they start when first needed
        self._is_settled: bool | None = None
        self._is_plain = getattr(type(tokenizer), "_encode_plus", None) is _PLAIN
        self._renderer: ChatRenderer | None = None
        self._special_ids = {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        } - {tokenizer.unk_token_id}
        self.num_double_starts = 0
        """Rows that began with the beginning-of-sequence token twice; one was kept."""

    @property
    def renderer(self) -> ChatRenderer:
        """The chat template, looked for when the first chat comes: plain text needs none."""
        if self._renderer is None:
            self._renderer = ChatRenderer(self._tokenizer, self._stops, self.specials)
        return self._renderer

    def render(self, content: Content) -> RenderedChat:
        """Return the text to tokenise and what of it is learned: all, for plain text.

        Raises:
            BadRow: The chat template cannot render it.
        """
        if self._escape and self.specials.count_in(content):
            content = self.specials.broken(content)
        if isinstance(content, str):
            return RenderedChat(content, (Span(0, len(content), True),))
        return self.renderer.render(content)

    def chat_notes(self) -> tuple[str, ...]:
        """Return what a person should know of the chat template, if one was used."""
        return self._renderer.notes() if self._renderer else ()

    def encode(self, rows: Sequence[RenderedChat], *, as_chat: bool) -> list[Encoded | None]:
        """Tokenise rendered rows; None for one whose special tokens cannot be escaped."""
        return self.begin(rows, as_chat=as_chat).result()

    def begin(self, rows: Sequence[RenderedChat], *, as_chat: bool) -> "Encoding":
        """Start to tokenise rendered rows beside what the caller does meanwhile."""
        parts = self._start([row.text for row in rows], add_special=not as_chat)
        return Encoding(self, rows, parts, as_chat)

    def encode_prompts(self, rows: Sequence[RenderedChat]) -> list[tuple[int, ...]]:
        """Tokenise what comes before each row's last answer."""
        prompts = self.begin_prompts(rows)
        return [prompts.ids(number) for number in range(len(rows))]

    def begin_prompts(self, rows: Sequence[RenderedChat]) -> "PromptEncoding":
        """Start to tokenise what comes before each row's last answer, if it has one."""
        texts = [row.text[: row.spans[-1].start] if row.spans else "" for row in rows]
        return PromptEncoding(self, texts, self._start(texts, add_special=False))

    def sample(self, row: Encoded) -> str:
        """Return a row as text, what is learned between ⟦ and ⟧."""
        is_learned_L = row.labels_L != IGNORED
        edges = np.flatnonzero(np.diff(is_learned_L)) + 1
        runs = np.split(np.arange(len(row.ids_L)), edges)
        texts = [(self._tokenizer.decode(row.ids_L[run]), is_learned_L[run[0]]) for run in runs]
        return "".join(f"⟦{text}⟧" if is_learned else text for text, is_learned in texts)

    def _start(self, texts: list[str], *, add_special: bool) -> list[Future[list[Tokenised]]]:
        if not texts:
            return []
        if self._is_settled != add_special:
            self._called(texts[:1], add_special)  # settles options that threads then only read
            self._is_settled = add_special
        size = max(_FEWEST, -(-len(texts) // (1 if _threads_itself() else self._num_threads)))
        parts = [texts[at : at + size] for at in range(0, len(texts), size)]
        return [self._threads.submit(self._encoded, part, add_special) for part in parts]

    def _encoded(self, texts: list[str], add_special: bool) -> list[Tokenised]:
        """Tokenise by the core itself, where the tokenizer's class adds nothing to it."""
        if not self._is_plain:
            return self._called(texts, add_special)
        core = self._tokenizer.backend_tokenizer
        made = core.encode_batch(texts, add_special_tokens=add_special)
        return [Tokenised(one.ids, None, one) for one in made]

    def _called(self, texts: list[str], add_special: bool) -> list[Tokenised]:
        made = self._tokenizer(
            texts,
            add_special_tokens=add_special,
            return_offsets_mapping=True,
            return_attention_mask=False,
            truncation=False,
            padding=False,
            verbose=False,
        )
        return list(map(Tokenised, made["input_ids"], made["offset_mapping"]))

    def _labelled(self, row: RenderedChat, found: Tokenised, as_chat: bool) -> Encoded | None:
        num_escaped = row.text.count(BREAK)
        try:
            found = self._without_breaks(row.text, found)
        except UnbreakableError:
            return None
        kept = self._one_start(found.ids)
        num_cut = len(found.ids) - len(kept)
        self.num_double_starts += num_cut > 0
        if not as_chat:
            kept = kept if kept and kept[-1] == self._eos_id else [*kept, self._eos_id]
            ids_L = np.array(kept, np.int32)
            return Encoded(ids_L, ids_L, True, num_escaped)
        ids_L = np.array(kept, np.int32)
        labels_L = np.full(len(kept), IGNORED, np.int32)
        for span in row.spans:
            first, past = (max(0, token - num_cut) for token in found.within(span))
            labels_L[first:past] = ids_L[first:past]
        return Encoded(ids_L, labels_L, any(span.has_stop for span in row.spans), num_escaped)

    def _without_breaks(self, text: str, found: Tokenised) -> Tokenised:
        """Take out the tokens of the breaks that keep special tokens apart.

        Raises:
            UnbreakableError: A token holds a break and more, or a special token survived.
        """
        if BREAK not in text:
            return found
        kept = [
            (token, place)
            for token, place in zip(found.ids, found.offsets, strict=True)
            if text[slice(*place)] != BREAK
        ]
        is_mixed = any(BREAK in text[slice(*place)] for _, place in kept)
        # The tokenizer's own additions stand for no characters; the template's do.
        num_special = sum(token in self._special_ids and end > at for token, (at, end) in kept)
        if is_mixed or num_special > self.specials.count(text):
            raise UnbreakableError
        return Tokenised([token for token, _ in kept], [place for _, place in kept])

    def _one_start(self, ids: list[int]) -> list[int]:
        """Keep one beginning-of-sequence token where template and tokenizer wrote two."""
        start = self._tokenizer.bos_token_id
        while start is not None and ids[:2] == [start, start]:
            ids = ids[1:]
        return ids


class Encoding:
    """Rows that are being tokenised."""

    def __init__(
        self,
        encoder: Encoder,
        rows: Sequence[RenderedChat],
        parts: list[Future[list[Tokenised]]],
        as_chat: bool,
    ) -> None:
        self._encoder, self._rows, self._parts, self._as_chat = encoder, rows, parts, as_chat

    def result(self) -> list[Encoded | None]:
        """Wait for the tokens; None for a row whose special tokens cannot be escaped."""
        found = (row for part in self._parts for row in part.result())
        return [
            self._encoder._labelled(row, tokens, self._as_chat)
            for row, tokens in zip(self._rows, found, strict=True)
        ]


class PromptEncoding:
    """Prompts that are being tokenised."""

    def __init__(
        self, encoder: Encoder, texts: list[str], parts: list[Future[list[Tokenised]]]
    ) -> None:
        self._encoder, self._texts, self._parts = encoder, texts, parts

    @cached_property
    def _found(self) -> list[Tokenised]:
        return [row for part in self._parts for row in part.result()]

    def ids(self, number: int) -> tuple[int, ...]:
        """Wait for all tokens; return those of one prompt.

        Raises:
            UnbreakableError: A special token in its text cannot be escaped.
        """
        kept = self._encoder._without_breaks(self._texts[number], self._found[number])
        return tuple(self._encoder._one_start(kept.ids))


def _threads_itself() -> bool:
    """Say whether the tokenizer's core shares a call out among threads of its own."""
    return os.environ.get("TOKENIZERS_PARALLELISM", "true").lower() not in _OFF


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
