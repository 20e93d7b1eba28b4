"""The local journal: everything that is tracked is here first, whatever happens to the server.

One folder for each run. `journal.jsonl` only grows, one record a line, handed to the kernel before
`append` returns, so a killed process loses nothing it had logged; fsync follows within a second of
logging, before anything is sent, and at the end, so a power cut costs a second at most (each fsync
takes milliseconds, and thousands of steps may be logged at once). The number of a record is the
number of its line: it needs no counter that could be wrong. `acknowledged.json` says up to which
line a server has everything.

What would surprise: (1) a process may die in the middle of a line. A reader leaves such a tail
alone, and the next writer cuts it off. (2) Several processes may write to one journal (a dying run
and its successor), so every append holds a file lock, and looks whether the file has grown.
"""

import fcntl
import math
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from qlora_core.artifacts import Frozen

_SYNC_EVERY_S = 1.0

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


class StartRecord(Frozen):
    """A process began, or went on with, the run."""

    kind: Literal["start"] = "start"


class ParamsRecord(Frozen):
    """Write-once parameters."""

    kind: Literal["params"] = "params"
    values: dict[str, str]


class MetricsRecord(Frozen):
    """Numbers at a step."""

    kind: Literal["metrics"] = "metrics"
    values: dict[str, float]
    step: int


class DatasetRecord(Frozen):
    """A dataset that went in."""

    kind: Literal["dataset"] = "dataset"
    name: str
    digest: str
    source: str
    context: str
    num_rows: int


class FileRecord(Frozen):
    """A file or folder to keep with the run."""

    kind: Literal["file"] = "file"
    copy_at: str
    """Where our copy of it lies, relative to the journal's folder."""
    folder: str
    """Where it goes among the run's artefacts."""


class TagsRecord(Frozen):
    """Text to find the run by."""

    kind: Literal["tags"] = "tags"
    values: dict[str, str]


class EndRecord(Frozen):
    """How the run ended; a `StartRecord` may follow."""

    kind: Literal["end"] = "end"
    status: RunStatus


Record = Annotated[
    StartRecord
    | ParamsRecord
    | MetricsRecord
    | DatasetRecord
    | FileRecord
    | TagsRecord
    | EndRecord,
    Field(discriminator="kind"),
]


class _Line(Frozen):
    time_ms: int
    record: Record


class Entry(Frozen):
    """One numbered line of a journal."""

    number: int
    """Counts from 1: the number of the line."""
    time_ms: int
    """When it was logged, Unix time [ms]; it stays the same however late it is sent."""
    record: Record


class Page(Frozen):
    """What was read from a journal, and where to go on."""

    entries: tuple[Entry, ...]
    end_byte: int
    num_lines: int
    """Whole lines up to `end_byte`."""
    num_damaged: int
    """Whole lines on this page that hold no record; they are skipped."""


class _Acknowledged(Frozen):
    number: int


class Journal:
    """One run's journal; safe to append to from several threads and processes.

    Args:
        folder: Where it lies; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._path = folder / "journal.jsonl"
        self._lock = threading.Lock()
        self._end_byte, self._num_lines = 0, 0
        self._synced_s = -math.inf

    def append(self, record: Record) -> int:
        """Write one record and return its number.

        Raises:
            OSError: The disk is full, or the folder cannot be written.
        """
        line = _Line(time_ms=time.time_ns() // 1_000_000, record=record)
        data = line.model_dump_json().encode() + b"\n"
        with self._lock, _locked(self._path) as file:
            self._cut_torn_tail(file)
            _write_all(file, data)
            if isinstance(record, EndRecord) or time.monotonic() - self._synced_s > _SYNC_EVERY_S:
                os.fsync(file)
                self._synced_s = time.monotonic()
            self._end_byte += len(data)
            self._num_lines += 1
            return self._num_lines

    def sync(self) -> None:
        """Bring what was appended to the disk."""
        with self._lock, _locked(self._path) as file:
            os.fsync(file)

    def copy_in(self, path: Path) -> str:
        """Copy a file or folder into the journal's folder and return its relative place.

        A copy, as what is logged may be changed or swept before a server can be reached.
        """
        target = self._fresh_place(path.name)
        if path.is_dir():
            shutil.copytree(path, target)
        else:
            shutil.copyfile(path, target)
        return target.relative_to(self.folder).as_posix()

    def write_in(self, name: str, text: str) -> str:
        """Keep a text as a file in the journal's folder and return its relative place."""
        target = self._fresh_place(name)
        target.write_text(text, encoding="utf-8")
        return target.relative_to(self.folder).as_posix()

    def _fresh_place(self, name: str) -> Path:
        target = self.folder / "files" / uuid.uuid4().hex / name
        target.parent.mkdir(parents=True)
        return target

    def read(self, after: Page | None = None) -> Page:
        """Return the whole lines after an earlier page; an unfinished last line is left alone."""
        start, number = (after.end_byte, after.num_lines) if after else (0, 0)
        lines = _whole_lines(self._path, start)
        entries = [_entry(number + i, line) for i, line in enumerate(lines, start=1)]
        kept = tuple(entry for entry in entries if entry is not None)
        return Page(
            entries=kept,
            end_byte=start + sum(map(len, lines)),
            num_lines=number + len(lines),
            num_damaged=len(entries) - len(kept),
        )

    def acknowledged(self) -> int:
        """Return the number of the last entry that a server has; 0 at the start."""
        try:
            text = (self.folder / "acknowledged.json").read_text()
            return _Acknowledged.model_validate_json(text).number
        except (FileNotFoundError, ValidationError):
            return 0  # at worst things are sent again, and the server's copies are recognised

    def acknowledge(self, number: int) -> None:
        """Remember that a server has everything up to ``number``."""
        text = _Acknowledged(number=number).model_dump_json()
        replace_file(self.folder / "acknowledged.json", text)

    def num_waiting(self) -> int:
        """Return how many entries no server has yet."""
        return len(_whole_lines(self._path, 0)) - self.acknowledged()

    @contextmanager
    def sending(self) -> Iterator[bool]:
        """Try to become the only one who sends this journal; give whether that worked."""
        with (self.folder / "sending.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def _cut_torn_tail(self, file: int) -> None:
        size = os.fstat(file).st_size
        if size == self._end_byte:
            return
        lines = _whole_lines(self._path, self._end_byte)
        self._end_byte += sum(map(len, lines))
        self._num_lines += len(lines)
        if size > self._end_byte:
            os.ftruncate(file, self._end_byte)


def replace_file(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)  # and with it the lock


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _whole_lines(path: Path, start_byte: int) -> list[bytes]:
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(start_byte)
        return [line for line in file if line.endswith(b"\n")]


def _entry(number: int, text: bytes) -> Entry | None:
    try:
        line = _Line.model_validate_json(text)
    except ValidationError:
        return None
    return Entry(number=number, time_ms=line.time_ms, record=line.record)
