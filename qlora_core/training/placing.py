"""Decide where the frozen base lies: whole on every worker, or in parts on all of them.

Whole is faster, as nothing has to be put together before it computes. So `cluster.strategy=auto`
divides the base only if the memory plan finds no way to train with all of it on one of the workers,
and all workers do as the least of them needs (a worker alone can only leave it with its host, as
`cluster.offload_base` asks for). A model that brings its own code is not counted, so `auto` leaves
it whole. Who measures snapshots beside them does so alone: where the base does not fit whole, it
lies with the host (`modeling.hosted`). Decided before a weight is loaded.
"""

from dataclasses import dataclass, replace

import torch

from qlora_core.config import ClusterConfig
from qlora_core.data.prepared import Rows
from qlora_core.errors import ConfigError, ResourceError
from qlora_core.modeling.dtypes import compute_dtype_name
from qlora_core.modeling.hosted import BaseNeeds, BasePlace, choose_place
from qlora_core.modeling.loading import brings_code, load_saved_config
from qlora_core.modeling.machine import free_bytes
from qlora_core.modeling.parts import obstacle_to_parts
from qlora_core.modeling.shape import Shape, shape_of
from qlora_core.modeling.stored import parts_of
from qlora_core.ports import TrainJob
from qlora_core.training.batching import plan_training
from qlora_core.training.comm import Alone, Comm
from qlora_core.training.memory import memory_for_worker
from qlora_core.training.room import Demand
from qlora_core.training.strategies import (
    chosen,
    idle_offload_note,
    own_code_note,
    parts_note,
    strategy_needs,
)


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
    """Return where the base shall lie; say in ``notes`` what is not whole, or not as asked for.

    Raises:
        ConfigError: It is to be divided, and cannot be.
        ResourceError: The hosts have no room for its parts.
    """
    has_host, obstacle = device.type == "cuda", _obstacle(job)
    if cluster.strategy == "fsdp" and obstacle:
        raise ConfigError(
            f"cluster.strategy=fsdp does not work with {obstacle}.",
            fix="Set cluster.strategy=ddp; or quantization.method=nf4, adapter.dora=false.",
        )
    place = Placement(is_sharded=True, is_offloaded=cluster.offload_base and has_host)
    if not _divides(job, cluster, rows, comm, device, place, notes):
        place = Placement()
    if cluster.offload_base and not place.is_offloaded:
        notes.append(idle_offload_note(cluster.strategy, has_host=has_host, obstacle=obstacle))
    if place.is_offloaded:
        _require_hosts(job, comm)
    return place


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
    if device.type != "cuda" or brings_code(job.base):
        return BasePlace()  # of a model that brings code, only loading tells what it takes
    needs = judged_needs(demand_of(job, _shape(job), rows, Alone(), device, Placement()))
    memory_bytes = memory_for_worker(device, num_sharing=1)
    return choose_place(needs, memory_bytes, free_bytes(), wants_host=wants_host)


def judged_needs(demand: Demand) -> BaseNeeds:
    """Return what one who measures snapshots of a training needs, counted as if it trained alone.

    Args:
        demand: Of the training, on any number of workers.
    """
    alone = replace(demand, world_size=1, offloads_base=True)
    found = {need.strategy: need for need in strategy_needs(alone, memory_bytes=0)}
    if why := obstacle_to_parts(demand.quantization.method, is_dora=demand.adapter.dora):
        return BaseNeeds(found["ddp"].estimate, None, obstacle=why)
    hosted = found["fsdp"]
    return BaseNeeds(found["ddp"].estimate, hosted.estimate, hosted.host_bytes)


def _divides(
    job: TrainJob,
    cluster: ClusterConfig,
    rows: Rows,
    comm: Comm,
    device: torch.device,
    place: Placement,
    notes: list[str],
) -> bool:
    """Say whether the base shall lie as in ``place``; what is said of it goes to ``notes``."""
    is_alone = comm.world_size == 1 and not place.is_offloaded
    if is_alone and cluster.strategy == "fsdp":
        notes.append("cluster.strategy=fsdp ran as ddp: there is one worker, which has all parts.")
    if is_alone or _obstacle(job) or cluster.strategy == "ddp":
        return False
    why = f"cluster.strategy={cluster.strategy}"
    if cluster.strategy == "auto":
        if brings_code(job.base):
            notes.append(own_code_note())
            return False
        if not any(comm.gather(_is_too_large(job, cluster, rows, comm, device, place))):
            return False
        why += ": it does not fit whole"
    notes.append(parts_note(comm.world_size, why, is_offloaded=place.is_offloaded))
    if isinstance(job.quantization.keep_dequantized, int):
        notes.append(
            "quantization.keep_dequantized ran as off: a base in parts is dequantised in each pass."
        )
    return True


def _obstacle(job: TrainJob) -> str:
    return obstacle_to_parts(job.quantization.method, is_dora=job.adapter.dora)


def _shape(job: TrainJob) -> Shape:
    return shape_of(load_saved_config(job.base), job.quantization, job.adapter)


def _is_too_large(
    job: TrainJob,
    cluster: ClusterConfig,
    rows: Rows,
    comm: Comm,
    device: torch.device,
    place: Placement,
) -> bool:
    asked = Placement(is_offloaded=place.is_offloaded)
    demand = demand_of(job, _shape(job), rows, comm, device, asked)
    needs = strategy_needs(demand, memory_for_worker(device, comm.local_size))
    return chosen(cluster, needs).strategy == "fsdp"


def _require_hosts(job: TrainJob, comm: Comm) -> None:
    """Find before loading that some host cannot hold the parts of its workers; all find the same.

    Raises:
        ResourceError: One cannot.
    """
    if brings_code(job.base):
        return
    own_bytes = parts_of(_shape(job), job.quantization, comm.world_size).pinned
    hosts = comm.gather([comm.local_size, free_bytes()])
    for rank, (num_here, host_bytes) in enumerate(hosts):
        if num_here * own_bytes > host_bytes:
            raise ResourceError(
                f"There are {host_bytes / 1e9:.2f} GB of the host's memory free beside worker "
                f"{rank}, and parts of the base take {num_here * own_bytes / 1e9:.2f} GB there.",
                why=f"cluster.offload_base keeps the parts of {num_here} workers on that machine.",
                fix="Free memory there, spread the workers over more machines, or set "
                "cluster.offload_base=false.",
            )
