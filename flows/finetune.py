"""The main flow: one recipe to a verified fine-tuned model.

::

    prepare dataset --+--> train adapter --+--> evaluate tuned ------------+
                      |                    '--> merge --> evaluate merged -+--> register
    quantize base ----+--> evaluate base ----------------------------------+

What does not depend on each other runs at the same time, in threads; training computes in Ray's
processes. On a cluster evaluation does, too, and the base's then waits until training is done with
the workers. The first stage that fails ends the run at once, since a person waits for the reason.

A flow run is Prefect's; a *run* is ours (see `records`): if this process is killed, the next call
with the same recipe is another flow run, and the same run in our records and in MLflow.
"""

from collections.abc import Callable, Mapping
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.futures import PrefectFuture, as_completed
from prefect.task_runners import ThreadPoolTaskRunner

from flows import tracking
from flows.lifecycle import (
    ActiveRun,
    interruption_cancels,
    refuse_secrets,
    running,
    sigterm_interrupts,
)
from flows.result import RunResult, page
from flows.server import Connection, ensure_server
from qlora_core.config import RunConfig
from tasks import places, stages, wiring
from tasks.wiring import Surroundings, Workspace

_threads: Any = ThreadPoolTaskRunner(max_workers=8)  # Prefect's own types disagree on it


def run_recipe(
    config: RunConfig,
    surroundings: Surroundings,
    connect: Callable[[], Connection] = lambda: ensure_server(places.home()),
) -> RunResult:
    """Run a recipe on the Prefect server in use; what `qlora run` calls.

    Args:
        config: The recipe.
        surroundings: Who watches, and what trains.
        connect: Returns the server.

    Raises:
        QLoraError: What went wrong, in the words of the stage it went wrong in.
        KeyboardInterrupt: The run was cancelled by Ctrl-C or SIGTERM, and is marked so; a
            `CancelledInPrefect` if it was there.
    """
    refuse_secrets(config)  # before Prefect stores it as the flow's parameter
    with (
        connect().in_use(),
        wiring.surrounded_by(surroundings),
        sigterm_interrupts(),
        interruption_cancels(),
    ):
        return finetune(config)


@flow(
    name="finetune",
    task_runner=_threads,
    persist_result=False,
)
def finetune(config: RunConfig) -> RunResult:
    """From rows and a model to an evaluated, merged and registered fine-tuned model.

    Args:
        config: The recipe.
    """
    refuse_secrets(config)  # Prefect's form does not, and what begins here writes it down
    with running(config) as run:
        stages.check_first_rows(run.workspace)
        with stages.training_ahead(run.workspace):
            made = _finish(_submit(run.workspace))
        return _publish(run, made)


def _submit(ws: Workspace) -> dict[str, PrefectFuture[Any]]:
    """Submit every stage; Prefect starts each when its inputs are there."""
    data = stages.prepare_dataset.submit(ws)
    base = stages.quantize_base.submit(ws)
    adapter = stages.train_adapter.submit(ws, base, data)
    made: dict[str, PrefectFuture[Any]] = {
        "data": data,
        "base": base,
        "base_report": stages.evaluate_base.submit(ws, base, data, wait_for=_first(ws, adapter)),
        "adapter": adapter,
        "tuned_report": stages.evaluate_tuned.submit(ws, base, data, adapter),
    }
    if ws.config.merge.enabled:
        merged = stages.merge_adapter.submit(ws, base, adapter, data)
        made["merged"] = merged
        made["merged_report"] = stages.evaluate_merged.submit(ws, base, data, merged)
    if ws.config.registry.enabled:
        models = (base, adapter, made.get("merged"))
        reports = (made["base_report"], made["tuned_report"], made.get("merged_report"))
        made["registered"] = stages.register_model.submit(ws, *models, *reports)
    return made


def _first(ws: Workspace, adapter: PrefectFuture[Any]) -> list[PrefectFuture[Any]]:
    """Return what the base's evaluation waits for: training, if it needs the same workers.

    Ray Train gives up when others keep its workers busy for some minutes.
    """
    return [adapter] if ws.services.crew else []


def _finish(made: Mapping[str, PrefectFuture[Any]]) -> dict[str, Any]:
    """Wait for all; raise what the first one that failed raised."""
    for future in as_completed(list(made.values())):
        future.wait()  # takes its last state along; without, `state` asks the server, which lags
        if future.state.is_failed() or future.state.is_crashed():
            future.result()
    return {role: future.result() for role, future in made.items()}


def _publish(run: ActiveRun, made: dict[str, Any]) -> RunResult:
    """Tell MLflow and Prefect what came out."""
    record = run.record.record
    result = RunResult(run_id=record.run_id, mlflow_run_id=run.tracker.run_id, **made)
    tracking.log_inputs(run.tracker, record.config, result.data)
    tracking.log_result(run.tracker, record, result, run.record.folder)
    report = run.finish_tracking()
    update = {"mlflow_run_id": report.run_id, "tracking_note": report.sentence()}
    result = result.model_copy(update=update)
    _show_in_prefect(result)
    return result


def _show_in_prefect(result: RunResult) -> None:
    create_markdown_artifact(page(result), key="report", description="What this run made")
    rows = [
        {"subject": report.subject, **{n: m.value for n, m in report.metrics.items()}}
        for report in result.reports()
    ]
    create_table_artifact(rows, key="comparison", description="Base, tuned and merged")
