"""Let faults loose one after the other, and count what they have come to."""

import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from tests.chaos.family import family
from tests.chaos.faults import Fault
from tests.chaos.place import Place
from tests.chaos.trial import CannotBreakError, Trial


@dataclass(frozen=True)
class Row:
    """One fault's line in the table."""

    fault: str
    what: str
    trials: tuple[Trial, ...]
    seconds: float
    skipped: str = ""
    """Why it could not be tried here."""

    @property
    def num_held(self) -> int:
        """Trials in which all held that should."""
        return sum(trial.has_held for trial in self.trials)

    @property
    def recovery_s(self) -> list[float]:
        """Of the trials that have one."""
        return [trial.recovery_s for trial in self.trials if trial.recovery_s is not None]

    @property
    def worst_loss(self) -> int | None:
        """Steps that had to be done again, at most."""
        lost = [trial.steps_lost for trial in self.trials if trial.steps_lost is not None]
        return max(lost, default=None)


def let_loose(fault: Fault, place: Place, times: int, seed: int, say: Callable[[str], None]) -> Row:
    """Break something ``times`` times, each time in another way, as the seed has it."""
    begun, trials = time.monotonic(), []
    fault.prepare(place)
    for number in range(1, times + 1):
        try:
            trials.append(one_trial(fault, place, seed + number))
        except CannotBreakError as error:
            return Row(fault.name, fault.what, (), time.monotonic() - begun, str(error))
        said = "held" if trials[-1].has_held else "DID NOT HOLD: " + "; ".join(trials[-1].problems)
        say(f"{fault.name} {number}/{times}: {said}")
    return Row(fault.name, fault.what, tuple(trials), time.monotonic() - begun)


def one_trial(fault: Fault, place: Place, seed: int) -> Trial:
    """Break something once; nothing of it may still run half a minute later.

    Raises:
        CannotBreakError: It cannot be broken here.
    """
    with family() as ours:
        try:
            trial = fault.breaks(place, Random(f"{fault.name} {seed}"))
        except CannotBreakError:
            raise
        except Exception as error:
            last = traceback.format_exception(error)[-1].strip()
            trial = Trial((f"ended with {last}",))
        left = tuple(ours.left_over())
    return Trial((*trial.problems, *left), trial.recovery_s, trial.steps_lost, trial.remarks)


def table(rows: Sequence[Row]) -> str:
    """Return the table, filled in, as Markdown."""
    return "\n".join(_lines(rows))


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    yield "| fault | times | held | recovery: median | worst [s] | steps lost: worst |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in rows:
        yield "| " + " | ".join(_cells(row)) + " |"


def _cells(row: Row) -> list[str]:
    if row.skipped:
        return [row.what, "0", f"skipped: {row.skipped}", "", "", ""]
    seconds = row.recovery_s
    return [
        row.what,
        str(len(row.trials)),
        f"{row.num_held}/{len(row.trials)}",
        f"{statistics.median(seconds):.1f}" if seconds else "",
        f"{max(seconds):.1f}" if seconds else "",
        "" if row.worst_loss is None else str(row.worst_loss),
    ]
