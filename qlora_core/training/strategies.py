"""What each strategy asks of one device: the base whole on it, or a part of it.

Weights that are kept dequantised are left out: they take what is left, whatever is left.
"""

from dataclasses import replace
from typing import Literal

from qlora_core.artifacts import Frozen
from qlora_core.config import ClusterConfig
from qlora_core.modeling.memory import MemoryEstimate, Recompute
from qlora_core.modeling.parts import obstacle_to_parts
from qlora_core.training.room import Demand, find_room


class StrategyNeed(Frozen):
    """What one worker needs, in the first way to compute a micro-batch that fits."""

    strategy: Literal["ddp", "fsdp"]
    num_workers: int
    num_rows: int
    """Of a pass, at most."""
    recompute: Recompute
    estimate: MemoryEstimate
    fits: bool
    """If not, this is the smallest there is."""


def strategy_needs(demand: Demand, memory_bytes: int) -> tuple[StrategyNeed, ...]:
    """Return what one worker needs for ddp and, of a 4-bit base, for fsdp.

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


def is_sharded(cluster: ClusterConfig, needs: tuple[StrategyNeed, ...]) -> bool:
    """Say what `training.placing` will decide on workers that have as much memory."""
    known = {need.strategy: need for need in needs}
    if "fsdp" not in known or cluster.strategy == "ddp":
        return False
    is_alone = known["ddp"].num_workers == 1
    return cluster.strategy == "fsdp" or (not known["ddp"].fits and not is_alone)


def _need(strategy: Literal["ddp", "fsdp"], demand: Demand, memory_bytes: int) -> StrategyNeed:
    room = find_room(demand, memory_bytes)
    return StrategyNeed(
        strategy=strategy,
        num_workers=demand.world_size,
        num_rows=room.num_rows,
        recompute=room.recompute,
        estimate=room.estimate,
        fits=room.fits,
    )
