"""From columns to conversations: chat `messages`, prompt and completion, Alpaca, plain text.

A `Layout` is chosen once per file, from the recipe and the columns of its first row, and then
applied to every row. Whatever is not understood is refused with the row's place: a turn without a
role, or a tool call that no field of ours carries, would else be trained on half.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

from qlora_core.data.problems import BadRow
from qlora_core.data.reading import Record
from qlora_core.data.templating import RowTemplate

Format = Literal["messages", "completion", "alpaca", "text"]

BREAK = "\ufdd0"
"""A code point that Unicode reserves for use inside a program; here it keeps special tokens in the
text of rows apart (see `encoding`), so rows must not hold it."""

_ROLES = {"human": "user", "gpt": "assistant"}
_KNOWN_ROLES = ("system", "user", "assistant", "tool")
_MEANINGFUL_KEYS = ("tool_calls", "function_call")


class Turn(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


Content = tuple[Turn, ...] | str
"""What a row says: a conversation, or plain text."""


@dataclass(frozen=True)
class Layout:
    """How the rows of one file become conversations."""

    format: Format
    columns: Mapping[str, str]
    """Field of the format -> column of the file."""
    template: RowTemplate | None
    system: str | None

    def content(self, record: Record) -> Content:
        """Return what a row says.

        Raises:
            BadRow: It does not say it in this layout.
        """
        if self.format == "text":
            return self._templated("text", record)
        turns = self._turns(record)
        if not any(turn.role == "assistant" for turn in turns):
            raise BadRow("has no assistant turn, so there is nothing to learn from it")
        system = self._optional("system", record) or self.system
        if system and all(turn.role != "system" for turn in turns):
            return (Turn("system", system), *turns)
        return turns

    def _turns(self, record: Record) -> tuple[Turn, ...]:
        if self.format == "messages":
            return _conversation(self._value("messages", record), self.columns["messages"])
        if self.format == "completion":
            prompt, answer = self._templated("prompt", record), self._text("completion", record)
        else:
            parts = self._text("instruction", record), self._optional("input", record)
            prompt = "\n\n".join(part for part in parts if part)
            answer = self._text("output", record)
        return Turn("user", prompt), Turn("assistant", answer)

    def _templated(self, field: str, record: Record) -> str:
        if self.template is None:
            return self._text(field, record)
        named = {name: record.columns.get(column) for name, column in self.columns.items()}
        return checked_text(self.template.render({**named, **record.columns}), "the template")

    def _value(self, field: str, record: Record) -> object:
        column = self.columns[field]
        if column not in record.columns:
            raise BadRow(f"has no column {column!r}; it has {', '.join(record.columns)}")
        return record.columns[column]

    def _text(self, field: str, record: Record) -> str:
        return _as_text(self._value(field, record), self.columns[field])

    def _optional(self, field: str, record: Record) -> str:
        column = self.columns.get(field)
        return _as_text(record.columns.get(column), column) if column else ""


def is_empty(content: Content) -> bool:
    """Say whether there is nothing to learn: no text, a blank answer, or only blank questions."""
    if isinstance(content, str):
        return not content.strip()
    asked = [turn.content.strip() for turn in content if turn.role == "user"]
    answers = [turn.content.strip() for turn in content if turn.role == "assistant"]
    return not all(answers) or (bool(asked) and not any(asked))


def checked_text(text: str, where: str) -> str:
    """Return ``text`` if it can be written as UTF-8 and holds no NUL.

    Raises:
        BadRow: It cannot; ``where`` says which text it was.
    """
    if "\0" in text or BREAK in text:
        name = "a NUL character" if "\0" in text else "the noncharacter U+FDD0"
        raise BadRow(f"{where} holds {name}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"{where} holds half a surrogate pair, which is no character") from None
    return text


def _as_text(value: object, column: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return checked_text(value, f"column {column!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"column {column!r} holds {value}, which is no text; write null or text")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise BadRow(f"column {column!r} holds a {type(value).__name__}, but text is needed")


def _conversation(value: object, column: str) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise BadRow(
            f"column {column!r} holds {_kind(value)}, but a list of turns is needed: "
            '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
        )
    return tuple(_turn(item, number) for number, item in enumerate(value, 1))


def _turn(item: object, number: int) -> Turn:
    if not isinstance(item, dict):
        raise BadRow(f"turn {number} is {_kind(item)}, but must be an object with role and content")
    for key in _MEANINGFUL_KEYS:
        if item.get(key):
            raise BadRow(f"turn {number} has {key!r}, which is not supported; write it as content")
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if role is None or not ({"content", "value"} & item.keys()):
        raise BadRow(f"turn {number} lacks role or content; it has {', '.join(map(str, item))}")
    name = _ROLES.get(str(role), str(role))
    if name not in _KNOWN_ROLES:
        raise BadRow(f"turn {number} has the role {role!r}; known are {', '.join(_KNOWN_ROLES)}")
    return Turn(name, _as_text(_joined(content, number), f"turn {number}"))


def _joined(content: object, number: int) -> object:
    """Join content given as a list of parts, which some exports write even for plain text."""
    if not isinstance(content, list):
        return content
    parts = [cast("dict[str, object]", part) for part in content if isinstance(part, dict)]
    if len(parts) < len(content) or any(part.get("type") != "text" for part in parts):
        raise BadRow(f"turn {number} has parts that are not text; only text is supported")
    return "".join(str(part.get("text", "")) for part in parts)


def _kind(value: object) -> str:
    return "nothing" if value in (None, []) else f"a {type(value).__name__}"
