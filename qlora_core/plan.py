"""What a recipe will do, before it does it: stages, steps, tokens, memory, and whether it fits.

All pure: what the store has, the model's shape, the prepared dataset's facts and the device are
given, so a plan for an 80 GB GPU can be made on a laptop. Numbers that only a prepared dataset
knows are estimated until there is one, and marked so.

The key of a stage holds the digests of what it reads. So until the stage before has run, nobody
can tell whether the store has its result: such a stage is `unknown`, not `to run`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from qlora_core.artifacts import Frozen, PreparedDataset
from qlora_core.config import RunConfig
from qlora_core.data.prepared import Rows
from qlora_core.evaluation.room import planned_notes
from qlora_core.modeling.memory import (
    USABLE,
    MemoryEstimate,
    Workload,
    estimate_full,
    estimate_lora,
)
from qlora_core.modeling.parts import obstacle_to_parts
from qlora_core.modeling.shape import Shape
from qlora_core.training.batching import plan_training
from qlora_core.training.room import Demand, Room, find_room
from qlora_core.training.strategies import (
    StrategyNeed,
    chosen,
    idle_offload_note,
    own_code_note,
    parts_note,
    strategy_needs,
    without_counting,
)

Role = Literal[
    "data",
    "base",
    "base_report",
    "adapter",
    "tuned_report",
    "merged",
    "merged_report",
    "registered",
]
State = Literal["cached", "to run", "unknown"]

BYTES_PER_TOKEN = 4.0
"""Of English text in a vocabulary of 30 to 130 thousand words; other languages need fewer."""
_STAGES: dict[Role, tuple[str, tuple[Role, ...]]] = {
    "data": ("prepare dataset", ()),
    "base": ("quantize base", ()),
    "base_report": ("evaluate base", ("data", "base")),
    "adapter": ("train adapter", ("data", "base")),
    "tuned_report": ("evaluate tuned", ("data", "base", "adapter")),
    "merged": ("merge adapter", ("data", "base", "adapter")),
    "merged_report": ("evaluate merged", ("data", "base", "merged")),
    "registered": ("register model", ("base_report", "tuned_report", "merged_report")),
}


class PlannedStage(Frozen):
    """One stage of the run."""

    role: Role
    title: str
    state: State
    why: str = ""
    """For `unknown`: which stages have to run first."""


class RawSize(Frozen):
    """What can be told of a dataset's file without understanding it."""

    num_bytes: int
    num_lines: int


class TrainingSize(Frozen):
    """How much training there is."""

    num_rows: int
    num_steps: int
    num_tokens: int
    """Non-padding tokens over the whole training."""
    longest_row: int
    """Tokens; what memory has to be enough for. Where rows are not prepared, the most there may
    be."""
    supervised_share: float | None
    """Of the tokens; none where rows are not prepared."""
    is_exact: bool
    """Counted in the prepared dataset; otherwise estimated from the file."""


class Device(Frozen):
    """One accelerator, or the memory of a machine without one."""

    kind: Literal["cpu", "cuda"]
    name: str
    memory_bytes: int
    compute_dtype: Literal["float32", "bfloat16", "float16"]


class Plan(Frozen):
    """What a recipe will do."""

    name: str
    stages: tuple[PlannedStage, ...]
    training: TrainingSize | None
    """None where nothing is known of the rows, as for a hub dataset before its first run."""
    shape: Shape
    device: Device
    workers_on_device: int
    """Workers that share the device's memory: all of a CPU's, one of a GPU's."""
    workload: Workload
    memory: tuple[MemoryEstimate, ...]
    """Of one worker: the recipe's own, then 16-bit LoRA, then full fine-tuning."""
    strategies: tuple[StrategyNeed, ...] = ()
    """What one worker needs with the base whole on it, and in parts on all."""
    notes: tuple[str, ...] = ()

    def fits(self, estimate: MemoryEstimate) -> bool:
        """Say whether the device has room for this, a tenth left for the runtime."""
        return estimate.total * self.workers_on_device <= USABLE * self.device.memory_bytes

    def rows(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Return (component, bytes in each column of `memory`), the total last."""
        columns = [dict(estimate.components()) for estimate in self.memory]
        rows = [(name, tuple(column[name] for column in columns)) for name in columns[0]]
        return (*rows, ("total", tuple(estimate.total for estimate in self.memory)))


def plan_run(
    config: RunConfig,
    *,
    shape: Shape,
    device: Device,
    is_cached: Callable[[Role], bool | None],
    prepared: PreparedDataset | None = None,
    rows: Rows | None = None,
    raw: RawSize | None = None,
    num_cores: int = 1,
    brings_code: bool = False,
) -> Plan:
    """Say what a recipe will do.

    Args:
        config: The recipe.
        shape: Of its model (see `modeling.memory.shape_of`).
        device: What one worker trains on.
        is_cached: Says of each stage whether the store has its result; None where its key cannot
            be known yet.
        prepared: Facts of the prepared dataset, if the store has it.
        rows: The prepared training rows, if the store has them: the largest micro-batch is known
            then, else it is taken to be as large as it may be.
        raw: Size of the dataset's file, if it is one.
        num_cores: Of one worker.
        brings_code: The model comes with code of its own, which workers do not count.
    """
    training = training_size(config, prepared, raw)
    demand = _demand(config, training, device, shape, rows, num_cores)
    memory_bytes = device.memory_bytes // _sharing(config, device)
    needs = strategy_needs(demand, memory_bytes)
    best = chosen(without_counting(config.cluster) if brings_code else config.cluster, needs)
    if best.strategy == "fsdp":
        demand = replace(demand, is_sharded=True, num_lanes=1)
    room = find_room(demand, memory_bytes)
    return Plan(
        name=config.name,
        stages=plan_stages(config, is_cached),
        training=training,
        shape=shape,
        device=device,
        workers_on_device=_sharing(config, device),
        workload=room.workload,
        memory=_estimates(config, shape, room),
        strategies=needs,
        notes=(
            *_notes(training),
            *_training_place_notes(config, needs, best, brings_code=brings_code),
            *_offload_notes(config, best, device),
            *room.notes(config.training),
            *_asking_notes(config, shape, device, demand.max_length),
        ),
    )


class ShapePlan(Frozen):
    """What training a model of some size would need, whether or not the model is at hand."""

    model: str
    shape: Shape
    device: Device
    max_length: int
    """Tokens of each row of a micro-batch."""
    strategies: tuple[StrategyNeed, ...]
    chosen: Literal["ddp", "fsdp"]
    """By the recipe's `cluster.strategy`."""
    notes: tuple[str, ...] = ()


def plan_shape(config: RunConfig, *, model: str, shape: Shape, device: Device) -> ShapePlan:
    """Say what training a model of this shape needs of each device, all rows at their longest.

    Args:
        config: The recipe; its model and dataset are not looked at.
        model: What to call the shape.
        shape: The sizes.
        device: What one worker trains on.
    """
    demand = _demand(config, None, device, shape, None, num_cores=1)
    needs = strategy_needs(demand, device.memory_bytes // _sharing(config, device))
    best = chosen(config.cluster, needs)
    return ShapePlan(
        model=model,
        shape=shape,
        device=device,
        max_length=config.dataset.max_length,
        strategies=needs,
        chosen=best.strategy,
        notes=(
            *_offload_notes(config, best, device),
            *_asking_notes(config, shape, device, demand.max_length),
        ),
    )


def plan_stages(
    config: RunConfig, is_cached: Callable[[Role], bool | None]
) -> tuple[PlannedStage, ...]:
    """Return the stages of this recipe in the order of the flow, each with its state."""
    planned: dict[Role, PlannedStage] = {}
    for role, (title, inputs) in _STAGES.items():
        if not _is_wanted(role, config):
            continue
        waiting = [planned[i] for i in inputs if i in planned and planned[i].state != "cached"]
        cached = None if waiting else is_cached(role)
        why = f"known once {', '.join(stage.title for stage in waiting)} has run" if waiting else ""
        planned[role] = PlannedStage(role=role, title=title, state=_state(cached), why=why)
    return tuple(planned.values())


def training_size(
    config: RunConfig, prepared: PreparedDataset | None, raw: RawSize | None
) -> TrainingSize | None:
    """Return rows, steps and tokens: counted if the dataset is prepared, else estimated."""
    if prepared is not None:
        train = prepared.train
        supervised = train.num_supervised_tokens / max(1, train.num_tokens)
        longest = train.length_quantiles.get("max", config.dataset.max_length)
        return _sized(config, train.num_rows, train.num_tokens, longest, supervised, exact=True)
    if raw is None or raw.num_lines < 1:
        return None
    share = 1.0 if config.dataset.heldout.source else 1.0 - config.dataset.heldout.fraction
    num_rows = max(1, round(share * raw.num_lines))
    num_rows = min(num_rows, config.dataset.max_rows or num_rows)
    num_tokens = round(raw.num_bytes / BYTES_PER_TOKEN * num_rows / raw.num_lines)
    return _sized(config, num_rows, num_tokens, config.dataset.max_length, None, exact=False)


def _sized(
    config: RunConfig,
    num_rows: int,
    num_tokens: int,
    longest: int,
    supervised: float | None,
    *,
    exact: bool,
) -> TrainingSize | None:
    if num_rows < 1:
        return None
    steps = plan_training(config.training, config.seed, num_rows)
    passes = steps.num_stream_rows / num_rows
    return TrainingSize(
        num_rows=num_rows,
        num_steps=steps.num_steps,
        num_tokens=round(num_tokens * passes),
        longest_row=longest,
        supervised_share=supervised,
        is_exact=exact and passes.is_integer(),  # a part of an epoch may hold longer rows
    )


def _is_wanted(role: Role, config: RunConfig) -> bool:
    if role in ("merged", "merged_report"):
        return config.merge.enabled
    return config.registry.enabled if role == "registered" else True


def _state(cached: bool | None) -> State:
    if cached is None:
        return "unknown"
    return "cached" if cached else "to run"


def _demand(
    config: RunConfig,
    training: TrainingSize | None,
    device: Device,
    shape: Shape,
    rows: Rows | None,
    num_cores: int,
) -> Demand:
    """Return what the largest micro-batch will need; see `training.room`."""
    longest = training.longest_row if training else config.dataset.max_length
    draws, known = bool(config.adapter.dropout), None
    if rows is not None and len(rows):
        known = (rows, plan_training(config.training, config.seed, len(rows)))
    return Demand(
        shape=shape,
        quantization=config.quantization,
        adapter=config.adapter,
        training=config.training,
        device=device.kind,
        compute_dtype=device.compute_dtype,
        world_size=config.cluster.min_workers,
        num_lanes=1 if draws or device.kind == "cuda" else num_cores,
        rows=known,
        max_length=longest,
        shares_prefix=device.kind == "cpu" and not draws,
        offloads_base=config.cluster.offload_base and device.kind == "cuda",
    )


def _sharing(config: RunConfig, device: Device) -> int:
    return config.cluster.max_workers if device.kind == "cpu" else 1


def _estimates(config: RunConfig, shape: Shape, room: Room) -> tuple[MemoryEstimate, ...]:
    return (
        room.estimate,
        estimate_lora(shape, config.adapter, config.training, room.workload),
        estimate_full(shape, room.workload),
    )


def _training_place_notes(
    config: RunConfig, needs: tuple[StrategyNeed, ...], best: StrategyNeed, *, brings_code: bool
) -> list[str]:
    """Return what workers will say of where the base lies."""
    if best.strategy == "fsdp":
        is_offloaded = bool(best.host_bytes)
        return [parts_note(best.num_workers, "cluster.strategy", is_offloaded=is_offloaded)]
    is_left = brings_code and config.cluster.strategy == "auto" and len(needs) > 1
    return [own_code_note()] if is_left else []


_DIVIDE = (
    "It does not fit. More workers (cluster.workers) would keep smaller parts of the base, and "
    "cluster.offload_base=true keeps them in the hosts' memory."
)


def _offload_notes(config: RunConfig, best: StrategyNeed, device: Device) -> list[str]:
    obstacle = obstacle_to_parts(config.quantization.method, is_dora=config.adapter.dora)
    has_host = device.kind == "cuda"
    if not config.cluster.offload_base:
        may_divide = has_host and not obstacle and config.cluster.strategy != "ddp"
        return [] if best.fits or not may_divide else [_DIVIDE]
    if best.host_bytes:
        return []
    return [idle_offload_note(config.cluster.strategy, has_host=has_host, obstacle=obstacle)]


def _asking_notes(config: RunConfig, shape: Shape, device: Device, longest: int) -> list[str]:
    if device.kind == "cpu":
        return []
    return planned_notes(config, shape, device.compute_dtype, device.memory_bytes, longest)


def _notes(training: TrainingSize | None) -> list[str]:
    notes = [
        "Weights, constants, adapter, gradients and optimizer are exact; all other memory is "
        "approximate."
    ]
    if training is None:
        notes.append("Nothing is known of the rows yet, so steps and tokens are left open.")
    elif not training.is_exact:
        notes.append(
            f"Tokens are estimated ({BYTES_PER_TOKEN:g} bytes each where the dataset is not "
            "prepared, without those of the chat template; whole-epoch means where a part of an "
            "epoch is trained)."
        )
    return notes
