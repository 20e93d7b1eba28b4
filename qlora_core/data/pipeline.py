"""The way of a row: read, understood, rendered, tokenised, checked.

Rows stream through in batches, since a fast tokenizer is fast on many texts at once and files may
be larger than memory; what stays is a row's tokens. While one batch is tokenised, in threads, the
next is read and rendered here; all that is noted down is noted in the order of the file. A row that
cannot be used is a problem, and any problem ends the stage; a row that had better not be used is
dropped and counted.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal, NamedTuple

from qlora_core.config import DatasetConfig
from qlora_core.data.audit import Drops, Reason, shortened
from qlora_core.data.chat import RenderedChat
from qlora_core.data.encoding import Encoded, Encoder, Encoding, PromptEncoding
from qlora_core.data.formats import Content, Layout, is_empty
from qlora_core.data.layouts import choose_layout
from qlora_core.data.prepared import IGNORED, Prompt
from qlora_core.data.problems import BadRow, Place, Problems
from qlora_core.data.reading import Record, read_records
from qlora_core.data.split import group_of, row_hash
from qlora_core.errors import DataError
from qlora_core.sources import Source

Side = Literal["train", "heldout"]
_BATCH = 512


class _Draft(NamedTuple):
    """A row that was understood and rendered."""

    place: Place
    content: Content
    side: Side
    group: bytes
    rendered: RenderedChat


class _Dropped(NamedTuple):
    """A row whose text alone tells that it had better not be used."""

    place: Place
    reason: Reason
    content: Content


class _Batch(NamedTuple):
    """Drafts that are being tokenised, and what was dropped while they were read."""

    drafts: list[_Draft]
    dropped: list[_Dropped]
    encoding: Encoding
    prompts: PromptEncoding
    """Of held-out chats."""
    place_of: dict[int, int]
    """Of a held-out draft among the prompts."""


@dataclass(frozen=True, eq=False)
class Row:
    """A row that is kept."""

    place: Place
    side: Side
    group: bytes
    """Hash of what it shares with the rows it must stay together with."""
    rank: bytes
    """Hash of the row; `dataset.max_rows` keeps the lowest."""
    tokens: Encoded
    start: str
    """The beginning of its text, for people."""
    prompt: Prompt | None
    """Of held-out chats only."""


class Pipeline:
    """Prepares the rows of one recipe's files."""

    def __init__(self, config: DatasetConfig, encoder: Encoder, drops: Drops) -> None:
        self._config, self._encoder, self._drops = config, encoder, drops
        self._seen: dict[Side, set[bytes]] = {"train": set(), "heldout": set()}
        self.problems = Problems()
        self.num_read = 0
        self.layout: Layout | None = None

    def rows(
        self, source: Source, side_of: Callable[[bytes], Side | None], on_read: Callable[[], None]
    ) -> Iterator[Row]:
        """Yield the rows of ``source`` that are kept, in order.

        Args:
            source: Where they are read.
            side_of: Tells the side of the split from a row's group; None leaves the row out, as
                it is known from the held-out rows.
            on_read: Called after every batch.

        Raises:
            DataError: The file cannot be read, or holds no row.
        """
        records = read_records(source, self._config.split, self.problems)
        batches = self._batches(self._with_layout(records, source), side_of)
        for batch in _one_ahead(batches):
            for dropped in batch.dropped:
                self._drop(*dropped)
            on_read()
            if batch.drafts and not self.problems.count:  # else only more problems are of interest
                yield from self._kept(batch)

    def check_first_rows(self, source: Source) -> None:
        """Take note of what is wrong with the first batch of ``source``, and read no further.

        Raises:
            DataError: The file cannot be read, or holds no row.
        """
        records = read_records(source, self._config.split, self.problems)
        first = islice(self._with_layout(records, source), _BATCH)
        for batch in self._batches(first, lambda _: "train"):
            batch.encoding.result()

    def _with_layout(self, records: Iterator[Record], source: Source) -> Iterator[Record]:
        first = next(records, None)
        if first is None:
            self.problems.raise_if_any()
            raise DataError(f"{source.uri} holds no rows.", fix="Give a file that holds rows.")
        self.layout = choose_layout(self._config, list(first.columns), source.uri)
        return chain([first], records)

    def _batches(
        self, records: Iterator[Record], side_of: Callable[[bytes], Side | None]
    ) -> Iterator[_Batch]:
        drafts: list[_Draft] = []
        dropped: list[_Dropped] = []
        for record in records:
            self.num_read += 1
            try:
                found = self._draft(record, side_of)
            except BadRow as problem:
                self.problems.add(record.place, problem)
                continue
            if isinstance(found, _Dropped):
                dropped.append(found)
                continue
            drafts.append(found)
            if len(drafts) == _BATCH:
                yield self._begun(drafts, dropped)
                drafts, dropped = [], []
        if drafts or dropped:
            yield self._begun(drafts, dropped)

    def _begun(self, drafts: list[_Draft], dropped: list[_Dropped]) -> _Batch:
        is_chat = bool(drafts) and not isinstance(drafts[0].content, str)
        encoding = self._encoder.begin([draft.rendered for draft in drafts], as_chat=is_chat)
        asked = [n for n, draft in enumerate(drafts) if is_chat and draft.side == "heldout"]
        prompts = self._encoder.begin_prompts([drafts[n].rendered for n in asked])
        place_of = {n: place for place, n in enumerate(asked)}
        return _Batch(drafts, dropped, encoding, prompts, place_of)

    def _draft(self, record: Record, side_of: Callable[[bytes], Side | None]) -> _Draft | _Dropped:
        assert self.layout is not None  # noqa: S101  # set by _with_layout, before any record
        content = self.layout.content(record)
        group = group_of(content, self._config.heldout.by)
        side = side_of(group)
        reason = self._early_objection(content, side)
        if reason or side is None:
            return _Dropped(record.place, reason or "in_heldout", content)
        return _Draft(record.place, content, side, group, self._encoder.render(content))

    def _early_objection(self, content: Content, side: Side | None) -> Reason | None:
        """Say why a row is left out, where its text alone tells."""
        if is_empty(content):
            return "empty"
        is_strict = self._config.special_tokens_in_text == "drop"
        if is_strict and self._encoder.specials.count_in(content):
            return "special_tokens"
        return None if side else "in_heldout"

    def _drop(self, place: Place, reason: Reason, content: Content) -> None:
        self._drops.add(place, reason, _text_of(content))

    def _kept(self, batch: _Batch) -> Iterator[Row]:
        encoded = zip(batch.drafts, batch.encoding.result(), strict=True)
        for number, (draft, tokens) in enumerate(encoded):
            if tokens is None:
                self._drop(draft.place, "special_tokens", draft.content)
            elif reason := self._objection(draft.side, tokens):
                self._drop(draft.place, reason, draft.content)
            else:
                place = batch.place_of.get(number)
                ids = None if place is None else batch.prompts.ids(place)
                yield _row(draft, tokens, None if ids is None else _prompt(draft.content, ids))

    def _objection(self, side: Side, tokens: Encoded) -> Reason | None:
        """Say why a tokenised row is left out, if it is."""
        if len(tokens.ids_L) > self._config.max_length:
            return "too_long"
        if (tokens.labels_L[1:] == IGNORED).all():
            return "nothing_supervised"
        digest = hashlib.sha256(tokens.ids_L.tobytes() + tokens.labels_L.tobytes()).digest()
        if digest in self._seen[side]:
            return "duplicate"
        self._seen[side].add(digest)
        return None


def _one_ahead(batches: Iterator[_Batch]) -> Iterator[_Batch]:
    """Yield each batch when the next one is being tokenised already."""
    waiting = next(batches, None)
    for batch in batches:
        assert waiting is not None  # noqa: S101  # there was one before this one
        yield waiting
        waiting = batch
    if waiting is not None:
        yield waiting


def _row(draft: _Draft, tokens: Encoded, prompt: Prompt | None) -> Row:
    return Row(
        place=draft.place,
        side=draft.side,
        group=draft.group,
        rank=row_hash(draft.content),
        tokens=tokens,
        start=shortened(_text_of(draft.content)),
        prompt=prompt,
    )


def _prompt(content: Content, ids: tuple[int, ...]) -> Prompt:
    """Return the prompt of a chat's last answer, with that answer as its reference."""
    turns = [turn for turn in content if not isinstance(turn, str)]
    last = max(at for at, turn in enumerate(turns) if turn.role == "assistant")
    asked = [turn.content for turn in turns[:last] if turn.role == "user"]
    return Prompt(asked[-1] if asked else "", ids, (turns[last].content,))


def _text_of(content: Content) -> str:
    if isinstance(content, str):
        return content
    return " | ".join(f"{turn.role}: {turn.content}" for turn in content)
