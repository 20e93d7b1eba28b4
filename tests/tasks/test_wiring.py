"""What the composition root decides: places, sources, retries, and what a produced artefact is."""

import fcntl
import logging
import threading
import time
from pathlib import Path

import pytest
from prefect.states import Failed

from flows.planning import make_plan
from qlora_core.artifacts import Facts, RegisteredModel
from qlora_core.backends.in_process import InProcessLauncher
from qlora_core.backends.memory import MemoryRegistry, MemoryTracker, RecordingProgress
from qlora_core.backends.ray_jobs import RayJobsLauncher
from qlora_core.backends.ray_train import RayTrainLauncher
from qlora_core.config import ClusterConfig, RunConfig, SnapshotConfig
from qlora_core.errors import DataError, LaunchError, ResourceError, UserError
from qlora_core.ports import Services, stage
from qlora_core.store import Store
from tasks import places
from tasks.progress import RunProgress, StoppedError
from tasks.wiring import (
    Surroundings,
    Workspace,
    find_sources,
    is_transient,
    open_workspace,
    resolved_quantization,
    surrounded_by,
)


class Counted(Facts):
    number: int


@stage("count", version=1, facts=Counted)
def count(ctx, number: int) -> Counted:
    ctx.progress.update("count", 1, 1)
    return Counted(number=number)


@stage("register", version=1, facts=RegisteredModel)
def register(ctx, name: str) -> RegisteredModel:
    version = str(len(list(ctx.out.parent.parent.glob("damaged/*"))) + 1)
    return RegisteredModel(
        name=name,
        adapter_version=version,
        merged_version=None,
        aliases=(),
        promoted=False,
        reasons=(),
    )


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"1")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "model": {"source": str(tmp_path / "model")},
            "dataset": {"source": str(tmp_path / "rows.jsonl")},
        }
    )


class Kept(list):
    def __call__(self, role, artifact, cached):
        self.append((role, artifact.facts, cached))


@pytest.fixture
def workspace(config, tmp_path):
    progress = RunProgress(RecordingProgress())
    services = Services(
        MemoryTracker(), MemoryRegistry(), launcher=None, progress=progress, check=progress.check
    )
    return Workspace(config, Store(tmp_path / "store"), services, progress, Kept())


def test_what_is_built_is_returned_as_it_is_and_what_was_there_in_a_state_named_cached(workspace):
    built = workspace.produce("counted", count, 3)
    found = workspace.produce("counted", count, 3)

    assert built.facts.number == 3
    assert (found.name, found.is_completed(), found.data) == ("Cached", True, built)
    assert [cached for _, _, cached in workspace._keep] == [False, True]


def test_a_stopped_run_ends_a_stage_at_its_next_report_and_starts_no_other(workspace):
    workspace.stop()

    with pytest.raises(StoppedError):
        workspace.produce("counted", count, 3)
    with pytest.raises(StoppedError):
        workspace.progress.update("count", 1, 2)


def test_a_stage_that_waits_for_another_run_ends_soon_after_its_own_is_stopped(workspace):
    key = workspace.store.key(count, 3)
    lock = workspace.store.root / "count" / f".{key}.lock"
    lock.parent.mkdir(parents=True)
    threading.Timer(0.5, workspace.stop).start()

    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        started = time.monotonic()
        with pytest.raises(StoppedError, match="count was stopped"):
            workspace.produce("counted", count, 3)

    assert 0.4 < time.monotonic() - started < 2.5


def test_a_run_that_is_opened_can_stop_what_waits(config):
    with surrounded_by(Surroundings(RecordingProgress(), InProcessLauncher(SnapshotConfig()))):
        opened = open_workspace(config, MemoryTracker(), {}, Kept())
    opened.services.check("count")

    opened.stop()

    with pytest.raises(StoppedError):
        opened.services.check("count")


def test_who_ends_a_run_waits_for_its_stages_and_is_told_which_do_not_end(workspace):
    begun, may_end, saved = threading.Event(), threading.Event(), []

    @stage("stubborn", version=1, facts=Counted)
    def stubborn(ctx) -> Counted:
        begun.set()
        assert may_end.wait(30)
        return Counted(number=1)

    def keep(role, artifact, cached):
        time.sleep(0.2)
        saved.append(role)

    workspace._keep = keep
    idle = workspace.wait_for_stages(30)
    running = threading.Thread(target=workspace.produce, args=("one", stubborn))
    running.start()
    assert begun.wait(30)

    left = workspace.wait_for_stages(0.1)
    may_end.set()
    ended = workspace.wait_for_stages(30)

    assert (idle, left, ended) == ([], ["stubborn"], [])
    assert saved == ["one"], "what it made is on record by then"
    running.join()


def test_a_stage_that_fails_is_waited_for_no_longer(workspace):
    @stage("lost", version=1, facts=Counted)
    def lost(ctx) -> Counted:
        raise LaunchError("the driver is gone")

    with pytest.raises(LaunchError):
        workspace.produce("one", lost)

    assert workspace.wait_for_stages(0) == []


def test_what_a_stage_raises_because_it_was_stopped_is_told_as_that_and_not_retried(workspace):
    @stage("lost", version=1, facts=Counted)
    def lost(ctx) -> Counted:
        workspace.stop()
        raise LaunchError("the driver is gone")

    with pytest.raises(StoppedError) as caught:
        workspace.produce("counted", lost)

    assert not is_transient(None, None, Failed(data=caught.value))


def test_a_model_the_registry_does_not_hold_is_registered_again(workspace):
    first = workspace.produce("registered", register, "tiny")

    second = workspace.produce("registered", register, "tiny")

    assert first.facts.adapter_version == "1"
    assert second.facts.adapter_version == "2"


def test_the_runs_log_hears_now_and_then_how_far_a_stage_is(caplog):
    often, seldom = RunProgress(RecordingProgress(), 0.0), RunProgress(RecordingProgress(), 60.0)

    with caplog.at_level(logging.INFO):
        often.update("train_adapter", 3, 8, "loss 1.250")
        often.update("merge_adapter", 0.5, 2)
        seldom.update("train_adapter", 4, 8)
        seldom.update("train_adapter", 5, 8)

    told = ["train_adapter: 3 of 8, loss 1.250", "merge_adapter: 0.50 of 2"]
    assert [line.message for line in caplog.records] == told


def test_a_thread_that_a_stage_started_may_speak_as_well(workspace):
    speaking = threading.Thread(target=workspace.progress.say, args=("count", "hello"))

    speaking.start()
    speaking.join()

    assert not workspace.progress.is_stopping


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (LaunchError("workers were lost"), True),
        (ConnectionResetError("peer"), True),
        (TimeoutError(), True),
        (DataError("row 3"), False),
        (ValueError("a mistake of ours"), False),
    ],
)
def test_what_the_world_broke_is_tried_again_and_what_a_person_can_mend_is_not(error, again):
    assert is_transient(None, None, Failed(data=error)) is again


def test_the_recipes_words_go_before_the_environments(config, monkeypatch, tmp_path):
    monkeypatch.setenv("QLORAFLOW_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env:5000")
    monkeypatch.setenv("RAY_ADDRESS", "env:6379")
    said = config.model_copy(
        update={
            "workspace": config.workspace.model_copy(
                update={"store": str(tmp_path / "mine"), "tracking_uri": "http://mine:5000"}
            ),
            "cluster": config.cluster.model_copy(update={"address": "mine:6379"}),
        }
    )

    assert places.store_root(config) == tmp_path / "home"
    assert places.tracking_place(config).tracking_uri == "http://env:5000"
    assert places.cluster(config).address == "env:6379"
    assert places.store_root(said) == tmp_path / "mine"
    assert places.tracking_place(said).tracking_uri == "http://mine:5000"
    assert places.cluster(said).address == "mine:6379"


@pytest.mark.parametrize(
    ("gpus", "asked", "found", "dtype"),
    [
        (None, "auto", 1.0, "bfloat16"),
        (0.5, "auto", 0.5, "bfloat16"),
        (0, "auto", 0, "float32"),
        (None, "float16", 1.0, "float16"),
        (None, "float32", None, "float32"),
    ],
)
@pytest.mark.parametrize("has_gpu_here", [False, True])
def test_on_a_cluster_no_recipe_means_another_thing_by_where_it_is_started(
    gpus, asked, found, dtype, has_gpu_here, config, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu_here)
    cluster = config.cluster.model_copy(update={"address": "head:6379", "gpus_per_worker": gpus})
    quantization = config.quantization.model_copy(update={"compute_dtype": asked})
    there = config.model_copy(update={"cluster": cluster, "quantization": quantization})

    assert places.cluster(there).gpus_per_worker == found
    assert resolved_quantization(there).compute_dtype == dtype


def test_without_any_word_mlflow_is_sqlite_in_the_store(config, monkeypatch, tmp_path):
    monkeypatch.setenv("QLORAFLOW_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    place = places.tracking_place(config)

    assert place.tracking_uri == f"sqlite:///{tmp_path / 'home' / 'mlflow.db'}"


def test_a_source_that_is_not_there_is_told_by_its_field(config, tmp_path):
    (tmp_path / "rows.jsonl").unlink()

    with pytest.raises(UserError, match=r"dataset\.source"):
        find_sources(config)


def test_automatic_compute_dtype_is_decided_before_it_is_part_of_a_key(config):
    assert config.quantization.compute_dtype == "auto"
    assert resolved_quantization(config).compute_dtype in ("float32", "bfloat16", "float16")


def test_more_workers_than_this_machine_holds_are_found_before_any_work(config, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    many = config.model_copy(update={"cluster": ClusterConfig(workers=5000)})
    elsewhere = config.model_copy(update={"cluster": ClusterConfig(workers=5000, address="h:1")})
    watched = surrounded_by(Surroundings(RecordingProgress()))

    with watched, pytest.raises(ResourceError, match="workers=5000"):
        open_workspace(many, MemoryTracker(), {}, Kept())
    with pytest.raises(ResourceError, match="workers=5000"):
        make_plan(many)

    assert open_workspace(elsewhere, MemoryTracker(), {}, Kept()).config == elsewhere


@pytest.mark.parametrize(
    ("address", "launcher"), [("https://ray.example", RayJobsLauncher), ("h:1", RayTrainLauncher)]
)
def test_training_is_a_job_where_the_address_is_a_jobs_endpoint(
    config, monkeypatch, address, launcher
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    named = config.model_copy(update={"cluster": ClusterConfig(address=address, workers=5000)})

    with surrounded_by(Surroundings(RecordingProgress())):
        by_recipe = open_workspace(named, MemoryTracker(), {}, Kept())
        monkeypatch.setenv("RAY_ADDRESS", address)
        by_environment = open_workspace(config, MemoryTracker(), {}, Kept())

    assert type(by_recipe.services.launcher) is launcher
    assert type(by_environment.services.launcher) is launcher


@pytest.mark.parametrize(
    ("address", "valid"),
    [("http://head:port", "http://head:8265"), ("head", "head:6379"), ("h:99999", "head:6379")],
)
def test_what_cannot_be_an_address_is_told_before_any_work(config, address, valid):
    wrong = config.model_copy(update={"cluster": ClusterConfig(address=address)})

    with pytest.raises(UserError, match=valid):
        make_plan(wrong)


@pytest.mark.parametrize("wanted", [False, True])
def test_a_base_that_shall_lie_with_the_host_does_so_in_evaluation_too(config, wanted):
    changed = config.model_copy(update={"cluster": ClusterConfig(offload_base=wanted)})

    with surrounded_by(Surroundings(RecordingProgress())):
        workspace = open_workspace(changed, MemoryTracker(), {}, Kept())

    assert workspace.services.offloads_base is wanted


def test_a_running_cluster_evaluates_too_unless_the_run_trains_here(config):
    def crew(launcher=None, **cluster):
        changed = config.model_copy(update={"cluster": ClusterConfig(**cluster)})
        with surrounded_by(Surroundings(RecordingProgress(), launcher)):
            return open_workspace(changed, MemoryTracker(), {}, Kept()).services.crew

    shared = {"address": "10.0.0.1:6379", "workers": 4, "gpus_per_worker": 1}

    assert crew(**shared).cluster == ClusterConfig(**shared)
    assert crew(address="10.0.0.1:6379") is not None
    assert crew(workers=1) is None
    assert crew(InProcessLauncher(SnapshotConfig()), **shared) is None
