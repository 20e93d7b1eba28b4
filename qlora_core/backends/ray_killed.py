"""Note that Ray has killed a worker for its memory, as neither the worker nor the kernel can.

Ray watches the memory of each node, and kills what took most before the kernel would; the kernel
counts none of it (`training.killed`). Ray Train then starts the workers again, who would ask for as
much as before. Its controller tells of it here first, so they find it in the history, and make
passes of half as many rows.
"""

from contextlib import suppress
from typing import Any

from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from qlora_core.artifacts import Incident
from qlora_core.backends.ray_worker import WorkerOrder
from qlora_core.errors import StoreError
from qlora_core.training.incidents import note

_WORDS = "running low on memory"


def causes(error: BaseException) -> list[BaseException]:
    """Return what Ray has wrapped into ``error``: what each worker or the controller met."""
    failures = [*getattr(error, "worker_failures", {}).values()]
    failures += filter(None, [getattr(error, "controller_failure", None)])
    return [_unwrapped(failure) for failure in failures or [error]]


def is_killed(error: BaseException) -> bool:
    """Say whether Ray says that it has killed a process for its memory.

    A traceback is not looked at: that of a GPU out of memory reads much the same.
    """
    return any(_is_kill(cause) for cause in causes(error))


def _is_kill(cause: BaseException) -> bool:
    if isinstance(cause, OutOfMemoryError):  # of Ray's; torch has one of that name
        return True
    words = str(cause).strip()  # of a lost actor, Ray's alone; of all else, maybe a traceback
    said = words if isinstance(cause, RayActorError) else words.partition("\n")[0]
    return isinstance(cause, RayError) and _WORDS in said


def _unwrapped(failure: BaseException) -> BaseException:
    """Return what a worker or a task raised, or what a worker's health check met."""
    inner = getattr(failure, "_base_exc", None) or getattr(failure, "health_check_failure", None)
    if isinstance(failure, RayTaskError):  # is of its cause's class as well, in parts
        inner = failure.cause
    return _unwrapped(inner) if inner is not None else failure


class KillsNoted(WorkerGroupCallback):  # type: ignore[misc]  # Ray says nothing of its types
    """Puts them into the history of the training, once for each group of workers.

    A group may be polled for a minute after the kill, while one of its nodes is being taken away.

    Args:
        order: What the workers do.
    """

    def __init__(self, order: WorkerOrder) -> None:
        self._order = order
        self._is_noted = False

    def before_worker_group_start(self, worker_group_context: Any) -> None:  # noqa: ARG002  # Ray's
        """Look for a kill among new workers."""
        self._is_noted = False

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Look at what workers have ended with."""
        met = worker_group_status.errors.items()
        killed = [rank for rank, error in met if is_killed(error)]
        if self._is_noted or not killed:
            return
        self._is_noted = True
        spec = self._order.awaited()
        incident = Incident(
            kind="out_of_memory",
            what=f"Ray killed worker {killed[0]} for the memory it took.",
            remedy="Passes of half as many rows, from the last snapshot.",
            launch=spec.launch,
        )
        with suppress(StoreError):  # no room: workers will say so
            note(spec.job.scratch, incident)
