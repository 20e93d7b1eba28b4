"""Render conversations by the tokenizer's own chat template, and find what the assistant says.

Only the assistant's words and the stop token after them are learned, so we must know where in the
rendered text they stand, for any template. Three ways, the first that applies:

1. The template marks them itself: `{% generation %}` ... `{% endgeneration %}`.
2. The *skeleton*: the template is rendered once per sequence of roles with placeholders for the
   contents. What stands between them is the template's own text; a row whose rendering is exactly
   that text with its contents (or its trimmed contents) filled in is located without guessing.
3. Templates that look into the content (say, to drop old reasoning): the assistant's turn starts
   where the rendering of everything before it, with the generation prompt, ends, and stops at the
   first stop token.

What the template writes between generation prompt and answer (an empty reasoning block, a space) is
learned too: at run time the model itself must write it. Learned as well is the stop token, with the
white space before it. A template that writes none gets one after the last answer. Row and prompt
are one text: the prompt of a held-out row is its rendering up to where its last answer begins.

A template that asks for today's date gets a fixed one: the same rows must give the same bytes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_core.data.formats import BREAK, Turn
from qlora_core.data.problems import BadRow
from qlora_core.data.special_tokens import SpecialTokens
from qlora_core.errors import ModelError

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}"
    "{{ {'%Y-%m-%d': '2024-07-26', '%d %B %Y': '26 July 2024'}.get(format, '26 Jul 2024') }}"
    "{%- endmacro -%}"
)
_PLACEHOLDER = re.compile(f"{BREAK}(\\d+){BREAK}")
_FOREIGN = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)


class Span(NamedTuple):
    """Characters ``start`` to ``end`` of a rendering that are learned."""

    start: int
    end: int
    has_stop: bool
    """The last token of it is a stop token."""


class RenderedChat(NamedTuple):
    """A whole conversation as text; its prompt is the text up to the last span."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class _Skeleton:
    """What a template writes around the contents of one sequence of roles."""

    texts: tuple[str, ...]
    """N + 1 pieces."""
    turns: tuple[int, ...]
    """N turns whose contents stand between them, in the order of the text."""
    leads: dict[int, int]
    """Assistant turn -> characters before its content that are no part of the prompt."""


class ChatRenderer:
    """One tokenizer's chat template.

    Args:
        tokenizer: Its template and special tokens are read.
        stops: Texts of the tokens at which generation ends, at least one.
        specials: The tokenizer's special tokens.

    Raises:
        ModelError: The tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], specials: SpecialTokens) -> None:
        template = _template_of(tokenizer)
        self._has_date = "strftime_now" in template
        self._template = (_FIXED_DATE if self._has_date else "") + template
        self._is_marked = _MARKED.search(template) is not None
        self._names = dict(tokenizer.special_tokens_map)
        self._stop = re.compile(rf"\s*(?:{'|'.join(map(re.escape, stops))})")
        self._stops, self._eos, self._specials = tuple(stops), stops[0], specials
        self._skeletons: dict[tuple[str, ...], _Skeleton | None] = {}
        self._num_stops_added = 0
        self._ignores_prompt = False

    def render(self, turns: Sequence[Turn]) -> RenderedChat:
        """Return the rendering of ``turns`` and where the assistant speaks in it.

        Raises:
            BadRow: The template refuses these turns, or the assistant's words cannot be found.
            ModelError: The template ends answers with a token at which generation does not stop.
        """
        text, marks = self._text(turns)
        if self._is_marked:
            starts_ends = [(start, end) for start, end in marks if start < end]
        else:
            starts_ends = self._places(turns, text) or self._places_by_prompts(turns, text)
        spans = tuple(self._closed(text, start, end) for start, end in starts_ends)
        if spans and not spans[-1].has_stop and turns[-1].role == "assistant":
            return self._ended(text, spans)
        return RenderedChat(text, spans)

    def notes(self) -> tuple[str, ...]:
        """Return what a person should know of how rows were rendered."""
        said = []
        if self._has_date:
            said.append("The chat template asks for today's date; 26 Jul 2024 stands for it.")
        if self._num_stops_added:
            said.append(
                f"The chat template writes no stop token: {self._eos!r} was put after the last "
                f"answer of {self._num_stops_added} rows."
            )
        if self._ignores_prompt:
            said.append(
                "The chat template ignores add_generation_prompt, so whoever serves the model must "
                "write the assistant's header; evaluation does."
            )
        return tuple(said)

    def _closed(self, text: str, start: int, end: int) -> Span:
        """Widen a span over the stop token that follows it."""
        if text[start:end].rstrip().endswith(self._stops):
            return Span(start, end, True)
        found = self._stop.match(text, end)
        return Span(start, found.end() if found else end, found is not None)

    def _ended(self, text: str, spans: tuple[Span, ...]) -> RenderedChat:
        """Put a stop token after the last answer, as the template wrote none."""
        *others, last = spans
        tail = text[last.end :]
        closing = self._specials.match(tail.lstrip(), 0)
        if closing:
            raise ModelError(
                f"The chat template ends an answer with {closing!r}, but generation stops at "
                f"{' or '.join(map(repr, self._stops))}: the tuned model would never stop.",
                fix="Use the instruct variant of this model, or set model.chat_template to a Jinja "
                f"file whose answers end with {self._eos!r}.",
            )
        self._num_stops_added += 1
        text = (text[: last.end] if not tail.strip() else text) + self._eos
        return RenderedChat(text, (*others, Span(last.start, len(text), True)))

    def _places(self, turns: Sequence[Turn], text: str) -> list[tuple[int, int]] | None:
        """Locate the assistant's words by the skeleton; None if the rendering does not fit it."""
        skeleton = self._skeleton(tuple(turn.role for turn in turns))
        if skeleton is None or not text.startswith(skeleton.texts[0]):
            return None
        places, at = [], len(skeleton.texts[0])
        for turn, after in zip(skeleton.turns, skeleton.texts[1:], strict=True):
            end = _end_of(turns[turn].content, after, text, at)
            if end is None:
                return None
            if turn in skeleton.leads:
                places.append((at - skeleton.leads[turn], end))
            at = end + len(after)
        return places if at == len(text) else None

    def _places_by_prompts(self, turns: Sequence[Turn], text: str) -> list[tuple[int, int]]:
        """Locate the assistant's words by rendering what comes before each of its turns."""
        places = []
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            prompt, _ = self._text(turns[:number], prompt=True)
            if number == 0 or not text.startswith(prompt):
                raise BadRow(
                    f"the assistant's words of turn {number + 1} cannot be told from the rest, as "
                    "the chat template rewrites turns; mark them in it with {% generation %} "
                    "(model.chat_template)"
                )
            places.append((len(prompt), self._first_stop(text, len(prompt))))
        return places

    def _first_stop(self, text: str, at: int) -> int:
        found = [text.find(stop, at) for stop in self._stops]
        return min((place for place in found if place >= 0), default=len(text))

    def _skeleton(self, roles: tuple[str, ...]) -> _Skeleton | None:
        if roles not in self._skeletons:
            self._skeletons[roles] = self._make_skeleton(roles)
        return self._skeletons[roles]

    def _make_skeleton(self, roles: tuple[str, ...]) -> _Skeleton | None:
        turns = [Turn(role, f"{BREAK}{number}{BREAK}") for number, role in enumerate(roles)]
        try:
            text, _ = self._text(turns)
        except BadRow:
            return None
        texts, found = _PLACEHOLDER.split(text)[::2], _PLACEHOLDER.split(text)[1::2]
        numbers = tuple(map(int, found))
        answers = [number for number, role in enumerate(roles) if role == "assistant"]
        if any(numbers.count(number) != 1 for number in answers):
            return None
        leads = {number: self._lead(turns, number, text) for number in answers}
        return _Skeleton(tuple(texts), numbers, leads)

    def _lead(self, turns: list[Turn], number: int, text: str) -> int:
        """Return how much the template writes between generation prompt and answer [characters].

        A template that ignores `add_generation_prompt` writes the whole header there: that is
        recognised by its special tokens, and left to the prompt.
        """
        try:
            prompt, _ = self._text(turns[:number], prompt=True)
        except BadRow:
            return 0
        lead = text[len(prompt) : text.index(turns[number].content)]
        is_prefix = number > 0 and text.startswith(prompt)
        is_header = self._specials.contained_in(lead) or BREAK in lead
        self._ignores_prompt |= is_prefix and is_header
        return len(lead) if is_prefix and not is_header else 0

    def _text(
        self, turns: Sequence[Turn], *, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            texts, marks = render_jinja_template(
                [[{"role": turn.role, "content": turn.content} for turn in turns]],
                chat_template=self._template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=self._is_marked,
                **self._names,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"The chat template is not valid Jinja: {error.message} in line {error.lineno}.",
                fix="Mend it, or set model.chat_template to a Jinja file.",
            ) from None
        except _FOREIGN as error:
            raise BadRow(f"the chat template refuses this conversation: {error}") from None
        return texts[0], marks[0] if marks else []


def _end_of(content: str, after: str, text: str, at: int) -> int | None:
    """Return where ``content`` ends in ``text``, as it is or trimmed, with ``after`` behind it."""
    for written in (content, content.strip(), content.lstrip(), content.rstrip()):
        end = at + len(written)
        if text.startswith(written, at) and text.startswith(after, end):
            return end
    return None


def _template_of(tokenizer: Any) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        raise ModelError(
            "The tokenizer has no chat template, so rows cannot be rendered as chats.",
            fix="Set model.chat_template to a Jinja file, use the instruct variant of this model, "
            "or train on plain text: dataset.format: text with dataset.template.",
        ) from None
