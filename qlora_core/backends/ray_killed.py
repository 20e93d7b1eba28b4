"""Note that Ray has killed a worker for its memory, as neither the worker nor the kernel can.

Ray watches the memory of each node, and kills what took most before the kernel would; the kernel
counts none of it (`training.killed`). Ray Train then starts the workers again, who would ask for as
much as before. Its controller tells of it here first, so they find it in the history, and make
passes of half as many rows.
"""

from contextlib import suppress
from typing import Any

from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.train.v2.api.callback import UserCallback

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


class KillsNoted(UserCallback):  # type: ignore[misc]  # Ray says nothing of its types
    """Puts them into the history of the training.

    Args:
        order: What the workers do.
    """

    def __init__(self, order: WorkerOrder) -> None:
        self._order = order

    def after_exception(
        self,
        run_context: Any,  # noqa: ARG002  # Ray's signature
        worker_exceptions: dict[int, Exception],
    ) -> None:
        """Look at what workers have ended with."""
        killed = [rank for rank, error in worker_exceptions.items() if is_killed(error)]
        if not killed:
            return
        spec = self._order.awaited()
        incident = Incident(
            kind="out_of_memory",
            what=f"Ray killed worker {killed[0]} for the memory it took.",
            remedy="Passes of half as many rows, from the last snapshot.",
            launch=spec.launch,
        )
        with suppress(StoreError):  # no room: workers will say so
            note(spec.job.scratch, incident)
