"""What the nodes of a cluster have to be ready for: a training, or questions to a model.

An errand names what workers read and write, and the least memory that a worker needs. That is
counted on the model's skeleton, as `qlora plan` does; what is not known before a worker has tried
(does packing work for this model?) is taken to go well. So a node is refused only where even the
smallest pass cannot fit, and what is tight is left to the worker, who finds its way or says so.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_core.backends.host_room import HostNeed
from qlora_core.config import ClusterConfig
from qlora_core.ports import AskJob, TrainJob

if TYPE_CHECKING:
    from qlora_core.training.strategies import StrategyNeed

_SMALLER_QUESTIONS = "Try a lower evaluation.batch_size or evaluation.max_new_tokens."


@dataclass(frozen=True)
class Needs:
    """What a worker needs at least."""

    least_bytes: int | None
    """Of its GPU's memory, or of the machine's without one; none: only loading the model tells."""
    host: HostNeed | None = None
    """Of the machine's, beside a GPU that does not hold the base, or not all of it."""


@dataclass(frozen=True)
class Errand:
    """What a node has to be ready for."""

    scratch: Path
    """A folder in the store that workers write to."""
    folders: tuple[Path, ...]
    """What workers read."""
    compute_dtype: str
    """Of products."""
    needs: Callable[[], Needs]
    """Counts what a worker needs at least; takes seconds."""
    smaller: str = ""
    """How to need less."""


def training_errand(job: TrainJob, cluster: ClusterConfig, cpus: int, gpus: float) -> Errand:
    """Return what ``job`` asks of nodes, on workers with so many CPUs and GPUs."""
    from qlora_core.training.room import SMALLER

    def needs() -> Needs:
        return _needs_of_training(job, cluster, cpus, "cuda" if gpus else "cpu")

    return Errand(
        scratch=job.scratch,
        folders=(job.base, job.data),
        compute_dtype=job.quantization.compute_dtype,
        needs=needs,
        smaller=SMALLER,
    )


def asking_errand(job: AskJob, gpus: float) -> Errand:
    """Return what ``job`` asks of nodes: room for the weights, whatever the batches are.

    A 4-bit base need not fit on a GPU; then its batches count, and the host's memory.

    Args:
        job: What is asked of which model.
        gpus: Of a worker.
    """

    def needs() -> Needs:
        return (_needs_of_base(job) if gpus else None) or Needs(_stored_bytes(job.model))

    folders = (job.model, job.data, *([job.adapter] if job.adapter else []))
    return Errand(job.scratch, folders, "", needs, smaller=_SMALLER_QUESTIONS if gpus else "")


def _stored_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in (model / "model").glob("*.safetensors"))


def _needs_of_base(job: AskJob) -> Needs | None:
    """Return what a worker on a GPU needs; none where the base is on the GPU in any case."""
    from qlora_core.evaluation.questions import read_questions
    from qlora_core.evaluation.room import needs_of

    if job.is_merged:
        return None
    found = needs_of(job, read_questions(job.evaluation, job.data))
    if found is None or found.hosted is None:
        return None
    hosted_bytes = found.hosted.total
    enough = None if job.offloads_base else found.enough_gpu_bytes
    least = hosted_bytes if job.offloads_base else min(found.whole.total, hosted_bytes)
    return Needs(least, HostNeed(size_bytes=found.host_bytes, enough_gpu_bytes=enough))


def _needs_of_training(job: TrainJob, cluster: ClusterConfig, cpus: int, device: str) -> Needs:
    from qlora_core.data.prepared import read_split
    from qlora_core.modeling.dtypes import compute_dtype_name
    from qlora_core.modeling.loading import brings_code, load_saved_config
    from qlora_core.modeling.shape import shape_of
    from qlora_core.training.batching import plan_training
    from qlora_core.training.room import Demand
    from qlora_core.training.strategies import choices, strategy_needs

    if brings_code(job.base):
        return Needs(None)  # it is built by workers alone
    rows, is_gpu = read_split(job.data, "train"), device == "cuda"
    demand = Demand(
        shape=shape_of(load_saved_config(job.base), job.quantization, job.adapter),
        quantization=job.quantization,
        adapter=job.adapter,
        training=job.training,
        device="cuda" if is_gpu else "cpu",
        compute_dtype=compute_dtype_name(job.quantization.compute_dtype, device),
        world_size=cluster.min_workers,
        num_lanes=1 if is_gpu or job.adapter.dropout else cpus,
        rows=(rows, plan_training(job.training, job.seed, len(rows))),
        shares_prefix=not is_gpu and not job.adapter.dropout,
        offloads_base=cluster.offload_base and is_gpu,
    )
    among = choices(cluster, strategy_needs(demand, memory_bytes=0))
    return Needs(min(need.estimate.total for need in among), _host_of_training(among))


def _host_of_training(among: "tuple[StrategyNeed, ...]") -> HostNeed | None:
    """Return what a host has to hold, unless its GPUs let workers choose otherwise."""
    from qlora_core.modeling.memory import USABLE

    *whole, last = among
    if not last.host_bytes:
        return None
    enough = math.ceil(whole[0].estimate.total / USABLE) if whole else None
    return HostNeed(
        size_bytes=last.host_bytes, enough_gpu_bytes=enough, num_dividing=last.num_workers
    )
