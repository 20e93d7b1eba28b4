"""A run whose training is a job of a real Ray cluster: killed, called again, cancelled."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from flows.records import load_record, records
from qlora_core.config import RunConfig
from tests.backends.ray_head import Head, jobs_head, wait_until
from tests.flows.scenes import Children, Watcher, child_run_on_ray, tiny_recipe, write_rows

pytestmark = [pytest.mark.prefect, pytest.mark.ray]
NUM_STEPS = 400


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with jobs_head() as running:
        yield running


@pytest.fixture(scope="module")
def children() -> Children:
    return Children()


def recipe_at(head: Head, model: Path, folder: Path) -> RunConfig:
    return tiny_recipe(
        folder / "store",
        model,
        write_rows(folder),
        training__epochs=200,
        training__max_steps=NUM_STEPS,
        training__heldout_every=None,
        evaluation__generate=False,
        merge__enabled=False,
        snapshots__every_steps=20,
        cluster__address=head.address,
        cluster__cpus_per_worker=1,
        cluster__gpus_per_worker=0,
    )


def scratch_of(store: Path) -> Path:
    (scratch,) = (store / "train_adapter").glob(".*.scratch")
    return scratch


def started(children: Children, recipe: RunConfig, connection):
    """Start a process that runs the recipe; return it when training has begun."""
    token = {name: os.environ[name] for name in os.environ if name.startswith("RAY_AUTH")}
    environment = {"QLORAFLOW_HOME": os.environ["QLORAFLOW_HOME"], **connection.environment()}
    stepping = children.event()
    process = children.start(child_run_on_ray, recipe, environment | token, stepping)
    assert stepping.wait(180)
    return process


def prefect_log_of(store: Path) -> str:
    """What Prefect shows of all attempts of the run."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    attempts = [UUID(attempt.prefect_flow_run_id) for attempt in load_record(store).attempts]
    mine = LogFilter(flow_run_id=LogFilterFlowRunId(any_=attempts))
    with get_client(sync_client=True) as client:
        return "\n".join(line.message for line in client.read_logs(log_filter=mine))


def logs_in_mlflow(store: Path) -> list[str]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow.db'}")
    experiments = [found.experiment_id for found in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    return [file.path for file in client.list_artifacts(run.info.run_id, "logs")]


def test_a_flow_that_is_killed_leaves_its_training_to_the_next_run_of_the_recipe(
    connection, head, tiny_llama, children, tmp_path
):
    from flows.finetune import run_recipe
    from tasks.wiring import Surroundings

    recipe, store = recipe_at(head, tiny_llama, tmp_path), tmp_path / "store"
    process = started(children, recipe, connection)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    scratch = scratch_of(store)
    assert head.jobs_of(scratch) == {"0001": "RUNNING"}

    result = run_recipe(recipe, Surroundings(Watcher()))

    assert list(head.jobs_of(scratch)) == ["0001"]
    assert [record.state for record in records(store)] == ["completed"]
    facts = result.adapter.facts
    assert (facts.num_steps_run, facts.num_attempts) == (NUM_STEPS, 1)
    wait_until(lambda: "attached to it" in prefect_log_of(store), timeout_s=20)
    wait_until(lambda: "the cluster says" in prefect_log_of(store), timeout_s=20)
    token = os.environ["RAY_AUTH_TOKEN"].encode()
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in kept if token in path.read_bytes()]


def test_cancelling_a_flow_stops_its_job_and_frees_the_workers(
    connection, head, tiny_llama, children, tmp_path
):
    recipe, store = recipe_at(head, tiny_llama, tmp_path), tmp_path / "store"
    wait_until(lambda: head.running() == [], timeout_s=15)
    process = started(children, recipe, connection)
    assert head.running("RayTrainWorker")

    os.kill(process.pid, signal.SIGTERM)
    wait_until(lambda: head.running() == [], timeout_s=15)

    process.join(60)
    assert process.exitcode == 130
    assert head.jobs_of(scratch_of(store)) == {"0001": "STOPPED"}
    assert load_record(store).state == "cancelled"
    assert logs_in_mlflow(store) == ["logs/train_adapter.log"]


def test_cancelling_in_prefect_stops_the_job_and_frees_the_workers_within_15_seconds(
    connection, head, tiny_llama, children, tmp_path
):
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelling

    recipe, store = recipe_at(head, tiny_llama, tmp_path), tmp_path / "store"
    wait_until(lambda: head.running() == [], timeout_s=15)
    process = started(children, recipe, connection)
    assert head.running("RayTrainWorker")
    (attempt,) = load_record(store).attempts

    with get_client(sync_client=True) as client:  # what Prefect's UI and command line do
        client.set_flow_run_state(UUID(attempt.prefect_flow_run_id), Cancelling())
    stopped = {"0001": "STOPPED"}
    wait_until(
        lambda: head.running() == [] and head.jobs_of(scratch_of(store)) == stopped, timeout_s=15
    )

    process.join(60)
    assert process.exitcode == 130
    assert load_record(store).state == "cancelled"
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(UUID(attempt.prefect_flow_run_id)).state
    assert (state.name, state.message) == ("Cancelled", "Cancelled in Prefect.")
