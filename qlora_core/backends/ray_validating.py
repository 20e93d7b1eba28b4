"""Measure snapshots beside training, on a worker more of the same Ray.

Ray Train can validate on the side, too, but only checkpoints that all workers report at one step,
which is a barrier, and that it keeps a register of. Our snapshots are rank 0's alone, come by the
clock, and are nobody else's business; so the driver looks for new ones itself, and a worker that no
training waits for measures the newest. What came in between, or is not done when training ends, is
left out and counted: the adapter that comes of it is evaluated anyway.

Every driver loads this module, so what takes seconds to import is imported where it is used.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from qlora_core.backends.ray_worker import RaySpec
from qlora_core.ports import TrainJob
from qlora_core.training.journal import VALIDATIONS_FILE, Validation

_POLL_S = 0.5
_MAX_LOST = 3  # workers that measure; training does without them


class SnapshotJudge:
    """A worker that measures snapshots.

    Args:
        job: A `TrainJob` in JSON.
        num_threads: The cores it owns.
        offloads_base: As `cluster.offload_base`.
    """

    def __init__(self, job: str, num_threads: int, *, offloads_base: bool) -> None:
        import torch

        from qlora_core.training.validating import open_validator

        torch.set_num_threads(num_threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        parsed = TrainJob.model_validate_json(job)
        self._open = open_validator(parsed, device, offloads_base=offloads_base)
        self._validate = self._open.__enter__()

    def measure(self, folder: str) -> str:
        """Return the `Validation` of a snapshot, in JSON."""
        return self._validate(Path(folder)).model_dump_json()


@contextmanager
def validated_beside(
    wait_for_spec: Callable[[], RaySpec],
    cpus: int,
    gpus: float,
    *,
    is_own_ray: bool,
    has_room: bool,
) -> Iterator[None]:
    """Measure what is saved within the block, if the recipe asks for it.

    Args:
        wait_for_spec: Returns the training when it is known.
        cpus: Of a worker.
        gpus: Of a worker.
        is_own_ray: Nobody else is on this Ray: the worker more shares the training's cores.
        has_room: There is room for a worker more.
    """
    beside = _Beside(wait_for_spec, cpus, gpus, is_own_ray=is_own_ray, has_room=has_room)
    beside.start()
    try:
        yield
    finally:
        beside.end()


class _Beside(threading.Thread):
    def __init__(
        self,
        wait_for_spec: Callable[[], RaySpec],
        cpus: int,
        gpus: float,
        *,
        is_own_ray: bool,
        has_room: bool,
    ) -> None:
        super().__init__(daemon=True)
        self._wait_for_spec, self._has_room = wait_for_spec, has_room
        self._cpus, self._gpus, self._booked = cpus, gpus, 0 if is_own_ray else cpus
        self._over = threading.Event()
        self._spec: RaySpec | None = None
        self._measured: set[int] = set()
        self._seen: set[int] = set()

    def run(self) -> None:
        """Look for snapshots until training is over."""
        spec = self._wait_for_spec()
        if not spec.snapshots.validate_beside:
            return
        self._spec = spec
        self._measured = _measured_steps(spec.job.scratch / VALIDATIONS_FILE)
        if not self._has_room:
            self._tell(0, "snapshots.validate_beside: no room for a worker more; none is measured.")
            return
        num_lost = 0
        while not self._over.is_set() and num_lost <= _MAX_LOST:
            try:
                self._measure_new_ones(spec)
            except RayActorError:
                num_lost += 1
            except RayError as error:
                first_line = str(error).strip().splitlines()[-1]
                self._tell(0, f"Snapshots are not measured any more: {first_line[:300]}")
                return
        if num_lost > _MAX_LOST:
            self._tell(0, f"Snapshots are not measured any more: {num_lost} workers were lost.")

    def end(self) -> None:
        """Measure no more; say what was left out."""
        self._over.set()
        if self._spec is None or not self._has_room:
            return
        self.join(timeout=10 * _POLL_S)
        self._newest(self._spec.job.scratch)
        if left := self._seen - self._measured:
            self._tell(
                max(left),
                f"{len(left)} snapshots were not measured beside training: newer ones came first, "
                "or training was over.",
            )

    def _measure_new_ones(self, spec: RaySpec) -> None:
        actor: Any = ray.remote(SnapshotJudge)
        judge = actor.options(num_cpus=self._booked, num_gpus=self._gpus).remote(
            spec.job.model_dump_json(), self._cpus, offloads_base=spec.cluster.offload_base
        )
        try:
            while not self._over.wait(_POLL_S):
                folder = self._newest(spec.job.scratch)
                if folder is not None:
                    self._measure(judge, folder)
        finally:
            ray.kill(judge)

    def _newest(self, scratch: Path) -> Path | None:
        """Take note of all snapshots; return the newest if it was not measured yet."""
        from qlora_core.training.snapshot import FOLDER, snapshots_in, step_of

        folders = snapshots_in(scratch / FOLDER)
        self._seen |= {step_of(folder) for folder in folders}
        if not folders or step_of(folders[0]) in self._measured:
            return None
        return folders[0]

    def _measure(self, judge: Any, folder: Path) -> None:
        asked = judge.measure.remote(str(folder))
        while not self._over.is_set():
            with suppress(GetTimeoutError):
                found = Validation.model_validate_json(ray.get(asked, timeout=_POLL_S))
                self._write(found)
                self._measured.add(found.step)
                return

    def _tell(self, step: int, note: str) -> None:
        self._write(Validation(step=step, note=note))

    def _write(self, validation: Validation) -> None:
        assert self._spec is not None  # noqa: S101  # there is one by now
        path = self._spec.job.scratch / VALIDATIONS_FILE
        with suppress(OSError), path.open("a", encoding="utf-8") as file:  # no room: training's say
            file.write(validation.model_dump_json() + "\n")


def _measured_steps(file: Path) -> set[int]:
    if not file.exists():
        return set()
    lines = (Validation.model_validate_json(line) for line in file.read_text("utf-8").splitlines())
    return {line.step for line in lines if line.heldout_loss is not None}
