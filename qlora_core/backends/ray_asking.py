"""Share the batches of an evaluation among Ray workers, from the driver's side.

A worker that is free gets the next batch, so that slow and late ones hold up nobody. When one is
lost, or its GPU or its view of the store, its batch goes back to the front, and another worker is
asked for; where there is no room for it, the others go on without. Replies are kept in the store as
they come, so a driver that is started again asks only for what is missing.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray.exceptions import RayError

from qlora_core.backends.ray_asker import Asker, AskSpec, Said
from qlora_core.backends.replies import Replies
from qlora_core.config import ClusterConfig
from qlora_core.errors import DeviceError, LaunchError, StoreAwayError, from_json
from qlora_core.ports import Batch


def ask_on_cluster(cluster: ClusterConfig, spec: AskSpec, cpus: int, gpus: float) -> None:
    """Have every batch replied to; the replies are in the spec's file then.

    Args:
        cluster: Says how many workers, and how many of them may be lost.
        spec: What to ask.
        cpus: Of a worker.
        gpus: Of a worker.

    Raises:
        LaunchError: Workers were lost more often than `cluster.max_failures`, or replies were.
        StoreError: There is no room for replies, say.
        QLoraError: What a worker met.
    """
    worker = ray.remote(Asker).options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy="SPREAD")
    text = spec.model_dump_json()
    crew = _Crew(lambda: worker.remote(text, cpus, gpus), Replies(spec.replies_file), cluster, spec)
    crew.work()


class _Crew:
    """Workers, each of them loading, asking or idle, and the batches that are left.

    Args:
        hire: Asks Ray for one more worker; it comes when there is room.
        replies: Where replies are kept.
        cluster: How many workers, and how many may be lost.
        spec: For its log.
    """

    def __init__(
        self, hire: Callable[[], Any], replies: Replies, cluster: ClusterConfig, spec: AskSpec
    ) -> None:
        self._hire, self._replies, self._cluster, self._spec = hire, replies, cluster, spec
        self._calls: dict[Any, tuple[Any, Batch | None]] = {}
        """What each worker was asked; None: to load the model."""
        self._idle: list[Any] = []
        self._left: deque[Batch] | None = None
        """None until the first worker has loaded the model, and so can tell."""
        self._num_lost = 0

    def work(self) -> None:
        """Return when every batch is replied to.

        Raises:
            LaunchError: Workers were lost too often, or replies.
            QLoraError: What a worker met.
        """
        for _ in range(self._cluster.max_workers):
            self._send_for_one()
        while self._left is None or self._left or any(b for _, b in self._calls.values()):
            (call,), _ = ray.wait(list(self._calls), num_returns=1)
            self._hear(call)
        if not self._replies.are_whole:
            raise LaunchError(
                f"Replies that were written to {self._spec.replies_file} are not there.",
                why="Another driver of this evaluation seems to write there, too: one whose flow "
                "was killed, or another run of the recipe.",
                fix="Run again when it has ended (`ray job list`): what was answered is kept.",
            )

    def _send_for_one(self) -> None:
        worker = self._hire()
        self._calls[worker.prepare.remote()] = worker, None

    def _hear(self, call: Any) -> None:
        worker, batch = self._calls.pop(call)
        try:
            said = Said.model_validate_json(ray.get(call))
        except RayError as error:
            self._replace(worker, batch, error)
            return
        if said.error is not None:
            met = from_json(said.error)
            if not isinstance(met, DeviceError | StoreAwayError):
                raise met
            self._replace(worker, batch, met)
            return
        if said.reply is not None:
            self._replies.keep(said.reply)
        if self._left is None:
            self._learn(said.batches)
        self._idle.append(worker)
        self._share_out()

    def _learn(self, batches: Iterable[Batch]) -> None:
        self._left = deque(batch for batch in batches if batch not in self._replies)

    def _share_out(self) -> None:
        while self._idle and self._left:
            worker, batch = self._idle.pop(0), self._left.popleft()
            self._calls[worker.ask.remote(batch.model_dump_json())] = worker, batch

    def _replace(self, worker: Any, batch: Batch | None, error: Exception) -> None:
        """Give a lost worker's batch to another one, and ask Ray for a new worker.

        One that failed by itself is killed: neither a GPU nor a mount comes back in its process.

        Raises:
            LaunchError: Too many were lost.
        """
        self._num_lost += 1
        first_line = str(error).strip().partition("\n")[0]
        reason = f"{type(error).__name__}: {first_line}"
        print(f"A worker is lost to this evaluation: {reason}", flush=True)  # noqa: T201  # the log
        if self._num_lost > self._cluster.max_failures:
            raise LaunchError(
                f"Evaluation lost more workers than cluster.max_failures="
                f"{self._cluster.max_failures}; the last one: {reason}",
                fix=f"Run again: what was answered is kept. The log: {self._spec.log}",
            )
        ray.kill(worker, no_restart=True)  # one that is only out of reach must not come back
        self._send_for_one()
        if batch is not None and self._left is not None:
            self._left.appendleft(batch)
            self._share_out()
