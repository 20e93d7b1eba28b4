"""The rows of a JSON document, each with the line it starts at.

`json.load` forgets where a value stood, so the outer list is walked here and only its elements are
left to the decoder. Known shapes: a list of objects, and an object with such a list under `data`.
"""

import json
import re
from collections.abc import Iterator

from qlora_core.errors import DataError

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def json_rows(text: str, uri: str) -> Iterator[tuple[int, object]]:
    """Yield (line, value) of every element of the document's list.

    Raises:
        DataError: The document is not JSON, or holds no such list.
    """
    at = _skip(text, 0)
    if text.startswith("{", at):
        at = _find_data(text, at, uri)
    if not text.startswith("[", at):
        raise _malformed(text, at, uri, "a list of objects is expected here")
    line, counted = 1, 0
    at = _skip(text, at + 1)
    while not text.startswith("]", at):
        line, counted = line + text.count("\n", counted, at), at
        value, at = _decode(text, at, uri)
        yield line, value
        at = _next_item(text, at, "]", uri)


def _find_data(text: str, at: int, uri: str) -> int:
    """Return where the value of the top-level key `data` starts, stepping over other keys."""
    at = _skip(text, at + 1)
    while not text.startswith("}", at) and at < len(text):
        key, at = _decode(text, at, uri)
        at = _skip(text, at)
        if not text.startswith(":", at):
            raise _malformed(text, at, uri, "':' is expected here")
        at = _skip(text, at + 1)
        if key == "data":
            return at
        _, at = _decode(text, at, uri)
        at = _next_item(text, at, "}", uri)
    raise DataError(
        f"{uri} is a JSON object without a list of rows under 'data'.",
        fix='Write [{...}, {...}] or {"data": [...]}; one object per line belongs into a .jsonl '
        "file.",
    )


def _next_item(text: str, at: int, closing: str, uri: str) -> int:
    at = _skip(text, at)
    if text.startswith(",", at):
        return _skip(text, at + 1)
    if text.startswith(closing, at):
        return at
    raise _malformed(text, at, uri, f"',' or '{closing}' is expected here")


def _decode(text: str, at: int, uri: str) -> tuple[object, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise _malformed(text, error.pos, uri, error.msg) from None
    except RecursionError:
        raise _malformed(text, at, uri, "nested too deeply") from None
    except ValueError as error:
        raise _malformed(text, at, uri, str(error)) from None


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _malformed(text: str, at: int, uri: str, what: str) -> DataError:
    line = text.count("\n", 0, at) + 1
    column = at - text.rfind("\n", 0, at)
    return DataError(f"{uri}:{line}: is not JSON: {what} (column {column}).", fix="Mend the file.")
