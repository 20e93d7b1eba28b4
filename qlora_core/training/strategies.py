"""What each strategy asks of one worker, the base whole on it or a part of it, and which is chosen.

The worker, `qlora plan` and preflight ask the same functions: a plan that chose otherwise than the
worker would call something possible that then runs out of memory. Weights that are kept dequantised
are left out: they take what is left, whatever is left.
"""

from dataclasses import replace
from typing import Literal

from qlora_core.artifacts import Frozen
from qlora_core.config import ClusterConfig
from qlora_core.modeling.memory import MemoryEstimate, Recompute
from qlora_core.modeling.parts import obstacle_to_parts
from qlora_core.modeling.stored import parts_of
from qlora_core.training.room import Demand, find_room

OWN_CODE = "only loading tells what a model that brings its own code takes"


class StrategyNeed(Frozen):
    """What one worker needs, in the first way to compute a micro-batch that fits."""

    strategy: Literal["ddp", "fsdp"]
    num_workers: int
    num_rows: int
    """Of a pass, at most."""
    recompute: Recompute
    estimate: MemoryEstimate
    """Of the device."""
    fits: bool
    """If not, this is the smallest there is."""
    host_bytes: int = 0
    """Of the memory of the GPU's host: this worker's part of the base, with cluster.offload_base.
    Another worker on that machine has another part there."""


def strategy_needs(demand: Demand, memory_bytes: int) -> tuple[StrategyNeed, ...]:
    """Return what one worker needs for ddp and, of a 4-bit base, for fsdp.

    A worker alone has nobody to divide the base with, so it has fsdp only if its host keeps it.

    Args:
        demand: What is trained, on how many workers.
        memory_bytes: That one worker may use.
    """
    quantization = demand.quantization.model_copy(update={"keep_dequantized": "off"})
    ddp = replace(demand, quantization=quantization, is_sharded=False)
    needs = [_need("ddp", ddp, memory_bytes)]
    if can_be_sharded(demand) and (demand.world_size > 1 or demand.offloads_base):
        needs.append(_need("fsdp", replace(ddp, is_sharded=True), memory_bytes))
    return tuple(needs)


def can_be_sharded(demand: Demand) -> bool:
    """Say whether the base has 4-bit weights, and nothing starts from all of them."""
    return not obstacle_to_parts(demand.quantization.method, is_dora=demand.adapter.dora)


def choices(cluster: ClusterConfig, needs: tuple[StrategyNeed, ...]) -> tuple[StrategyNeed, ...]:
    """Return what workers choose among: the first that fits, or else the last.

    Args:
        cluster: Says what is wanted.
        needs: From `strategy_needs`.
    """
    known = {need.strategy: need for need in needs}
    if "fsdp" not in known or cluster.strategy == "ddp":
        return (known["ddp"],)
    return (known["fsdp"],) if cluster.strategy == "fsdp" else (known["ddp"], known["fsdp"])


def chosen(cluster: ClusterConfig, needs: tuple[StrategyNeed, ...]) -> StrategyNeed:
    """Return what workers choose if each has the memory that ``needs`` were counted for."""
    among = choices(cluster, needs)
    return next((need for need in among if need.fits), among[-1])


def without_counting(cluster: ClusterConfig) -> ClusterConfig:
    """Return what ``cluster`` comes to where nobody can count: `auto` leaves the base whole."""
    return cluster.model_copy(update={"strategy": "ddp"}) if cluster.strategy == "auto" else cluster


def parts_note(num_workers: int, why: str, *, is_offloaded: bool) -> str:
    """Say that the base lies in parts, and where."""
    if num_workers == 1:
        return f"The base lies in the host's memory ({why})."
    where = "in the hosts' memory" if is_offloaded else "on all workers"
    return f"The base lies in {num_workers} parts {where} ({why})."


def own_code_note() -> str:
    """Say that `auto` has not looked whether the base fits."""
    return (
        f"cluster.strategy=auto left the base whole, as {OWN_CODE}; "
        "cluster.strategy=fsdp divides it."
    )


def idle_offload_note(strategy: str, *, has_host: bool, obstacle: str) -> str:
    """Say why cluster.offload_base does nothing for training.

    Args:
        strategy: Of the recipe; the base lies whole, or there is no host.
        has_host: Workers train on GPUs.
        obstacle: From `obstacle_to_parts`.
    """
    if not has_host:
        why = "a CPU has no host beside it"
    elif obstacle:
        why = f"it does not work with {obstacle}"
    elif strategy == "ddp":
        why = "cluster.strategy=ddp keeps the base whole on each GPU"
    else:
        why = "the base lies whole on each GPU; cluster.strategy=fsdp offloads it in any case"
    return f"cluster.offload_base is left out in training: {why}."


def _need(strategy: Literal["ddp", "fsdp"], demand: Demand, memory_bytes: int) -> StrategyNeed:
    room = find_room(demand, memory_bytes)
    has_host = demand.is_sharded and demand.offloads_base and demand.device == "cuda"
    return StrategyNeed(
        strategy=strategy,
        num_workers=demand.world_size,
        num_rows=room.num_rows,
        recompute=room.recompute,
        estimate=room.estimate,
        fits=room.fits,
        host_bytes=_pinned_bytes(demand) if has_host else 0,
    )


def _pinned_bytes(demand: Demand) -> int:
    return parts_of(demand.shape, demand.quantization, demand.world_size).pinned
