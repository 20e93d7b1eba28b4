"""``qlora plan``: look up what the store has, count what is to do, and lay it out.

The keys are asked for through the very tasks that a run executes, with a workspace that looks up
and never builds; so a plan cannot call something cached that a run would then build.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.quantities import size, unit_of
from flows.strategies import strategies_table
from qlora_core.artifacts import Artifact, Facts, PreparedDataset
from qlora_core.backends.memory import SilentProgress
from qlora_core.backends.ray_resources import cores_of_worker
from qlora_core.config import RunConfig
from qlora_core.data.prepared import read_split
from qlora_core.modeling.dtypes import compute_dtype_name, present_device_type
from qlora_core.modeling.loading import load_config
from qlora_core.modeling.machine import total_bytes
from qlora_core.modeling.shape import shape_of
from qlora_core.plan import Device, Plan, RawSize, Role, plan_run
from qlora_core.ports import Stage
from qlora_core.store import Store
from tasks import places, stages
from tasks.progress import RunProgress
from tasks.wiring import Workspace, find_sources, require_workers, resolved_quantization

P = ParamSpec("P")
F = TypeVar("F", bound=Facts)

_COUNTED_BYTES = 256 << 20
_ONE_ROW_A_LINE = (".jsonl", ".ndjson", ".csv")
_ELSEWHERE = (
    "Memory is counted on this machine, but training runs on a cluster: with --gpu-gb it is "
    "counted on GPUs of so many GB."
)
_COLORS = {"cached": "cyan", "to run": "green", "unknown": "yellow"}


class _NotThereError(Exception):
    """The store has not what was looked up."""


class _Lookup(Workspace):
    """A workspace whose stages are looked up and never run."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.store = Store(places.store_root(config))
        self.sources = find_sources(config)
        self.quantization = resolved_quantization(config)
        self.progress = RunProgress(SilentProgress())  # a plan shows what is there, and no more

    def produce(
        self, role: str, stage: Stage[P, F], /, *args: P.args, **kwargs: P.kwargs
    ) -> Artifact[F]:
        """Return the artefact if it is there."""
        found = self.store.find(stage, self.store.key(stage, *args, **kwargs))
        if found is None:
            raise _NotThereError(role)
        return found


def make_plan(config: RunConfig, gpu_gb: float | None = None) -> Plan:
    """Return what running this recipe would do.

    Args:
        config: The recipe.
        gpu_gb: Memory of each worker's GPU [GB]; none: of what this machine has.

    Raises:
        UserError: The recipe points at something that is not there, or not a causal model; or its
            first rows and the model's tokenizer do not go together; or code that the model brings
            cannot be counted.
        ResourceError: It asks for more workers than this machine holds.
    """
    require_workers(config)
    lookup = _Lookup(config)
    stages.check_first_rows(lookup)
    known = _look_up(lookup)
    data = known.get("data")
    model_config = load_config(config.model, lookup.sources.model)
    trusts_code = config.model.trust_remote_code
    made = plan_run(
        config,
        shape=shape_of(model_config, lookup.quantization, config.adapter, trusts_code=trusts_code),
        device=device_of(config, gpu_gb),
        is_cached=lambda role: _is_cached(known, role),
        prepared=data.facts if data and isinstance(data.facts, PreparedDataset) else None,
        rows=read_split(data.path, "train") if data else None,
        num_cores=_cores(config),
        raw=_raw_size(lookup.sources.dataset.path),
        brings_code=trusts_code and bool(getattr(model_config, "auto_map", None)),
    )
    is_elsewhere = gpu_gb is None and places.cluster(config).address is not None
    return made.model_copy(update={"notes": (*made.notes, *([_ELSEWHERE] * is_elsewhere))})


def show_plan(console: Console, plan: Plan) -> None:
    """Print a plan."""
    console.print(_stages(plan))
    if plan.training:
        console.print(_training_line(plan), highlight=False)
    console.print(_memory(plan))
    if len(plan.strategies) > 1:
        console.print(strategies_table(plan.strategies, plan.device))
    for note in plan.notes:
        console.print(f"[dim]- {escape(note)}[/]", highlight=False)


def _look_up(ws: _Lookup) -> dict[Role, Artifact[Any] | None]:
    """Return each artefact, or None for one that is not there; leave out what has no key yet."""
    known: dict[Role, Artifact[Any] | None] = {}

    def find(role: Role, task: Callable[..., Any], *needs: Role) -> None:
        inputs = [known.get(need) for need in needs]
        if all(inputs):
            try:
                known[role] = task(ws, *inputs)
            except _NotThereError:
                known[role] = None

    find("data", stages.prepare_dataset.fn)
    find("base", stages.quantize_base.fn)
    find("base_report", stages.evaluate_base.fn, "base", "data")
    find("adapter", stages.train_adapter.fn, "base", "data")
    find("tuned_report", stages.evaluate_tuned.fn, "base", "data", "adapter")
    if ws.config.merge.enabled:
        find("merged", stages.merge_adapter.fn, "base", "adapter", "data")
        find("merged_report", stages.evaluate_merged.fn, "base", "data", "merged")
        merging: tuple[Role, ...] = ("merged", "base_report", "tuned_report", "merged_report")
        find("registered", stages.register_model.fn, "base", "adapter", *merging)
    return known


def _is_cached(known: dict[Role, Artifact[Any] | None], role: Role) -> bool | None:
    return known[role] is not None if role in known else None


def _cores(config: RunConfig) -> int:
    cluster = places.cluster(config)
    return cores_of_worker(cluster) if cluster.address is None else cluster.cpus_per_worker or 1


def device_of(config: RunConfig, gpu_gb: float | None) -> Device:
    """Return what a worker trains on: a GPU of so many GB, or what this machine has."""
    asked = config.quantization.compute_dtype
    if gpu_gb is not None:
        dtype = compute_dtype_name(asked, "cuda")
        memory = int(gpu_gb * 1e9)
        return Device(kind="cuda", name="a GPU", memory_bytes=memory, compute_dtype=dtype)
    dtype = compute_dtype_name(asked, present_device_type())
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        name = torch.cuda.get_device_name()
        return Device(kind="cuda", name=name, memory_bytes=memory, compute_dtype=dtype)
    name = f"{os.cpu_count()} CPU cores"
    memory = total_bytes()
    return Device(kind="cpu", name=name, memory_bytes=memory, compute_dtype=dtype)


def _raw_size(path: Path | None) -> RawSize | None:
    if path is None or path.suffix.lower() not in _ONE_ROW_A_LINE:
        return None
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        counted = file.read(_COUNTED_BYTES)
    lines = counted.count(b"\n") * max(1.0, num_bytes / max(1, len(counted)))
    return RawSize(num_bytes=num_bytes, num_lines=max(1, round(lines)))


def _stages(plan: Plan) -> Table:
    table = Table(title=f"Plan of {plan.name}", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("stage", "state", ""):
        table.add_column(column)
    for stage in plan.stages:
        state = f"[{_COLORS[stage.state]}]{stage.state}[/]"
        table.add_row(stage.title, state, escape(stage.why))
    return table


def _training_line(plan: Plan) -> str:
    rows = plan.training
    assert rows is not None, "asked for only when there is one"  # noqa: S101
    about = "" if rows.is_exact else "about "
    steps = f"training: {about}{rows.num_rows} rows, {rows.num_steps} optimizer steps"
    tokens = f"{about}{rows.num_tokens} tokens"
    if rows.supervised_share is None:
        unknown = "supervised share known once prepared"
        return f"{steps}, {tokens} ({unknown}), longest row at most {rows.longest_row} tokens"
    share = f"{rows.supervised_share:.0%} supervised"
    return f"{steps}, {tokens} ({share}), longest row {rows.longest_row} tokens"


def _memory(plan: Plan) -> Table:
    device = plan.device
    of_model = (estimate.total - estimate.runtime for estimate in plan.memory)
    unit, unit_bytes = unit_of(min(of_model))
    caption = f"of {size(device.memory_bytes)} on {device.name}; activations are estimated"
    table = Table(
        title=f"Memory of one worker [{unit}]",
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("component")
    for estimate in plan.memory:
        table.add_column(estimate.strategy, justify="right")
    for name, parts in plan.rows():
        style = "bold" if name == "total" else ""
        table.add_row(name, *(f"{part / unit_bytes:.3f}" for part in parts), style=style)
    fits = ("[green]yes[/]" if plan.fits(e) else "[red]no[/]" for e in plan.memory)
    table.add_row("fits", *fits)
    return table
