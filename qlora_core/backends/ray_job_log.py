"""What a remote training says, passed on to a person in doses.

The job writes its log to shared storage, so following it needs no connection, and what was not
said stays there to be read. A worker that prints a line for each of a million warnings must not
fill Prefect's database; so what came within some seconds is told at once, its end in full.
"""

import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qlora_core.backends.ray_train import StepFollower
from qlora_core.backends.ray_worker import LOG_FILE
from qlora_core.ports import StepMetrics, TrainJob
from qlora_core.training.journal import Tail

_EVERY_S = 10.0
_NUM_LINES = 12
_WIDTH = 240
_PROGRESS_S = 60.0
_COLORS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass
class LogTeller:
    """Follows a log; what it held before is not told again."""

    path: Path
    say: Callable[[str], None]
    every_s: float = _EVERY_S
    _tail: Tail = field(init=False)
    _kept: "deque[str]" = field(init=False)
    _num_new: int = field(default=0, init=False)
    _told_at: float = field(default_factory=time.monotonic, init=False)

    def __post_init__(self) -> None:
        self._tail, self._kept = Tail(self.path), deque(maxlen=_NUM_LINES)
        list(self._tail.lines())

    def catch_up(self, *, is_end: bool = False) -> None:
        """Read on; tell what there is, unless something was told a moment ago."""
        for line in self._tail.lines():
            if plain := _COLORS.sub("", line).strip():
                self._kept.append(plain if len(plain) <= _WIDTH else plain[:_WIDTH] + " ...")
                self._num_new += 1
        if self._num_new and (is_end or time.monotonic() - self._told_at >= self.every_s):
            self.say("\n".join([self._opening(), *self._kept]))
            self._kept.clear()
            self._num_new, self._told_at = 0, time.monotonic()

    def _opening(self) -> str:
        left_out = self._num_new - len(self._kept)
        return f"the cluster says{f' ({left_out} more lines in {self.path})' if left_out else ''}:"


@dataclass
class StepTeller:
    """Passes every step on, and says now and then how far training is."""

    on_step: Callable[[StepMetrics], None]
    say: Callable[[str], None]
    every_s: float = _PROGRESS_S
    heard_at: float = field(default_factory=time.monotonic, init=False)
    """When the last step came; at first, when listening began."""
    _told_at: float = field(default_factory=time.monotonic, init=False)

    def __call__(self, metrics: StepMetrics) -> None:
        """Take one step."""
        self.heard_at = time.monotonic()
        self.on_step(metrics)
        if self.heard_at - self._told_at >= self.every_s:
            self._told_at = self.heard_at
            self.say(f"step {metrics.step} of {metrics.num_steps}, loss {metrics.loss:.4f}")


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


@dataclass
class JobVoice:
    """All that a remote training writes down, from each of its attempts in turn."""

    follower: StepFollower
    log: LogTeller
    steps: StepTeller

    @classmethod
    def of(
        cls, job: TrainJob, on_step: Callable[[StepMetrics], None], say: Callable[[str], None]
    ) -> "JobVoice":
        """Listen to ``job``: all of its steps, and of notes and log what comes from now on."""
        steps = StepTeller(on_step, say)
        return cls(StepFollower.of(job, steps, say), LogTeller(job.scratch / LOG_FILE, say), steps)

    @property
    def heard_at(self) -> float:
        """When the last step came."""
        return self.steps.heard_at

    @property
    def is_behind(self) -> bool:
        """Whether there may be more steps or notes than could be read."""
        return self.follower.is_behind

    def catch_up(self, *, is_end: bool = False) -> None:
        """Pass on what is new."""
        self.follower.catch_up()
        self.log.catch_up(is_end=is_end)
