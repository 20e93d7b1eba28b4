"""The whole flow on a tiny Llama against a real Prefect server and a real MLflow on SQLite."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID, uuid4

import psutil
import pytest
from prefect.client.schemas.objects import State, StateType
from prefect.futures import PrefectConcurrentFuture
from prefect.states import Pending

from flows.finetune import _finish
from flows.records import load_record, records
from flows.result import RunResult
from qlora_core.backends.in_process import InProcessLauncher
from qlora_core.config import RunConfig
from qlora_core.errors import ConfigError, DataError, UserError
from qlora_core.ports import Launcher
from tests.flows.scenes import (
    NUM_STEPS,
    STAGES,
    Children,
    Watcher,
    child_run_on_ray,
    tiny_recipe,
    write_rows,
)

pytestmark = pytest.mark.prefect

ALL = set(STAGES)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def recipe(store, tiny_llama, tmp_path_factory) -> RunConfig:
    return tiny_recipe(store, tiny_llama, write_rows(tmp_path_factory.mktemp("rows")))


@pytest.fixture(scope="module")
def children() -> Children:
    return Children()


@dataclass(frozen=True)
class Sleeper(InProcessLauncher):
    """Remembers whether it was woken before it had to train."""

    woken: list[str] = field(default_factory=list)

    @contextmanager
    def awake(self) -> Iterator[None]:
        self.woken.append("up")
        yield
        self.woken.append("down")


def run(
    config: RunConfig, watcher: Watcher | None = None, launcher: Launcher | None = None
) -> RunResult:
    from flows.finetune import run_recipe
    from tasks.wiring import Surroundings

    launcher = launcher or InProcessLauncher(config.snapshots)
    return run_recipe(config, Surroundings(watcher or Watcher(), launcher))


@pytest.fixture(scope="module")
def finished(connection, recipe) -> RunResult:
    return run(recipe)


def changed(recipe: RunConfig, part: str, **fields) -> RunConfig:
    return recipe.model_copy(update={part: getattr(recipe, part).model_copy(update=fields)})


def flow_run_of(store: Path, run_id: str, attempt: int = -1):
    from prefect.client.orchestration import get_client

    asked = load_record(store, run_id).attempts[attempt].prefect_flow_run_id
    with get_client(sync_client=True) as client:
        return client.read_flow_run(UUID(asked))


def task_states(store: Path, run_id: str) -> dict[str, str]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    mine = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_of(store, run_id).id]))
    deadline = time.monotonic() + 20  # the server writes task runs down when it gets to it
    while time.monotonic() < deadline:
        with get_client(sync_client=True) as client:
            found = client.read_task_runs(flow_run_filter=mine)
        if len(found) == len(ALL) and all(t.state.is_final() for t in found):
            break
        time.sleep(0.3)
    return {task.name: task.state.name for task in found}


def mlflow_of(store: Path):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow.db'}")


def test_a_recipe_becomes_an_adapter_a_merged_model_and_a_registered_one(finished, store):
    record = load_record(store, finished.run_id)

    assert finished.adapter.facts.num_steps_run == NUM_STEPS
    assert [report.subject for report in finished.reports()] == ["base", "tuned", "merged"]
    assert finished.registered.facts.adapter_version == "1"
    assert (finished.merged.path / "model" / "config.json").exists()
    assert record.state == "completed"
    assert record.artifacts["adapter"].digest == finished.adapter.digest
    assert record.artifacts["adapter"].facts["num_steps_run"] == NUM_STEPS


def test_every_stage_is_a_task_with_a_readable_name(finished, store):
    states = task_states(store, finished.run_id)

    expected = {f"{name.replace('_', ' ')} · tiny" for name in ALL}
    assert states == dict.fromkeys(expected, "Completed")


def test_prefect_shows_what_was_built(finished, store):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    flow_run = flow_run_of(store, finished.run_id)
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run.id]))
        )

    by_key = {artifact.key: artifact for artifact in found}
    assert set(by_key) == {"report", "comparison"}
    assert "| metric | base | tuned | merged |" in by_key["report"].data
    assert flow_run.name == finished.run_id


def test_mlflow_has_parameters_curve_inputs_results_and_files(finished, store):
    client = mlflow_of(store)
    tracked = client.get_run(finished.mlflow_run_id)

    assert finished.tracking_note == ""
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["adapter.rank"] == "4"
    assert tracked.data.metrics["tuned/loss"] == finished.tuned_report.facts.metrics["loss"].value
    curve = client.get_metric_history(finished.mlflow_run_id, "train/loss")
    assert [point.step for point in curve] == list(range(1, NUM_STEPS + 1))
    assert {i.dataset.name for i in tracked.inputs.dataset_inputs} == {"train", "heldout"}
    files = {file.path for file in client.list_artifacts(finished.mlflow_run_id)}
    assert {"recipe.yaml", "report.md", "plots"} <= files


def test_mlflow_names_the_prefect_run_and_the_artefacts(finished, store):
    tags = mlflow_of(store).get_run(finished.mlflow_run_id).data.tags

    assert tags["prefect.flow_run_id"] == str(flow_run_of(store, finished.run_id).id)
    assert tags["key.adapter"] == finished.adapter.key


def test_the_second_run_finds_everything_and_says_so(finished, recipe, store):
    watcher, launcher = Watcher(), Sleeper(recipe.snapshots)

    again = run(recipe, watcher, launcher)

    assert watcher.built == set()
    assert launcher.woken == []
    assert set(task_states(store, again.run_id).values()) == {"Cached"}
    assert again.run_id != finished.run_id
    assert again.adapter == finished.adapter
    curve = mlflow_of(store).get_metric_history(again.mlflow_run_id, "train/loss")
    assert [point.step for point in curve] == list(range(1, NUM_STEPS + 1))


def test_another_learning_rate_trains_again_and_nothing_before(finished, recipe, store):
    watcher, launcher = Watcher(), Sleeper(recipe.snapshots)

    other = run(changed(recipe, "training", learning_rate=1e-3), watcher, launcher)

    assert launcher.woken == ["up", "down"]

    before = {"prepare_dataset", "quantize_base", "evaluate base"}
    assert not watcher.built & before
    assert "train_adapter" in watcher.built
    assert other.base_report == finished.base_report
    assert other.adapter.key != finished.adapter.key


def test_a_model_that_the_registry_lost_is_registered_again(finished, recipe, store):
    mlflow_of(store).delete_registered_model("tiny")

    again = run(recipe)

    assert mlflow_of(store).get_model_version("tiny", again.registered.facts.adapter_version)


def test_without_merging_and_registering_the_run_ends_with_the_report(finished, recipe, store):
    smaller = changed(recipe, "merge", enabled=False)

    result = run(changed(smaller, "registry", enabled=False))

    assert (result.merged, result.merged_report, result.registered) == (None, None, None)
    assert [report.subject for report in result.reports()] == ["base", "tuned"]


def test_bad_rows_end_the_run_with_their_own_error_and_are_not_tried_again(
    connection, recipe, store, tmp_path
):
    rows = tmp_path / "bad.jsonl"
    good = '{"prompt": "a", "completion": "b"}\n'
    rows.write_text(600 * good + '{"prompt": \n')  # beyond the rows that are checked beforehand

    with pytest.raises(DataError, match=r"bad\.jsonl"):
        run(changed(recipe, "dataset", source=str(rows)))

    record = load_record(store)
    assert record.state == "failed"
    assert "bad.jsonl" in record.error
    assert flow_run_of(store, record.run_id).state.name == "Failed"
    prepare = next(k for k in task_states_now(store, record.run_id) if k[0].startswith("prepare"))
    assert prepare[1] == 1
    assert (
        mlflow_of(store)
        .search_runs(
            [mlflow_of(store).get_experiment_by_name("tiny").experiment_id],
            f"tags.`qloraflow.run_id` = '{record.run_id}'",
        )[0]
        .info.status
        == "FAILED"
    )


def test_bad_first_rows_end_the_run_before_any_stage_begins(connection, recipe, store, tmp_path):
    rows = tmp_path / "bad.jsonl"
    rows.write_text('{"prompt": \n')
    watcher = Watcher()
    fresh = changed(recipe, "quantization", double=False)

    with pytest.raises(DataError, match=r"bad\.jsonl:1"):
        run(changed(fresh, "dataset", source=str(rows)), watcher)

    record = load_record(store)
    assert record.state == "failed"
    assert "bad.jsonl" in record.error
    assert not watcher.built


def task_states_now(store: Path, run_id: str) -> list[tuple[str, int]]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    mine = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_of(store, run_id).id]))
    for _ in range(60):
        with get_client(sync_client=True) as client:
            found = client.read_task_runs(flow_run_filter=mine)
        if any(t.name.startswith("prepare") and t.state.is_final() for t in found):
            break
        time.sleep(0.3)
    return [(t.name, t.run_count) for t in found]


@pytest.mark.parametrize(
    ("part", "field"),
    [("workspace", "tracking_uri"), ("dataset", "source"), ("cluster", "address")],
)
def test_a_password_in_the_recipe_is_refused_before_anybody_stores_it(recipe, store, part, field):
    before = len(records(store))

    with pytest.raises(ConfigError, match=f"{part}.{field} holds a password"):
        run(changed(recipe, part, **{field: "https://me:hunter2@somewhere.example"}))

    assert len(records(store)) == before


@pytest.mark.parametrize("address", ["https://t0ken@ray.example", "https://ray.example/?t=t0ken"])
def test_a_token_in_the_clusters_address_is_refused_before_anybody_stores_it(
    recipe, store, address
):
    before = len(records(store))

    with pytest.raises(UserError, match="holds more than a place") as caught:
        run(changed(recipe, "cluster", address=address))

    assert "t0ken" not in str(caught.value)
    assert len(records(store)) == before


def test_a_deployed_run_with_a_password_ends_before_it_writes_it_down(
    connection, recipe, store, caplog
):
    from flows.finetune import finetune

    secret = changed(recipe, "workspace", tracking_uri="https://me:hunter2@somewhere.example")
    before = {path for path in store.rglob("*") if path.is_file()}

    with pytest.raises(ConfigError, match=r"workspace\.tracking_uri holds a password"):
        finetune(secret.model_dump(mode="json"))  # as Prefect's form and its worker call it

    assert {path for path in store.rglob("*") if path.is_file()} == before
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize("address", ["head", "head:six", "127.0.0.1", "https://head:six"])
def test_what_is_no_address_is_told_before_anything_is_prepared(recipe, store, address):
    before = len(records(store))

    with pytest.raises(UserError, match="is no address of a Ray"):
        run(changed(recipe, "cluster", address=address))

    assert len(records(store)) == before


def test_what_a_stage_raised_is_told_and_not_that_others_waited_for_it(connection):
    """The server learns of states later than we do; here it never does."""
    mistake = UserError("nobody answers", fix="start a head")
    failed = ended_in(State(type=StateType.FAILED, data=mistake))
    not_ready = ended_in(Pending(name="NotReady"))

    with pytest.raises(UserError, match="nobody answers"):
        _finish({"base_report": not_ready, "adapter": failed})


def ended_in(state: State) -> PrefectConcurrentFuture:
    ended = Future()
    ended.set_result(state)
    return PrefectConcurrentFuture(uuid4(), ended)


def test_prefect_shows_the_recipe_as_a_documented_form():
    from prefect.utilities.callables import parameter_schema

    from flows.finetune import finetune

    schema = parameter_schema(finetune).model_dump()

    rank = schema["definitions"]["AdapterConfig"]["properties"]["rank"]
    assert rank["description"].startswith("Rank R of the update")
    assert schema["required"] == ["config"]


def test_a_run_killed_in_every_stage_one_after_the_other_is_one_run_that_loses_nothing(
    connection, tiny_llama, children, tmp_path
):
    recipe = tiny_recipe(tmp_path / "store", tiny_llama, write_rows(tmp_path))
    environment = {"QLORAFLOW_HOME": os.environ["QLORAFLOW_HOME"], **connection.environment()}
    sealed: dict[str, str] = {}

    for stage in STAGES:
        assert children.kill_in(recipe, environment, stage) == -signal.SIGKILL
        record = load_record(tmp_path / "store")
        assert record.state == "interrupted"
        digests = {role: ref.digest for role, ref in record.artifacts.items()}
        assert {role: digests[role] for role in sealed} == sealed
        sealed = digests
    watcher = Watcher()
    result = run(recipe, watcher)

    (record,) = records(tmp_path / "store")
    assert record.state == "completed"
    assert len(record.attempts) == len(STAGES) + 1
    assert watcher.built <= {"register_model"}
    assert result.adapter.facts.num_attempts == 2
    assert result.adapter.facts.resumed_at[0] >= 1
    states = [
        flow_run_of(tmp_path / "store", record.run_id, attempt).state.name
        for attempt in range(len(record.attempts))
    ]
    assert states == ["Crashed"] * len(STAGES) + ["Completed"]
    curve = mlflow_of(tmp_path / "store").get_metric_history(result.mlflow_run_id, "train/loss")
    assert [point.step for point in curve] == list(range(1, NUM_STEPS + 1))


@pytest.mark.ray
def test_a_run_on_ray_that_is_told_to_end_ends_whole_and_goes_on_when_called_again(
    connection, tiny_llama, children, tmp_path
):
    from flows.finetune import run_recipe
    from tasks.wiring import Surroundings

    store = tmp_path / "store"
    rows = write_rows(tmp_path)
    recipe = tiny_recipe(store, tiny_llama, rows, training__max_steps=60, merge__enabled=False)
    environment = {"QLORAFLOW_HOME": os.environ["QLORAFLOW_HOME"], **connection.environment()}
    stepping = children.event()
    process = children.start(child_run_on_ray, recipe, environment, stepping)
    assert stepping.wait(180)
    family = psutil.Process(process.pid).children(recursive=True)

    os.kill(process.pid, signal.SIGTERM)
    process.join(60)

    assert process.exitcode == 130
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    cancelled = load_record(store)
    assert cancelled.state == "cancelled"
    assert flow_run_of(store, cancelled.run_id).state.name == "Cancelled"

    result = run_recipe(recipe, Surroundings(Watcher()))

    assert result.run_id == cancelled.run_id
    assert result.adapter.facts.num_steps_run == 60
    assert result.adapter.facts.resumed_at[0] >= 1
