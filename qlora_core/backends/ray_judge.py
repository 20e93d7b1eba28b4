"""A worker more that measures snapshots: what Ray runs there, and when there is room for it.

Training must never wait for its place. Ray Train counts what the nodes have in all, not what is
free, and gives up after some failures to take it. So the nodes must hold more workers than training
may ever take; nothing less leaves room, whatever is idle at the moment. Nor is that enough, as
others may hold the rest: there is such a worker only while those that train have their places.

Every driver loads this module, so what takes seconds to import is imported where it is used.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qlora_core.backends.ray_device import booked_device
from qlora_core.backends.ray_resources import places_on
from qlora_core.config import ClusterConfig
from qlora_core.ports import TrainJob
from qlora_core.training.journal import Validation

if TYPE_CHECKING:
    from qlora_core.training.validating import Validator


class SnapshotJudge:
    """What Ray runs.

    Args:
        job: A `TrainJob` in JSON.
        num_threads: The cores it computes on.
        gpus: That were booked for it.
        offloads_base: As `cluster.offload_base`.
    """

    def __init__(self, job: str, num_threads: int, gpus: float, *, offloads_base: bool) -> None:
        self._job, self._num_threads, self._gpus = job, num_threads, gpus
        self._offloads_base = offloads_base
        self._open = ExitStack()
        self._validate: Validator | None = None

    def load(self) -> None:
        """Load the base; not in `__init__`, for Ray would take what is wrong for a lost worker.

        Raises:
            ResourceError: A GPU was booked, and there is none.
            QLoraError: The base cannot be loaded.
        """
        import torch

        from qlora_core.training.validating import open_validator

        torch.set_num_threads(self._num_threads)
        job, device = TrainJob.model_validate_json(self._job), booked_device(self._gpus)
        opened = open_validator(job, device, offloads_base=self._offloads_base)
        self._validate = self._open.enter_context(opened)

    def measure(self, folder: str) -> str:
        """Return the `Validation` of a snapshot, in JSON.

        Raises:
            QLoraError: What `load` raised, once more.
        """
        if self._validate is None:
            self.load()
        assert self._validate is not None  # noqa: S101  # it is loaded
        return self._validate(Path(folder)).model_dump_json()


class HiredJudge:
    """A `SnapshotJudge` somewhere on Ray, as the driver sees it.

    Args:
        job: Whose snapshots it measures.
        cpus: The cores it computes on.
        gpus: The GPUs it computes on.
        booked: Ray's options.
        offloads_base: As `cluster.offload_base`.
    """

    def __init__(
        self,
        job: TrainJob,
        cpus: int,
        gpus: float,
        booked: dict[str, Any],
        *,
        offloads_base: bool,
    ) -> None:
        worker: Any = ray.remote(SnapshotJudge).options(**booked)
        text = job.model_dump_json()
        self._worker = worker.remote(text, cpus, gpus, offloads_base=offloads_base)
        self._worker.load.remote()  # before there is a snapshot; what is wrong, `measure` tells
        self._asked: Any = None

    def ask(self, folder: Path) -> None:
        """Begin to measure a snapshot."""
        self._asked = self._worker.measure.remote(str(folder))

    def answer(self) -> Validation | None:
        """Return what was found of the snapshot that was asked for; None: it is not done.

        Raises:
            RayActorError: The worker is lost.
            QLoraError: It cannot measure.
        """
        try:
            return Validation.model_validate_json(ray.get(self._asked, timeout=0))
        except GetTimeoutError:
            return None

    def end(self) -> None:
        """Give back at once what is booked."""
        ray.kill(self._worker)


@dataclass(frozen=True)
class WorkerMore:
    """Room for a worker more on the Ray that this process is connected to.

    Args:
        cluster: How many workers train.
        cpus: Of a worker.
        gpus: Of a worker.
    """

    cluster: ClusterConfig
    cpus: int
    gpus: float

    @property
    def num_wanted(self) -> int:
        """Workers that the nodes must have room for: those that train, and one."""
        return self.cluster.max_workers + 1

    @property
    def shares_cores(self) -> bool:
        """Whether it books no CPUs, and computes on those of the workers.

        So it is on a Ray of our own, where nobody else is; and where a range of workers without
        GPUs takes every place there is or comes to be, so that there would never be room. On CPUs
        that costs but time, and one node the memory for a copy of the base. A GPU is not shared: it
        may be training that runs out of its memory then.
        """
        if self.cluster.address is None:
            return True
        return not self.gpus and not isinstance(self.cluster.workers, int)

    def fits(self, nodes: list[dict[str, Any]]) -> bool:
        """Say whether there is room beside all the workers that training may take.

        Args:
            nodes: As in `ray.nodes()`; a lost one has no room.
        """
        num_taken = self.cluster.max_workers if self.gpus or not self.shares_cores else 0
        return sum(self._places(node) for node in nodes) > num_taken

    def has_room(self) -> bool:
        """Say whether there is room now."""
        return self.fits(ray.nodes())

    def is_unused(self) -> bool:
        """Say whether nobody uses what it books: a judge that waits is asked for what goes."""
        free: dict[str, float] = ray.available_resources()
        booked = self.booking(ray.nodes())
        cpus, gpus = int(booked["num_cpus"]), float(booked["num_gpus"])
        return free.get("CPU", 0.0) >= cpus and free.get("GPU", 0.0) >= gpus

    def is_training_placed(self) -> bool:
        """Say whether all workers that train have their places now."""
        groups = placement_group_table()  # of everybody; an id ends with that of its job
        job = ray.get_runtime_context().get_job_id()
        ours = {group["state"] for name, group in groups.items() if name.endswith(job)}
        return ours - {"REMOVED"} == {"CREATED"}

    def booking(self, nodes: list[dict[str, Any]]) -> dict[str, Any]:
        """Return Ray's options for what there is room for.

        Args:
            nodes: As in `ray.nodes()`.
        """
        if not self.shares_cores:
            return {"num_cpus": self.cpus, "num_gpus": self.gpus}
        # Ray would run what books nothing anywhere, on a bare head as well
        node = max(nodes, key=self._places)["NodeID"]
        pinned = NodeAffinitySchedulingStrategy(node, soft=True)
        return {"num_cpus": 0, "num_gpus": self.gpus, "scheduling_strategy": pinned}

    def hire(self, job: TrainJob) -> HiredJudge:
        """Book a worker that measures snapshots of ``job``."""
        offloads = self.cluster.offload_base
        booked = self.booking(ray.nodes())
        return HiredJudge(job, self.cpus, self.gpus, booked, offloads_base=offloads)

    def _places(self, node: dict[str, Any]) -> int:
        if not node["Alive"]:
            return 0
        return places_on(node["Resources"], 1 if self.shares_cores else self.cpus, self.gpus)
