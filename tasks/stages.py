"""One small Prefect task per stage: a name in the UI, retries for what the world broke, no more.

Whether there is anything to do is decided by our own store, so Prefect caches nothing; whether it
is worth another try is decided by the error itself. Arguments a person wants to see in Prefect's
graph (the artefacts) are arguments; all others come from the workspace.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE

from qlora_core.artifacts import (
    AdapterCheckpoint,
    Artifact,
    EvalReport,
    Facts,
    MergedModel,
    PreparedDataset,
    QuantizedBase,
    RegisteredModel,
)
from qlora_core.config import (
    AdapterConfig,
    DatasetConfig,
    ModelConfig,
    QuantizationConfig,
    TrainingConfig,
)
from qlora_core.ports import Stage
from qlora_core.sources import Source
from qlora_core.stages import evaluate, merge, prepare, quantize, register, train
from tasks.wiring import Workspace, is_transient

P = ParamSpec("P")
F = TypeVar("F", bound=Facts)
R = TypeVar("R")

Data = Artifact[PreparedDataset]
Base = Artifact[QuantizedBase]
Adapter = Artifact[AdapterCheckpoint]
Merged = Artifact[MergedModel]
Report = Artifact[EvalReport]


def stage_task(run: Callable[..., R]) -> Task[..., R]:
    """Make a task that retries what is transient and caches nothing."""
    name = run.__name__.replace("_", " ")
    return task(
        name=name,
        task_run_name=f"{name} · {{ws.config.name}}",
        retries=2,
        retry_delay_seconds=[2, 15],
        retry_condition_fn=is_transient,
        cache_policy=NO_CACHE,
        persist_result=False,
    )(run)


@stage_task
def prepare_dataset(ws: Workspace) -> Data:
    """Read, split and tokenise the rows."""
    return ws.produce("data", prepare.prepare_dataset, *_rows_and_model(ws))


def check_first_rows(ws: Workspace) -> None:
    """Raise what preparing would raise later, beside a model that is being loaded for minutes.

    Where the store has the prepared rows there is nothing to check.
    """
    inputs = _rows_and_model(ws)
    if _stored(ws, prepare.prepare_dataset, *inputs) is None:
        prepare.check_inputs(*inputs)


@contextmanager
def training_ahead(ws: Workspace) -> Iterator[None]:
    """Let the launcher get ready beside the stages before it, unless the store has the adapter."""
    data = _stored(ws, prepare.prepare_dataset, *_rows_and_model(ws))
    base = _stored(ws, quantize.quantize_base, *_model_to_quantize(ws))
    if data and base and _stored(ws, train.train_adapter, base, data, *_how_to_train(ws)):
        yield
        return
    with ws.services.launcher.awake():
        yield


def _stored(
    ws: Workspace, stage: Stage[P, F], *args: P.args, **kwargs: P.kwargs
) -> Artifact[F] | None:
    return ws.store.find(stage, ws.store.key(stage, *args, **kwargs))


def _rows_and_model(
    ws: Workspace,
) -> tuple[DatasetConfig, ModelConfig, Source, Source | None, Source, Source | None]:
    config, found = ws.config, ws.sources
    rows, model = (found.dataset, found.heldout), (found.model, found.template)
    return config.dataset, config.model, *rows, *model


@stage_task
def quantize_base(ws: Workspace) -> Base:
    """Make the frozen base."""
    return ws.produce("base", quantize.quantize_base, *_model_to_quantize(ws))


def _model_to_quantize(
    ws: Workspace,
) -> tuple[ModelConfig, QuantizationConfig, Source, Source | None]:
    return ws.config.model, ws.quantization, ws.sources.model, ws.sources.template


@stage_task
def train_adapter(ws: Workspace, base: Base, data: Data) -> Adapter:
    """Train the adapter on the cluster."""
    return ws.produce("adapter", train.train_adapter, base, data, *_how_to_train(ws))


def _how_to_train(ws: Workspace) -> tuple[QuantizationConfig, AdapterConfig, TrainingConfig, int]:
    return ws.quantization, ws.config.adapter, ws.config.training, ws.config.seed


@stage_task
def evaluate_base(ws: Workspace, base: Base, data: Data) -> Report:
    """Measure the base model, which the tuned one has to beat."""
    return _evaluate(ws, "base_report", base, data)


@stage_task
def evaluate_tuned(ws: Workspace, base: Base, data: Data, adapter: Adapter) -> Report:
    """Measure base plus adapter."""
    return _evaluate(ws, "tuned_report", base, data, adapter=adapter)


@stage_task
def evaluate_merged(ws: Workspace, base: Base, data: Data, merged: Merged) -> Report:
    """Measure the merged model."""
    return _evaluate(ws, "merged_report", base, data, merged=merged)


@stage_task
def merge_adapter(ws: Workspace, base: Base, adapter: Adapter, data: Data) -> Merged:
    """Fold the adapter into its base and measure what that cost."""
    config = ws.config
    return ws.produce(
        "merged",
        merge.merge_adapter,
        config.merge,
        config.model,
        base,
        adapter,
        data,
        ws.sources.model,
    )


@stage_task
def register_model(
    ws: Workspace,
    base: Base,
    adapter: Adapter,
    merged: Merged | None,
    base_report: Report,
    tuned_report: Report,
    merged_report: Report | None,
) -> Artifact[RegisteredModel]:
    """Publish, and promote if the gate passes; again, if the registry has lost it since."""
    config = ws.config
    return ws.produce(
        "registered",
        register.register_model,
        config.registry,
        config.gate,
        config.registry.name or config.name,
        base,
        adapter,
        merged,
        base_report,
        tuned_report,
        merged_report,
    )


def _evaluate(
    ws: Workspace,
    role: str,
    base: Base,
    data: Data,
    adapter: Adapter | None = None,
    merged: Merged | None = None,
) -> Report:
    config, scorers = ws.config.evaluation, ws.sources.scorers
    return ws.produce(role, evaluate.evaluate_model, config, data, base, adapter, merged, scorers)
