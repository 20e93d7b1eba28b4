"""Measure snapshots beside training, on a worker more of the same Ray.

Ray Train can validate on the side, too, but only checkpoints that all workers report at one step,
which is a barrier, and that it keeps a register of. Our snapshots are rank 0's alone, come by the
clock, and are nobody else's business; so the driver looks for new ones itself, and a worker that no
training waits for measures the newest. What came in between, or is not done when training ends, is
left out and counted: the adapter that comes of it is evaluated anyway.

Nodes come and go, and workers are started anew, so whether there is room for that worker is asked
again with each poll: it is killed when there is none, or those that train wait for their places,
and another one begun when that is over.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from ray.exceptions import RayActorError

from qlora_core.backends.ray_worker import RaySpec
from qlora_core.errors import LaunchError, QLoraError, StoreError, storing
from qlora_core.ports import TrainJob
from qlora_core.training.journal import (
    VALIDATIONS_FILE,
    Patience,
    Validation,
    add_validation,
    read_validations,
)

_POLL_S = 1.0
_END_S = 5.0
_MAX_LOST = 3  # workers that measure; training does without them


class Judge(Protocol):
    """Measures one snapshot at a time: a `HiredJudge`."""

    def ask(self, folder: Path) -> None:
        """Begin to measure a snapshot."""

    def answer(self) -> Validation | None:
        """Return what was found; None: it is not done. RayActorError: the judge is lost."""

    def end(self) -> None:
        """Give back at once what is booked."""


class Place(Protocol):
    """Where a judge may be: a `WorkerMore`."""

    @property
    def num_wanted(self) -> int:
        """Workers that there must be room for."""

    def has_room(self) -> bool:
        """Say whether there is room now beside all that train."""

    def is_unused(self) -> bool:
        """Say whether nobody uses that place now."""

    def is_training_placed(self) -> bool:
        """Say whether all that train have their places now."""

    def hire(self, job: TrainJob) -> Judge:
        """Book a judge for the snapshots of ``job``."""


@contextmanager
def validated_beside(wait_for_spec: Callable[[], RaySpec], place: Place) -> Iterator[None]:
    """Measure what is saved within the block, if the recipe asks for it.

    Args:
        wait_for_spec: Returns the training when it is known.
        place: Where to measure.
    """
    beside = _Beside(wait_for_spec, place)
    beside.start()
    try:
        yield
    finally:
        beside.end()


class _Beside(threading.Thread):
    def __init__(self, wait_for_spec: Callable[[], RaySpec], place: Place) -> None:
        super().__init__(daemon=True)
        self._wait_for_spec, self._place = wait_for_spec, place
        self._over = threading.Event()
        self._measuring: Measuring | None = None

    def run(self) -> None:
        """Look for snapshots until training is over; whatever happens, training does without."""
        spec = self._wait_for_spec()
        if not spec.snapshots.validate_beside:
            return
        self._measuring = measuring = Measuring(spec.job, self._place)
        try:
            measuring.begin()
            while not self._over.is_set():
                measuring.poll()
                self._over.wait(_POLL_S)
        except Exception as error:  # a dying Ray fails with anything
            measuring.tell(f"Snapshots are not measured any more: {_reason(error)}")
        finally:
            with suppress(Exception):  # as above, and a Ray that is gone holds nothing
                measuring.dismiss()

    def end(self) -> None:
        """Measure no more; say what was left out."""
        self._over.set()
        if self._measuring is None:
            return
        self.join(timeout=_END_S)
        with suppress(StoreError):  # training's say
            self._measuring.tell_left_out()


class Measuring:
    """Has the newest snapshot measured, by a judge that is there only while there is room.

    Args:
        job: Whose snapshots are measured.
        place: Where a judge may be.
    """

    def __init__(self, job: TrainJob, place: Place) -> None:
        self._job, self._place = job, place
        self._judge: Judge | None = None
        self._is_asked = False
        self._num_lost = 0
        self._looks = Patience()
        self._measured: set[int] = set()
        self._seen: set[int] = set()

    def begin(self) -> None:
        """Learn what was measured before; say so if there is no room yet."""
        file = self._job.scratch / VALIDATIONS_FILE
        self._measured = self._looks.look(lambda: _measured_steps(file)) or set()
        if not self._place.has_room():
            self.tell(
                "snapshots.validate_beside: there is no room for a worker more; snapshots are "
                f"measured as soon as there is room for {self._place.num_wanted} workers."
            )

    def poll(self) -> None:
        """Look at the room, the snapshots and the judge; wait for none of them.

        Raises:
            LaunchError: Judges were lost too often.
            Exception: What a judge met, or Ray.
        """
        if not (self._place.has_room() and self._place.is_training_placed()):
            self.dismiss()
        elif self._judge is None and self._place.is_unused():
            self._judge = self._place.hire(self._job)
        newest = self._newest()
        if self._judge is None:
            return
        try:
            self._ask_on(self._judge, newest)
        except RayActorError:
            self._lose()

    def dismiss(self) -> None:
        """Have no judge; the next one is asked again for what this one has not answered."""
        judge, self._judge, self._is_asked = self._judge, None, False
        if judge is not None:
            judge.end()

    def tell(self, note: str, step: int = 0) -> None:
        """Say something to the person who watches."""
        self._write(Validation(step=step, note=note))

    def tell_left_out(self) -> None:
        """Say how many snapshots were not measured."""
        self._newest()
        if left := self._seen - self._measured:
            self.tell(
                f"{len(left)} snapshots were not measured beside training: newer ones came first, "
                "there was no room, or training was over.",
                max(left),
            )

    def _ask_on(self, judge: Judge, newest: Path | None) -> None:
        from qlora_core.training.snapshot import step_of

        if self._is_asked and (found := judge.answer()) is not None:
            self._write(found)
            self._measured.add(found.step)
            self._is_asked = False
        if not self._is_asked and newest is not None and step_of(newest) not in self._measured:
            judge.ask(newest)
            self._is_asked = True

    def _lose(self) -> None:
        self._num_lost += 1
        self.dismiss()
        if self._num_lost > _MAX_LOST:
            raise LaunchError(f"{self._num_lost} workers were lost.")

    def _newest(self) -> Path | None:
        """Take note of all snapshots; return the newest."""
        from qlora_core.training.snapshot import FOLDER, snapshots_in, step_of

        root = self._job.scratch / FOLDER

        def look() -> list[Path]:
            with storing(root, "read"):
                return snapshots_in(root)

        folders = self._looks.look(look) or []
        self._seen |= {step_of(folder) for folder in folders}
        return folders[0] if folders else None

    def _write(self, validation: Validation) -> None:
        with suppress(StoreError):  # training's say
            add_validation(self._job.scratch, validation)


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error  # Ray wraps it with its traceback
    said = " ".join(str(cause).split())[:300]
    return said if isinstance(cause, QLoraError) else f"{type(cause).__name__}: {said}"


def _measured_steps(file: Path) -> set[int]:
    with storing(file, "read"):
        if not file.exists():
            return set()
        found = read_validations(file.read_text("utf-8", errors="replace").splitlines())
    return {each.step for each in found if each.heldout_loss is not None}
