"""What one fault, let loose once, has come to; and the checks that all faults share."""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from qlora_core.artifacts import AdapterCheckpoint
from qlora_core.ports import StepMetrics, TrainJob
from qlora_core.training.desk import SUMMARY_FILE
from qlora_core.training.journal import CURVE_FILE, read_curve

TOLERANCE = 1e-4
"""Of losses with another number of workers, as sums are added in another order."""


class CannotBreakError(Exception):
    """This machine does not let us break that: rights or a program are missing."""


@dataclass(frozen=True)
class Trial:
    """One fault, once."""

    problems: tuple[str, ...]
    """What should hold and did not."""
    recovery_s: float | None = None
    """How long nothing new was done, from the fault on."""
    steps_lost: int | None = None
    """Steps that had been done and had to be done again."""
    remarks: tuple[str, ...] = ()

    @property
    def has_held(self) -> bool:
        """Whether all held that should."""
        return not self.problems


@dataclass
class Watch:
    """Is told of every step; breaks something at one of them, and notes when steps came.

    Args:
        at_step: When to break it; the fault may come some steps later, as steps are told in lots.
        breaks: What to do then.
    """

    at_step: int
    breaks: Callable[[], None]
    told: list[tuple[int, float]] = field(default_factory=list, init=False)
    """Steps, and when each was told [s], since the command was last given."""
    first_told: dict[int, float] = field(default_factory=dict, init=False)
    """When each step was told for the first time [s]."""
    broken_at: float | None = field(default=None, init=False)

    def __call__(self, metrics: StepMetrics) -> None:
        now = time.monotonic()
        self.told.append((metrics.step, now))
        self.first_told.setdefault(metrics.step, now)
        if metrics.step >= self.at_step and self.broken_at is None:
            self.broken_at = time.monotonic()
            self.breaks()

    def silence(self) -> tuple[float, int]:
        """Return the longest time without a new step from the fault on [s], and the step before."""
        assert self.broken_at is not None, "training was over before the fault"
        pairs = itertools.pairwise(sorted(self.first_told))
        gaps = (
            (self.first_told[step] - max(self.first_told[before], self.broken_at), before)
            for before, step in pairs
        )
        return max(gaps, default=(0.0, 0))


def summary(job: TrainJob) -> AdapterCheckpoint:
    """Return what a finished training says of itself."""
    text = (job.scratch / SUMMARY_FILE).read_text("utf-8")
    return AdapterCheckpoint.model_validate_json(text)


def lost_steps(job: TrainJob, last_done: int) -> int:
    """Return how many steps were done again when training went on after ``last_done``."""
    starts = [step for step in summary(job).resumed_at if step <= last_done]
    return last_done - max(starts) if starts else 0


def curve_problems(job: TrainJob, undisturbed: Path, *, exactly: bool) -> Iterator[str]:
    """Compare what a training has left with what the undisturbed one left in ``undisturbed``."""
    if exactly:
        for name in (CURVE_FILE, "adapter_model.safetensors"):
            if (job.out / name).read_bytes() != (undisturbed / name).read_bytes():
                yield f"{name} has other bytes than the undisturbed training's"
        return
    ours, theirs = read_curve(job.out), read_curve(undisturbed)
    if len(ours) != len(theirs):
        yield f"{len(ours)} steps instead of {len(theirs)}"
    off = max(abs(a.loss / b.loss - 1) for a, b in zip(ours, theirs, strict=False))
    if off > TOLERANCE:
        yield f"losses are off by {off:.1e} of themselves, more than {TOLERANCE:.0e}"


def told_problems(told: Sequence[tuple[int, float]], num_steps: int) -> Iterator[str]:
    """Check that each step was told once and in order."""
    if [step for step, _ in told] != list(range(1, num_steps + 1)):
        yield f"steps told: {json.dumps([step for step, _ in told])}, not 1 to {num_steps}"


def loss_problems(steps_lost: int, interval: int) -> Iterator[str]:
    """Check that at most one snapshot interval had to be done again."""
    if steps_lost > interval:
        yield f"{steps_lost} steps were lost, with a snapshot every {interval}"


def random_step(random: Random, num_steps: int) -> int:
    """Return when to break something: after the first snapshot, and well before the end."""
    return random.randint(num_steps // 10, num_steps // 2)
