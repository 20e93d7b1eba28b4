"""One of several workers of a measured training: one thread, gloo, what passes through it counted.

    python -m benchmarks.scale.worker ORDER    # an `Order` in JSON

It is `run_worker` as Ray's workers run it, without Ray: between two steps Ray does nothing. All
there is to measure is noted when the gradients of a step have been added up, which is once a step.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.training.workload import open_workload
from qlora_core.artifacts import Frozen
from qlora_core.config import AdapterConfig, QuantizationConfig, SnapshotConfig, TrainingConfig
from qlora_core.modeling.sharding import Waitable
from qlora_core.ports import TrainJob
from qlora_core.training.comm import Comm


class Order(Frozen):
    """What a worker is told."""

    workload: Path
    folder: Path
    """Where what was measured goes, and what is trained."""
    rank: int
    num_workers: int
    port: int
    rows_per_worker: int
    """Of each step."""
    num_steps: int

    @property
    def marks_file(self) -> Path:
        """Where this worker leaves its marks."""
        return self.folder / f"marks-{self.rank}.json"


@dataclass(frozen=True)
class Mark:
    """The moment when a step's gradients had been added up."""

    wall_s: float
    cpu_s: float
    """Of this process."""
    waited_s: float
    """For the others, and for the sum, in this step."""
    message_bytes: int
    """Handed over to be added up."""
    loopback_bytes: int
    """That came in on this machine's loopback device so far, from whomever."""


class CountingComm:
    """A line to the other workers that notes what passes through it.

    Args:
        inner: The line.
    """

    def __init__(self, inner: Comm) -> None:
        self._inner = inner
        self.rank, self.world_size = inner.rank, inner.world_size
        self.local_size = inner.local_size
        self.marks: list[Mark] = []

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Add up, and note it."""
        begun = time.monotonic()
        self._inner.all_reduce_sum(tensor)
        now = time.monotonic()
        num_bytes = tensor.numel() * tensor.element_size()
        cpu_s = time.process_time()
        self.marks.append(Mark(now, cpu_s, now - begun, num_bytes, loopback_bytes()))

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's ``value``."""
        return self._inner.broadcast(value)

    def gather(self, value: Any) -> list[Any]:
        """Return every worker's ``value``."""
        return self._inner.gather(value)

    def gather_parts(self, whole: Tensor, part: Tensor) -> Waitable:
        """Begin to fill ``whole`` with every worker's ``part``."""
        return self._inner.gather_parts(whole, part)

    def steps(self) -> list[Mark]:
        """Return the marks of gradients: the largest messages there are."""
        largest = max(mark.message_bytes for mark in self.marks)
        return [mark for mark in self.marks if mark.message_bytes == largest]


def loopback_bytes() -> int:
    """Return the bytes that came in on the loopback device; 0 where nobody counts."""
    counters = Path("/proc/net/dev")
    if not counters.exists():
        return 0
    lines = (line.split(":") for line in counters.read_text().splitlines() if ":" in line)
    return next((int(rest.split()[0]) for name, rest in lines if name.strip() == "lo"), 0)


def job_of(order: Order) -> TrainJob:
    """Return the training, whose every step has so many rows for each worker."""
    dtype = open_workload(order.workload).settings.compute_dtype
    return TrainJob(
        base=order.workload / "base",
        data=order.workload / "data",
        out=order.folder / "out",
        scratch=order.folder / "scratch",
        quantization=QuantizationConfig.model_validate({"compute_dtype": dtype}),
        adapter=AdapterConfig(),
        training=TrainingConfig(
            max_steps=order.num_steps,
            epochs=1000,
            global_batch=order.num_workers * order.rows_per_worker,
            micro_batch=order.rows_per_worker,
            checkpointing="off",
            heldout_rows=1,
        ),
        seed=0,
    )


def main() -> None:
    """Train; leave the marks."""
    order = Order.model_validate_json(sys.argv[1])
    import torch
    import torch.distributed as dist

    from qlora_core.training.comm import Alone, TorchComm
    from qlora_core.training.worker import run_worker

    torch.set_num_threads(1)
    device = torch.device("cpu")
    inner: Comm = Alone()
    if order.num_workers > 1:
        address = f"tcp://127.0.0.1:{order.port}"
        dist.init_process_group(
            "gloo", init_method=address, rank=order.rank, world_size=order.num_workers
        )
        inner = TorchComm(device, order.num_workers)
    comm = CountingComm(inner)
    run_worker(job_of(order), comm, SnapshotConfig(every_s=1e9), "0001", device)
    order.marks_file.write_text(json.dumps([asdict(mark) for mark in comm.steps()]))


if __name__ == "__main__":
    main()
