"""Decide where the frozen base lies: whole on every worker, or in parts on all of them.

Whole is faster, as nothing has to be put together before it computes. So `cluster.strategy=auto`
divides the base only if the memory plan finds no way to train with all of it on one of the workers,
and all workers do as the least of them needs. Who measures snapshots beside them does so alone:
where the base does not fit whole, it lies with the host (`modeling.hosted`). Decided before a
weight is loaded.
"""

from dataclasses import dataclass, replace

import torch

from qlora_core.config import ClusterConfig
from qlora_core.data.prepared import Rows
from qlora_core.errors import ConfigError
from qlora_core.modeling.dtypes import compute_dtype_name
from qlora_core.modeling.hosted import BaseNeeds, BasePlace, choose_place
from qlora_core.modeling.loading import load_saved_config
from qlora_core.modeling.machine import free_bytes
from qlora_core.modeling.parts import obstacle_to_parts
from qlora_core.modeling.shape import Shape, shape_of
from qlora_core.modeling.stored import parts_of
from qlora_core.ports import TrainJob
from qlora_core.training.batching import plan_training
from qlora_core.training.comm import Alone, Comm
from qlora_core.training.memory import memory_for_worker
from qlora_core.training.room import Demand
from qlora_core.training.strategies import strategy_needs


@dataclass(frozen=True)
class Placement:
    """Where the base lies."""

    is_sharded: bool = False
    is_offloaded: bool = False
    """Its parts are in the host's memory."""


def demand_of(
    job: TrainJob, shape: Shape, rows: Rows, comm: Comm, device: torch.device, place: Placement
) -> Demand:
    """Return what ``job`` asks of one worker's memory, all rows packed and on one lane."""
    return Demand(
        shape=shape,
        quantization=job.quantization,
        adapter=job.adapter,
        training=job.training,
        device="cuda" if device.type == "cuda" else "cpu",
        compute_dtype=compute_dtype_name(job.quantization.compute_dtype, device.type),
        world_size=comm.world_size,
        rows=(rows, plan_training(job.training, job.seed, len(rows))),
        is_sharded=place.is_sharded,
        offloads_base=place.is_offloaded,
    )


def place_base(
    job: TrainJob,
    cluster: ClusterConfig,
    rows: Rows,
    comm: Comm,
    device: torch.device,
    notes: list[str],
) -> Placement:
    """Return where the base shall lie; say it in ``notes`` if that is not whole everywhere.

    Raises:
        ConfigError: It is to be divided, and cannot be.
    """
    is_offloaded = cluster.offload_base and device.type == "cuda"
    if cluster.strategy == "fsdp":
        if why := _obstacle(job):
            raise ConfigError(
                f"cluster.strategy=fsdp does not work with {why}.",
                fix="Set cluster.strategy=ddp; or quantization.method=nf4, adapter.dora=false.",
            )
        return _divided(job, comm, is_offloaded, "cluster.strategy=fsdp", notes)
    if cluster.strategy == "ddp" or comm.world_size == 1 or _obstacle(job):
        return Placement()
    if all(comm.gather(_fits_whole(job, rows, comm, device))):
        return Placement()
    why = "cluster.strategy=auto: it does not fit whole"
    return _divided(job, comm, is_offloaded, why, notes)


def place_judged_base(
    job: TrainJob, rows: Rows, device: torch.device, *, wants_host: bool
) -> BasePlace:
    """Return where the base lies for one who measures snapshots alone.

    Args:
        job: That writes the snapshots.
        rows: It trains on.
        device: Where they are measured.
        wants_host: The recipe wants the base in the host's memory in any case.

    Raises:
        ResourceError: There is no room for it.
    """
    if device.type != "cuda" or any((job.base / "model").glob("*.py")):
        return BasePlace()  # of a model that brings code, only loading tells what it takes
    shape = shape_of(load_saved_config(job.base), job.quantization, job.adapter)
    needs = judged_needs(demand_of(job, shape, rows, Alone(), device, Placement()))
    memory_bytes = memory_for_worker(device, num_sharing=1)
    return choose_place(needs, memory_bytes, free_bytes(), wants_host=wants_host)


def judged_needs(demand: Demand) -> BaseNeeds:
    """Return what one who measures snapshots of a training needs, counted as if it trained alone.

    Args:
        demand: Of the training, on any number of workers.
    """
    alone = replace(demand, world_size=1, offloads_base=True)
    found = {need.strategy: need.estimate for need in strategy_needs(alone, memory_bytes=0)}
    if why := obstacle_to_parts(demand.quantization.method, is_dora=demand.adapter.dora):
        return BaseNeeds(found["ddp"], None, obstacle=why)
    host_bytes = parts_of(demand.shape, demand.quantization, 1).pinned
    return BaseNeeds(found["ddp"], found["fsdp"], host_bytes)


def _divided(
    job: TrainJob, comm: Comm, is_offloaded: bool, why: str, notes: list[str]
) -> Placement:
    if comm.world_size == 1 and not is_offloaded:
        notes.append("cluster.strategy=fsdp ran as ddp: there is one worker, which has all parts.")
        return Placement()
    where = "in the hosts' memory" if is_offloaded else "on all workers"
    notes.append(f"The base lies in {comm.world_size} parts {where} ({why}).")
    if isinstance(job.quantization.keep_dequantized, int):
        notes.append(
            "quantization.keep_dequantized ran as off: a base in parts is dequantised in each pass."
        )
    return Placement(is_sharded=True, is_offloaded=is_offloaded)


def _obstacle(job: TrainJob) -> str:
    return obstacle_to_parts(job.quantization.method, is_dora=job.adapter.dora)


def _fits_whole(job: TrainJob, rows: Rows, comm: Comm, device: torch.device) -> bool:
    shape = shape_of(load_saved_config(job.base), job.quantization, job.adapter)
    demand = demand_of(job, shape, rows, comm, device, Placement())
    ddp = strategy_needs(demand, memory_for_worker(device, comm.local_size))[0]
    return ddp.fits
