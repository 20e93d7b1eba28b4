"""Wait for places for workers, but not for ever, and not without a word.

With a range of workers, Ray Train counts the places of the cluster before it asks for any, and
while they are fewer than the range's least it does nothing: no failure, no bound, no word. Its
controller tells here what state it is in, again and again; what is raised here ends the launch.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback

from qlora_core.backends.ray_worker import WorkerOrder
from qlora_core.config import ClusterConfig
from qlora_core.errors import NoRoomError, StoreError
from qlora_core.training.journal import add_notes

_WITHOUT_WORKERS = ("InitializingState", "SchedulingState", "ReschedulingState", "RestartingState")
_WORTH_A_WORD_S = 30.0  # a group of workers that starts anew takes less


class PlacesAwaited(ControllerCallback):  # type: ignore[misc]  # Ray says nothing of its types
    """Bounds how long there are no workers at a stretch.

    Args:
        cluster: How many workers are wanted.
        order: What they do.
        patience_s: How long there may be none [seconds].
        clock: Tells the time [seconds].
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        order: WorkerOrder,
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster, self._order, self._patience_s = cluster, order, patience_s
        self._clock = clock
        self._since: float | None = None
        self._is_told = False

    def after_controller_state_update(
        self,
        previous_state: Any,  # noqa: ARG002  # Ray's signature
        current_state: Any,
    ) -> None:
        """Look at what the controller does now.

        Raises:
            NoRoomError: There were no workers for too long.
        """
        if type(current_state).__name__ not in _WITHOUT_WORKERS:
            self._since, self._is_told = None, False
            return
        now = self._clock()
        self._since = now if self._since is None else self._since
        if now - self._since >= self._patience_s:
            raise NoRoomError(
                f"{self._wanted()} have found no places for {self._patience_s:g} s.",
                why="Nodes are missing, or others use them.",
                fix="Add a node, or lower the least number of cluster.workers; then run again to "
                "go on from the last snapshot.",
            )
        if now - self._since >= _WORTH_A_WORD_S and not self._is_told:
            self._is_told = True
            self._tell()

    def _wanted(self) -> str:
        return f"{self._cluster.min_workers} workers, the least that cluster.workers asks for,"

    def _tell(self) -> None:
        spec = self._order.awaited()
        note = (
            f"For {_WORTH_A_WORD_S:g} s there have been no workers: nodes were lost, or have no "
            f"places for {self._cluster.min_workers}, the least that cluster.workers asks for. "
            f"Waiting up to {self._patience_s:g} s."
        )
        with suppress(StoreError):  # no room: workers will say so
            add_notes(spec.job.scratch, [note])
