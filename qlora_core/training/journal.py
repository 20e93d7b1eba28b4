"""The journal: one StepMetrics a line, each step once, on disk before anything relies on it.

Rank 0 writes it; the launcher in another process follows it with `Tail`. A resumed training starts
the file anew from the snapshot's copy, by rename, so no reader ever sees half of a rewrite.

`curve.jsonl` is what gets sealed with the adapter: the journal without what a clock or the number
of workers decides, so the same training leaves the same bytes.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

from pydantic import ValidationError

from qlora_core.artifacts import Frozen
from qlora_core.errors import StoreAwayError, storing
from qlora_core.ports import StepMetrics
from qlora_core.training.durable import replace_durably

T = TypeVar("T")

JOURNAL_FILE = "journal.jsonl"
CURVE_FILE = "curve.jsonl"
NOTES_FILE = "notes.txt"
"""What a person should know, one line each, in the scratch folder; it grows on the way."""
LOG_FILE = "ray.log"
"""In the scratch folder: what driver and workers say, where there are such."""
PATIENCE_S = 600.0
"""With a file of others that cannot be read just now."""
VALIDATIONS_FILE = "validations.jsonl"
"""In the scratch folder: one `Validation` a line."""


def add_notes(scratch: Path, notes: Iterable[str]) -> None:
    """Tell the person who watches.

    Raises:
        StoreError: There is no room, say.
    """
    path = scratch / NOTES_FILE
    with storing(path), path.open("a", encoding="utf-8") as file:
        file.writelines(f"{note}\n" for note in notes)


def noted(scratch: Path) -> list[str]:
    """Return what `add_notes` has told so far, by earlier attempts, too.

    Raises:
        StoreError: It cannot be read.
    """
    return list(Tail(scratch / NOTES_FILE).lines())


class CurvePoint(Frozen):
    """The part of a StepMetrics that is the same whenever the training is the same."""

    step: int
    epoch: float
    loss: float
    heldout_loss: float | None
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_supervised_tokens: int


class Journal:
    """Rank 0's record of the steps done.

    Args:
        path: The file; what it held is replaced.
        steps: Steps of earlier attempts that still count.

    Raises:
        StoreError: There is no room, say.
    """

    def __init__(self, path: Path, steps: Iterable[StepMetrics] = ()) -> None:
        self.path = path
        self.steps = list(steps)
        replace_durably(path, "".join(_line(step) for step in self.steps).encode())
        with storing(path):
            self._file: IO[str] = path.open("a", encoding="utf-8")

    def append(self, metrics: StepMetrics) -> None:
        """Add a step, on disk when this returns.

        Raises:
            StoreError: There is no room, say.
        """
        with storing(self.path):
            self._file.write(_line(metrics))
            self._file.flush()
            os.fsync(self._file.fileno())
        self.steps.append(metrics)

    def close(self) -> None:
        """Let go of the file.

        Raises:
            StoreError: A network file system says only now that it could not write.
        """
        with storing(self.path):
            self._file.close()


class Validation(Frozen):
    """What was measured of a snapshot beside training, or a word to the person who watches."""

    step: int
    """Of the snapshot."""
    heldout_loss: float | None = None
    """Mean [nats per supervised token]; none: see ``note``."""
    note: str = ""


class Patience:
    """With a store that a reader cannot read just now, while whoever writes there may be well.

    A look that fails means that nothing new is known yet; only after ``patience_s`` without a look
    that worked is it told.
    """

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._failing_since: float | None = None

    @property
    def is_behind(self) -> bool:
        """Whether the last look failed, so that there may be more."""
        return self._failing_since is not None

    @property
    def failing_s(self) -> float:
        """How long no look has worked [seconds]."""
        since = self._failing_since
        return 0.0 if since is None else time.monotonic() - since

    def look(self, read: Callable[[], T]) -> T | None:
        """Return what ``read`` returns; None if it cannot be read just now.

        Raises:
            StoreAwayError: So it has been for longer than there is patience.
            StoreError: It cannot be read until a person changes that.
        """
        try:
            found = read()
        except StoreAwayError:
            self._failing_since = self._failing_since or time.monotonic()
            if self.failing_s >= self._patience_s:
                raise
            return None
        self._failing_since = None
        return found


class Tail:
    """Follows a file that another process appends to or replaces; gives whole lines only.

    Replaced over NFS while it is read, a file fails once, too: see `Patience`.
    """

    def __init__(self, path: Path, patience_s: float = PATIENCE_S) -> None:
        self._path = path
        self._inode, self._offset = -1, 0
        self.patience = Patience(patience_s)

    def lines(self) -> Iterator[str]:
        """Yield the lines that came since the last call; all of them after a replacement.

        Raises:
            StoreAwayError: The file could not be read for longer than there is patience.
            StoreError: It cannot be read until a person changes that.
        """
        whole = self.patience.look(self._read) or b""
        yield from whole.decode("utf-8", "replace").splitlines()

    def _read(self) -> bytes:
        with storing(self._path, "read"):
            return self._whole_lines()

    def _whole_lines(self) -> bytes:
        try:
            file = self._path.open("rb")
        except FileNotFoundError:  # not there yet
            return b""
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset = status.st_ino, 0
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
            self._offset += len(whole + newline)
        return whole


def add_validation(scratch: Path, validation: Validation) -> None:
    """Add a line to the file of them.

    Raises:
        StoreError: There is no room, say; half of the line may be there.
    """
    path = scratch / VALIDATIONS_FILE
    with storing(path), path.open("a", encoding="utf-8") as file:
        # each begins a line, so that one which was left unfinished spoils no other; and ends it,
        # so that `Tail` takes it for whole
        file.write("\n" + validation.model_dump_json() + "\n")


def read_validations(lines: Iterable[str]) -> Iterator[Validation]:
    """Yield what was measured or said; a line that a full disk or a kill cut short is none."""
    for line in lines:
        with suppress(ValidationError):
            yield Validation.model_validate_json(line)


class StepTail:
    """Follows a journal: every step once and in order, however often the journal starts anew."""

    def __init__(self, path: Path) -> None:
        self.tail = Tail(path)
        self._last_step = 0

    def steps(self) -> Iterator[StepMetrics]:
        """Yield the steps that came since the last call."""
        for line in self.tail.lines():
            metrics = StepMetrics.model_validate_json(line)
            if metrics.step == self._last_step + 1:
                self._last_step = metrics.step
                yield metrics


def read_journal(path: Path) -> list[StepMetrics]:
    """Return the steps of a journal."""
    return [StepMetrics.model_validate_json(line) for line in path.read_text("utf-8").splitlines()]


def write_curve(folder: Path, steps: Iterable[StepMetrics]) -> None:
    """Write ``folder/curve.jsonl``.

    Raises:
        StoreError: There is no room, say.
    """
    points = (CurvePoint(**step.model_dump(include=set(CurvePoint.model_fields))) for step in steps)
    text = "".join(point.model_dump_json() + "\n" for point in points)
    with storing(folder / CURVE_FILE):
        (folder / CURVE_FILE).write_text(text, "utf-8")


def read_curve(folder: Path) -> list[CurvePoint]:
    """Return the loss curve that lies beside an adapter."""
    text = (folder / CURVE_FILE).read_text("utf-8")
    return [CurvePoint.model_validate_json(line) for line in text.splitlines()]


def _line(metrics: StepMetrics) -> str:
    return metrics.model_dump_json() + "\n"
