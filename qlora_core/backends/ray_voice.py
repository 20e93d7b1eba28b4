"""What workers on Ray say, passed on to a person: every step, notes at once, their log in doses.

Driver or job write the log to the store, so following it needs no connection. A worker that prints
a line for each of a million warnings must not fill Prefect's database; so what came within some
seconds is told at once, its end in full. All of it goes with the tracked run (`stages.kept_log`):
the scratch folder it lies in is gone once the stage is sealed. What opens doors is masked.
"""

import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qlora_core.backends.masking import mask_secrets
from qlora_core.ports import StepMetrics, TrainJob
from qlora_core.training.journal import (
    JOURNAL_FILE,
    LOG_FILE,
    NOTES_FILE,
    PATIENCE_S,
    StepTail,
    Tail,
)

_EVERY_S = 10.0
_NUM_LINES = 12
_WIDTH = 240
_WORTH_A_WORD_S = 10.0  # a store that cannot be read
# bitsandbytes says on import that it could not fetch a kernel from a hub, which it never shall
_NO_NEWS = "Failed to load CPU gemm_4bit_forward from kernels-community"
_COLORS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_SPEAKER = re.compile(r"^\([^)]*\) ?")  # (RayTrainWorker pid=1, ip=10.0.0.1)


@dataclass
class LogTeller:
    """Follows a log; what it held before is told only if asked for, and of that the end.

    Of a traceback the last line is told: Ray prints some thirty when it loses a node.
    """

    path: Path
    say: Callable[[str], None]
    every_s: float = _EVERY_S
    _tail: Tail = field(init=False)
    _before: "deque[str]" = field(init=False)
    _num_before: int = field(default=0, init=False)
    _kept: "deque[str]" = field(init=False)
    _num_new: int = field(default=0, init=False)
    _told_at: float = field(default_factory=time.monotonic, init=False)
    _is_in_frames: bool = field(default=False, init=False)
    """The last line was of a traceback, and not its last."""

    def __post_init__(self) -> None:
        self._tail = Tail(self.path)
        self._before, self._kept = deque(maxlen=_NUM_LINES), deque(maxlen=_NUM_LINES)
        self._num_before = self._hear(self._before)

    def recall(self) -> None:
        """Tell the end of what it held before: of a job that went on while nobody looked."""
        if self._before:
            left_out = self._num_before - len(self._before)
            self._tell("said before", left_out, self._before)
            self._before.clear()

    def catch_up(self, *, is_end: bool = False) -> None:
        """Read on; tell what there is, unless something was told a moment ago."""
        self._num_new += self._hear(self._kept)
        if self._kept and (is_end or time.monotonic() - self._told_at >= self.every_s):
            left_out = self._num_new - len(self._kept)
            self._tell("says", left_out, self._kept)
            self._kept.clear()
            self._num_new, self._told_at = 0, time.monotonic()

    def _hear(self, kept: "deque[str]") -> int:
        """Read on and keep what may be told; return how many lines there were."""
        num_lines = 0
        for line in self._plain_lines():
            num_lines += 1
            if not self._is_frame(line):
                kept.append(line.strip())
        return num_lines

    def _plain_lines(self) -> Iterator[str]:
        for line in self._tail.lines():
            plain = _COLORS.sub("", line)
            if plain.strip() and _NO_NEWS not in plain:
                yield plain

    def _is_frame(self, line: str) -> bool:
        said = _SPEAKER.sub("", line)
        is_opening = said.startswith("Traceback (most recent call last)")
        self._is_in_frames = is_opening or (self._is_in_frames and said[:1].isspace())
        return self._is_in_frames

    def _tell(self, verb: str, left_out: int, lines: Iterable[str]) -> None:
        more = f" ({left_out} more lines in {self.path}, later among the run's logs in MLflow)"
        opening = f"the cluster {verb}{more if left_out else ''}:"
        self.say("\n".join([opening, *map(_shortened, map(mask_secrets, lines))]))


class Voice(Protocol):
    """All that a job writes down."""

    @property
    def heard_at(self) -> float:
        """When the job last got on, by this process's monotonic clock."""

    @property
    def is_behind(self) -> bool:
        """Whether the last look into the store failed, so that there may be more."""

    def catch_up(self, *, is_end: bool = False) -> None:
        """Pass on what is new; at the end, what was kept back, too."""

    def recall(self) -> None:
        """Tell the end of what was said before anybody listened, once."""


@dataclass
class StepFollower:
    """Passes on what the workers of a training write down."""

    steps: StepTail
    notes: Tail
    on_step: Callable[[StepMetrics], None]
    say: Callable[[str], None]
    last_step: int | None = None
    heard_at: float = field(default_factory=time.monotonic, init=False)
    """When the last step came; at first, when listening began."""
    _is_told: bool = field(default=False, init=False)

    @classmethod
    def of(
        cls, job: TrainJob, on_step: Callable[[StepMetrics], None], say: Callable[[str], None]
    ) -> "StepFollower":
        """Listen to ``job``: all of its steps, and of its notes what comes from now on."""
        notes = Tail(job.scratch / NOTES_FILE)
        list(notes.lines())  # what earlier runs said was told then
        return cls(StepTail(job.scratch / JOURNAL_FILE), notes, on_step, say)

    @property
    def is_behind(self) -> bool:
        """Whether the last look into the store failed, so that there may be more."""
        return self.notes.patience.is_behind or self.steps.tail.patience.is_behind

    def catch_up(self) -> None:
        """Pass on what is new.

        Raises:
            StoreError: It could not be read for a long time, or never will.
        """
        for note in self.notes.lines():
            self.say(note)
        for metrics in self.steps.steps():
            self.heard_at = time.monotonic()
            self.on_step(metrics)
            self.last_step = metrics.step
        self._tell_of_a_store_that_is_away()

    def _tell_of_a_store_that_is_away(self) -> None:
        is_long = self.steps.tail.patience.failing_s >= _WORTH_A_WORD_S
        if is_long and not self._is_told:
            self.say(
                "The store cannot be read from here, so no news of training comes. It may well go "
                f"on; waiting up to {PATIENCE_S:g} s."
            )
        self._is_told = is_long


@dataclass
class TrainingVoice:
    """All that a training on Ray writes down, from each of its attempts in turn."""

    follower: StepFollower
    log: LogTeller

    @classmethod
    def of(
        cls,
        job: TrainJob,
        on_step: Callable[[StepMetrics], None],
        say: Callable[[str], None],
        aside: Callable[[str], None],
    ) -> "TrainingVoice":
        """Listen to ``job``: all of its steps, and of notes and log what comes from now on.

        Args:
            job: That is trained.
            on_step: Told every step.
            say: Told what a person should know.
            aside: Told what workers say beside that.
        """
        follower = StepFollower.of(job, on_step, say)
        return cls(follower, LogTeller(job.scratch / LOG_FILE, aside))

    @property
    def heard_at(self) -> float:
        """When the last step came."""
        return self.follower.heard_at

    @property
    def is_behind(self) -> bool:
        """Whether there may be more steps or notes than could be read."""
        return self.follower.is_behind

    def catch_up(self, *, is_end: bool = False) -> None:
        """Pass on what is new."""
        self.follower.catch_up()
        self.log.catch_up(is_end=is_end)

    def recall(self) -> None:
        """Tell the end of the log as it was."""
        self.log.recall()


def _shortened(line: str) -> str:
    return line if len(line) <= _WIDTH else line[:_WIDTH] + " ..."


def last_lines(path: Path, count: int = 15) -> str:
    """Return the end of a log, secrets masked."""
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError:  # none, or out of reach: what is told with it matters more
        return ""
    return mask_secrets("\n".join(text.splitlines()[-count:]))
