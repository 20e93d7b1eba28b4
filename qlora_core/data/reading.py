"""Rows out of files: JSONL, JSON, CSV, Parquet, or a `datasets` hub id.

Every reader knows the line it is at, since "row 48213 is malformed" is of no use without it; that
is why JSON and CSV are not left to a library that answers with whole tables. A row that cannot be
read becomes one of the `Problems` and reading goes on, so that a person sees all of them; a file
that cannot be read raises at once. Blank lines are no rows. A byte-order mark is no text.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_core.data.json_rows import json_rows
from qlora_core.data.problems import BadRow, Place, Problems
from qlora_core.errors import DataError
from qlora_core.sources import Source

if TYPE_CHECKING:
    from _csv import Reader

MAX_LINE_BYTES = 64 << 20
"""A longer line is no row of text; a file without newlines would else be read whole."""

_BOM = b"\xef\xbb\xbf"
_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_BATCH = 1024


class Record(NamedTuple):
    """One row as it was read: its columns are whatever the file has."""

    place: Place
    columns: dict[str, object]


def read_records(source: Source, split: str, problems: Problems) -> Iterator[Record]:
    """Yield the rows of ``source`` in order; ``split`` counts for a hub dataset only.

    Raises:
        DataError: It is not a file of rows, or it cannot be read at all.
    """
    if source.kind == "hub":
        yield from _read_hub(source, split)
        return
    path = source.local()
    ending = path.suffix.lower()
    if source.kind == "folder" or ending not in _ENDINGS:
        raise DataError(
            f"{source.uri} is not a file of rows.",
            fix=f"Give a file that ends in {', '.join(_ENDINGS)}, or a hub id such as org/name.",
        )
    if path.stat().st_size == 0:
        raise DataError(f"{source.uri} is empty (0 bytes).", fix="Give a file that holds rows.")
    if ending == ".parquet":
        yield from _read_parquet(path, source.uri)
    elif ending == ".csv":
        yield from _read_csv(path, source.uri, problems)
    elif ending == ".json":
        yield from _read_json(path, source.uri, problems)
    else:
        yield from _read_jsonl(path, source.uri, problems)


def estimate_rows(source: Source) -> int:
    """Return about how many rows there are, for a progress bar; 0 where that is not known."""
    if source.kind != "file":
        return 0
    path = source.local()
    if path.suffix.lower() == ".parquet":
        return 0
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _lines(path: Path, uri: str) -> Iterator[tuple[Place, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            place = Place(uri, number)
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"{place}: this line is longer than {MAX_LINE_BYTES >> 20} MiB.",
                    fix="Write one row per line; a JSON array belongs into a .json file.",
                )
            yield place, line.removeprefix(_BOM) if number == 1 else line


def _read_jsonl(path: Path, uri: str, problems: Problems) -> Iterator[Record]:
    for place, line in _lines(path, uri):
        if not line.strip():
            continue
        try:
            yield Record(place, _parse_line(line))
        except BadRow as problem:
            problems.add(place, problem)


def _parse_line(line: bytes) -> dict[str, object]:
    if b"\0" in line:
        raise BadRow("holds NUL bytes; the file is damaged, or not UTF-8 (save it as UTF-8)")
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"is not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadRow(f"is not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise BadRow("is nested too deeply") from None
    except ValueError as error:
        raise BadRow(f"is not JSON: {error}") from None
    return _as_object(value)


def _as_object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise BadRow(f"is a JSON {type(value).__name__}, but a row is an object: {{...}}")
    return value


def _read_json(path: Path, uri: str, problems: Problems) -> Iterator[Record]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{uri}:{number}: is not UTF-8.", fix="Save the file as UTF-8.") from None
    for number, value in json_rows(text, uri):
        place = Place(uri, number)
        try:
            yield Record(place, _as_object(value))
        except BadRow as problem:
            problems.add(place, problem)


def _read_csv(path: Path, uri: str, problems: Problems) -> Iterator[Record]:
    reader = csv.reader(_csv_lines(path, uri, problems), strict=True)
    names = _csv_row(reader, uri) or []
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or not all(name.strip() for name in names):
        what = f"names {repeated} twice" if repeated else "has a column without a name"
        raise DataError(f"{uri}:1: the header {what}.", fix="Give every column its own name.")
    while (start := reader.line_num + 1) and (cells := _csv_row(reader, uri)) is not None:
        place = Place(uri, start)
        if not cells:
            continue
        if len(cells) == len(names):
            yield Record(place, dict(zip(names, cells, strict=True)))
        else:
            problems.add(place, f"has {len(cells)} fields, but the header has {len(names)}")


def _csv_row(reader: "Reader", uri: str) -> list[str] | None:
    start = reader.line_num + 1
    try:
        return next(reader, None)
    except csv.Error as error:
        raise DataError(
            f"{uri}:{start}: the row that starts here is not CSV: {error}.",
            fix='Quote fields with commas, quotes or line breaks: "...", with quotes doubled; '
            "for very long fields use JSONL.",
        ) from None


def _csv_lines(path: Path, uri: str, problems: Problems) -> Iterator[str]:
    for place, line in _lines(path, uri):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            problems.add(place, f"is not UTF-8 at byte {error.start + 1}; save the file as UTF-8")
            yield line.decode("utf-8", errors="replace")


def _read_parquet(path: Path, uri: str) -> Iterator[Record]:
    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=_BATCH):
            for columns in batch.to_pylist():
                number += 1
                yield Record(Place(uri, number, "row"), columns)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{uri} cannot be read as Parquet after row {number}: {error}",
            fix="Write the file again; it is damaged, or no Parquet.",
        ) from None


def _read_hub(source: Source, split: str) -> Iterator[Record]:
    from datasets import load_dataset  # a second to import, and rarely needed

    try:
        rows = load_dataset(source.hub_id, split=split, revision=source.revision)
    except Exception as error:  # it raises whatever its many loaders raise
        raise DataError(
            f"dataset.source={source.uri!r} cannot be loaded from the hub (split {split!r}): "
            f"{' '.join(str(error).split())[:400]}",
            fix="Check the id, dataset.revision, dataset.split and the network (and HF_TOKEN if "
            "it is gated); or give a local file.",
        ) from None
    for number, columns in enumerate(rows, 1):
        yield Record(Place(source.uri, number, "row"), dict(columns))
