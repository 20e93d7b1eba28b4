"""Note that Ray has killed a worker for its memory, as neither the worker nor the kernel can.

Ray watches the memory of each node, and kills what took most before the kernel would; the kernel
counts none of it (`training.killed`). Ray Train then starts the workers again, who would ask for as
much as before. Its controller tells of it here first, so they find it in the history, and make
passes of half as many rows.
"""

from contextlib import suppress
from typing import Any

from ray.train.v2.api.callback import UserCallback

from qlora_core.artifacts import Incident
from qlora_core.backends.ray_worker import WorkerOrder
from qlora_core.errors import StoreError
from qlora_core.training.incidents import note

_WORDS = ("OutOfMemoryError", "running low on memory")


def is_killed(error: BaseException) -> bool:
    """Say whether Ray says that it has killed a process for its memory."""
    return any(words in f"{type(error).__name__}: {error}" for words in _WORDS)


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
