"""Tell faults of a training apart, and say what is done about each: bounded, and written down.

The launcher asks here about whatever ended a driver. What Ray mends by itself (a lost worker, a
failed collective) does not come here; the workers note it when they start again. Errors that only
a person can mend go straight through.

Bounds: a loss that is not finite is tried once more after the same step, and three times in all; a
cluster without room, or without a head, is asked three times more after each step that it got to;
passes are halved until they have one row (the workers say when). Where training gets on in between,
trouble begins to count anew: a store that cannot be used gets as many tries as there are pauses,
drivers may be lost ``max_failures`` times, and where Ray has given up on workers it is asked again.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from qlora_core.artifacts import Incident, IncidentKind
from qlora_core.errors import (
    HeadLostError,
    KilledError,
    LaunchError,
    LaunchLostError,
    NoRoomError,
    NotFiniteError,
    QLoraError,
    StoreAwayError,
    StoreError,
    WorkersLostError,
    storing,
)
from qlora_core.training.attempt import read_record
from qlora_core.training.incidents import count, ended_with, note
from qlora_core.training.snapshot import newest_step

PAUSES_S = (5.0, 20.0, 60.0)
"""Before each further try to write to a store that is full, say [seconds]."""
_MOST_NOT_FINITE = 3
_MOST_WITHOUT_ROOM = 3
_ROOM_PAUSE_S = 30.0  # a driver has waited for minutes already


class LostDriverError(LaunchError):
    """The driver process ended without an answer."""


@dataclass
class _Streak:
    """How often something has happened since training last got on.

    It has got on when there is a later snapshot: steps that are in none have to be done again, so
    they may come a little farther each time for nothing.
    """

    scratch: Path
    num: int = 0
    _is_fresh: bool = field(default=False, init=False)
    """Whether training may have got on before the last time, as nobody could look since."""
    _reached: int | None = field(init=False)
    """The newest snapshot that was seen, by its step; none: the store could not be read yet."""

    def __post_init__(self) -> None:
        self._reached = self._now()

    def look(self) -> None:
        """Count anew if training has got on."""
        now, before = self._now(), self._reached
        if now is None:
            return
        if before is not None and now > before:
            self.num = int(self._is_fresh)
        self._reached, self._is_fresh = max(now, before or 0), False

    def one_more(self) -> int:
        """Return how often it has happened, now included."""
        self.num, self._is_fresh = self.num + 1, True
        self.look()
        return self.num

    def _now(self) -> int | None:
        try:
            with storing(self.scratch, "read"):
                return max([newest_step(self.scratch), *read_record(self.scratch).started_after])
        except StoreError:
            return None


@dataclass
class Triage:
    """One call's remedies; what the history holds of earlier calls counts where it says so."""

    scratch: Path
    max_failures: int
    pauses_s: tuple[float, ...] = PAUSES_S
    _lost: _Streak = field(init=False)
    _away: _Streak = field(init=False)
    _given_up: _Streak = field(init=False)

    def __post_init__(self) -> None:
        self._lost, self._away = _Streak(self.scratch), _Streak(self.scratch)
        self._given_up = _Streak(self.scratch, num=1)  # nothing gained yet is as good as once

    def look(self) -> None:
        """Look how far training has come; to be called before each launch.

        When something has ended a launch the store may be out of reach, and be back by now.
        """
        for streak in (self._lost, self._away, self._given_up):
            streak.look()

    def remedy(self, error: QLoraError, step: int | None, launch: str) -> tuple[Incident, float]:
        """Return what is done about ``error``, and how long to wait before [seconds].

        Args:
            error: What ended the driver of ``launch``.
            step: The last step that is known to be done.
            launch: Its name.

        Raises:
            QLoraError: ``error``, for which there is no remedy, or none left.
        """
        incident, pause_s = self._found(error, step)
        told = incident.model_copy(update={"step": step, "launch": launch})
        with suppress(StoreError):  # no room for the history, perhaps; the person is told
            if not self._is_noted(told):
                note(self.scratch, told)
        return told, pause_s

    def _is_noted(self, told: Incident) -> bool:
        """Say whether it is a kill that Ray Train's controller has noted (`ray_killed`)."""
        return told.kind == "out_of_memory" and ended_with(self.scratch, told.kind, told.launch)

    def _found(self, error: QLoraError, step: int | None) -> tuple[Incident, float]:
        match error:
            case NotFiniteError():
                return self._once_more(error, step), 0.0
            case StoreAwayError():
                return self._later(error)
            case KilledError():
                return self._smaller(error), 0.0
            case LostDriverError():
                return self._again(error), 0.0
            case LaunchLostError():
                return self._launch_again(error), 0.0
            case WorkersLostError():
                return self._anew(error), 0.0
            case NoRoomError():
                return self._wait(error, step, "no_room"), _ROOM_PAUSE_S
            case HeadLostError():
                return self._wait(error, step, "lost_head"), _ROOM_PAUSE_S
            case _:
                raise error

    def _once_more(self, error: NotFiniteError, step: int | None) -> Incident:
        num_here = count(self.scratch, "not_finite", step)
        if num_here or count(self.scratch, "not_finite") >= _MOST_NOT_FINITE:
            again = "It came back" if num_here else "It came back again and again"
            why = f"{error.why} {again} after going on from the last snapshot."
            raise NotFiniteError(error.what, why=why, fix=error.fix)
        remedy = "Trying once more from the last snapshot."
        return Incident(kind="not_finite", what=error.what, remedy=remedy)

    def _later(self, error: StoreAwayError) -> tuple[Incident, float]:
        num_tries = self._away.one_more()
        if num_tries > len(self.pauses_s):
            raise error
        pause_s = self.pauses_s[num_tries - 1]
        remedy = f"Earlier snapshots are intact; trying again in {pause_s:g} s."
        return Incident(kind="storage", what=error.what, remedy=remedy), pause_s

    def _smaller(self, error: KilledError) -> Incident:
        self._lose(error, self.max_failures)
        remedy = "Passes of half as many rows, from the last snapshot."
        return Incident(kind="out_of_memory", what=error.what, remedy=remedy)

    def _again(self, error: LostDriverError) -> Incident:
        self._lose(error, self.max_failures)
        remedy = "Starting again from the last snapshot."
        return Incident(kind="lost_driver", what="Ray's driver process was lost.", remedy=remedy)

    def _launch_again(self, error: LaunchLostError) -> Incident:
        self._lose(error, self.max_failures if self._has_trained() else min(1, self.max_failures))
        remedy = "Starting again from the last snapshot."
        return Incident(kind="lost_launch", what=error.what, remedy=remedy)

    def _has_trained(self) -> bool:
        """Say whether workers have ever met: if not, it may be a firewall that keeps them apart."""
        try:
            return bool(read_record(self.scratch).started_after)
        except StoreError:
            return True

    def _anew(self, error: WorkersLostError) -> Incident:
        if self._given_up.one_more() > 1:
            raise error
        remedy = "Training got on in between: starting again from the last snapshot."
        return Incident(kind="ray_gave_up", what=error.what, remedy=remedy)

    def _wait(self, error: LaunchError, step: int | None, kind: IncidentKind) -> Incident:
        if count(self.scratch, kind, step) >= _MOST_WITHOUT_ROOM:
            raise error
        remedy = f"Asking again in {_ROOM_PAUSE_S:g} s, from the last snapshot."
        return Incident(kind=kind, what=error.what, remedy=remedy)

    def _lose(self, error: LaunchError, most: int) -> None:
        if self._lost.one_more() > most:
            raise error
