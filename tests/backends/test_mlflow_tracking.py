import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_core.artifacts import Frozen, Metric
from qlora_core.backends.journal import Journal, MetricsRecord
from qlora_core.backends.masking import mask_credentials
from qlora_core.backends.mlflow_client import Place, connect, local_place
from qlora_core.backends.mlflow_registry import MlflowRegistry
from qlora_core.backends.mlflow_tracking import MlflowTracker, flatten, replay, try_out, waiting
from qlora_core.errors import ArtifactError, UserError
from qlora_core.ports import Candidate
from tests.backends.mlflow_place import fresh_place

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path) -> Place:
    return fresh_place(tmp_path / "store")


def tracker(folder: Path, place: Place, **more) -> MlflowTracker:
    more = {"sample_every_s": None} | more
    return MlflowTracker(
        folder / "journal",
        place.tracking_uri,
        "cron",
        "a run",
        artifact_location=place.artifact_location,
        **more,
    )


def finish(tracked: MlflowTracker) -> str:
    report = tracked.close("FINISHED", timeout_s=60)
    assert report.is_complete(), report.sentence()
    return report.run_id


def history(place: Place, run_id: str, name: str) -> list[tuple[int, float]]:
    points = connect(place.tracking_uri).get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in points)


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def nowhere(monkeypatch) -> Place:
    """An address where nobody answers; asked once at a time, to keep the test short."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return Place(tracking_uri=f"http://127.0.0.1:{closed_port()}")


def test_everything_that_was_logged_is_in_mlflow(tmp_path, place):
    (tmp_path / "report.txt").write_text("good")
    tracked = tracker(tmp_path, place, tags={"qlora.flow": "42"})

    tracked.log_params({"training.learning_rate": 2e-4, "long": "x" * 5999})
    for step in range(1, 251):
        tracked.log_metrics({"loss": 1 / step, "heldout/loss": 2 / step}, step)
    tracked.log_dataset("cron", "d" * 64, "/data/cron.jsonl", "training", 7)
    tracked.log_file(tmp_path / "report.txt", "reports")
    tracked.set_tags({"later": "yes"})
    run_id = finish(tracked)

    client = connect(place.tracking_uri)
    run = client.get_run(run_id)
    dataset = run.inputs.dataset_inputs[0]
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a run"
    assert run.data.params == {"training.learning_rate": "0.0002", "long": "x" * 5999}
    assert history(place, run_id, "loss") == [(step, 1 / step) for step in range(1, 251)]
    assert run.data.tags["qlora.flow"] == "42"
    assert run.data.tags["later"] == "yes"
    assert run.data.tags["mlflow.source.name"] == "qlora"
    assert {tag.key: tag.value for tag in dataset.tags}["digest"] == "d" * 64
    assert dataset.dataset.digest == "d" * 36
    kept = Path(run.info.artifact_uri.removeprefix("file://")) / "reports" / "report.txt"
    assert kept.read_text() == "good"
    assert kept.is_relative_to(tmp_path / "store" / "mlartifacts")


def test_a_name_and_step_that_is_logged_twice_counts_once(tmp_path, place):
    tracked = tracker(tmp_path, place)

    tracked.log_metrics({"loss": 1.0}, 7)
    tracked.log_metrics({"loss": 2.0}, 7)
    run_id = finish(tracked)

    assert history(place, run_id, "loss") == [(7, 1.0)]


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(tmp_path, place):
    first = tracker(tmp_path, place)
    for step in range(10):
        first.log_metrics({"loss": float(step)}, step)
    run_id = first.close("FAILED", timeout_s=60).run_id

    second = tracker(tmp_path, place)
    for step in range(5, 15):  # from the last snapshot on
        second.log_metrics({"loss": float(step)}, step)
    finish(second)

    assert second.run_id == run_id
    assert history(place, run_id, "loss") == [(step, float(step)) for step in range(15)]
    assert connect(place.tracking_uri).get_run(run_id).info.status == "FINISHED"


def test_points_of_a_lost_journal_are_not_sent_twice_to_a_given_run(tmp_path, place):
    first = tracker(tmp_path / "here", place)
    first.log_metrics({"loss": 1.0}, 1)
    run_id = finish(first)

    second = tracker(tmp_path / "there", place, run_id=run_id)
    second.log_metrics({"loss": 1.5}, 1)
    second.log_metrics({"loss": 2.0}, 2)

    assert finish(second) == run_id
    assert history(place, run_id, "loss") == [(1, 1.0), (2, 2.0)]


VICTIM = """
import sys, time
from pathlib import Path
from qlora_core.backends.mlflow_registry import MlflowRegistry
from qlora_core.backends.mlflow_tracking import MlflowTracker

folder, uri, location = sys.argv[1:]
tracker = MlflowTracker(Path(folder), uri, "cron", "a run", artifact_location=location)
step = 0
while True:
    tracker.log_metrics({"loss": float(step)}, step)
    step += 1
    if tracker.run_id and step % 50 == 0:
        print(step, flush=True)
    time.sleep(0.002)
"""


@pytest.mark.parametrize("lines_before_kill", [1, 4])
def test_the_successor_of_a_killed_process_loses_and_doubles_nothing(
    tmp_path, place, lines_before_kill
):
    arguments = [str(tmp_path / "journal"), place.tracking_uri, place.artifact_location]
    victim = subprocess.Popen(
        [sys.executable, "-c", VICTIM, *arguments], stdout=subprocess.PIPE, cwd=ROOT
    )
    for _ in range(lines_before_kill):
        logged = int(victim.stdout.readline())
    victim.send_signal(signal.SIGKILL)
    victim.wait()

    successor = tracker(tmp_path, place)
    for step in range(logged - 20, logged + 200):
        successor.log_metrics({"loss": float(step)}, step)
    run_id = finish(successor)

    client = connect(place.tracking_uri)
    experiment = client.get_experiment_by_name("cron")
    assert [run.info.run_id for run in client.search_runs([experiment.experiment_id])] == [run_id]
    steps = [step for step, _ in history(place, run_id, "loss")]
    assert steps == list(range(logged + 200))


def test_a_run_made_just_before_a_kill_is_found_again(tmp_path, place):
    first = tracker(tmp_path, place)
    first.log_metrics({"loss": 1.0}, 1)
    run_id = finish(first)
    destination = tmp_path / "journal" / "destination.json"
    text = destination.read_text()
    destination.write_text(text.replace(f'"{run_id}"', "null"))

    second = tracker(tmp_path, place)

    assert finish(second) == run_id


def test_an_absent_server_stops_nobody_and_replay_delivers_everything_once(
    tmp_path, place, nowhere
):
    tracked = tracker(tmp_path, nowhere)
    tracked.log_params({"rank": 16})
    for step in range(300):
        tracked.log_metrics({"loss": float(step)}, step)
    tracked.log_dataset("cron", "d" * 64, "org/cron", "training", 7)

    report = tracked.close("FINISHED", timeout_s=1)
    journal = tmp_path / "journal"

    assert report.num_waiting == 305  # also start, tags and end
    assert report.run_id is None
    assert str(journal) in report.sentence()
    assert waiting(tmp_path) == [journal]

    tracked.close("FINISHED", timeout_s=60)  # let its thread give up and free the journal
    delivered = replay(journal, place.tracking_uri)
    again = replay(journal, place.tracking_uri)

    assert delivered.is_complete()
    assert waiting(tmp_path) == []
    assert again.run_id == delivered.run_id
    run = connect(place.tracking_uri).get_run(delivered.run_id)
    assert history(place, delivered.run_id, "loss") == [(s, float(s)) for s in range(300)]
    assert run.info.status == "FINISHED"
    assert run.data.params == {"rank": "16"}
    assert len(run.inputs.dataset_inputs) == 1


def test_replay_of_what_was_already_sent_changes_nothing(tmp_path, place):
    tracked = tracker(tmp_path, place)
    for step in range(5):
        tracked.log_metrics({"loss": float(step)}, step)
    tracked.log_dataset("cron", "d" * 64, "org/cron", "training", 7)
    run_id = finish(tracked)
    (tmp_path / "journal" / "acknowledged.json").unlink()  # as if every answer had been lost

    report = replay(tmp_path / "journal")

    assert report.is_complete()
    assert report.run_id == run_id
    assert history(place, run_id, "loss") == [(step, float(step)) for step in range(5)]
    assert len(connect(place.tracking_uri).get_run(run_id).inputs.dataset_inputs) == 1


def test_points_that_the_server_lost_are_sent_again_before_the_run_ends(tmp_path, place):
    tracked = tracker(tmp_path, place)
    tracked.log_metrics({"loss": 3.0}, 3)
    tracked.log_metrics({"loss": 4.0}, 4)
    run_id = tracked.wait_for_run_id(60)
    deadline = time.monotonic() + 60
    while len(history(place, run_id, "loss")) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    with sqlite3.connect(tmp_path / "store" / "mlflow.db") as database:
        database.execute("delete from metrics where step = 3")

    finish(tracked)

    assert history(place, run_id, "loss") == [(3, 3.0), (4, 4.0)]


def test_a_run_that_somebody_deleted_is_made_anew_with_everything(tmp_path, place):
    first = tracker(tmp_path, place)
    first.log_metrics({"loss": 1.0}, 1)
    deleted = finish(first)
    connect(place.tracking_uri).delete_run(deleted)

    second = tracker(tmp_path, place)
    second.log_metrics({"loss": 2.0}, 2)
    run_id = finish(second)

    assert run_id != deleted
    assert history(place, run_id, "loss") == [(1, 1.0), (2, 2.0)]


def test_replay_ends_a_run_whose_process_was_killed(tmp_path, place):
    script = VICTIM.replace("step % 50 == 0", "step > 50")
    arguments = [str(tmp_path / "journal"), place.tracking_uri, place.artifact_location]
    victim = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, cwd=ROOT
    )
    victim.stdout.readline()
    busy = replay(tmp_path / "journal")
    victim.send_signal(signal.SIGKILL)
    victim.wait()

    report = replay(tmp_path / "journal")

    assert "another process" in busy.reason
    assert report.is_complete()
    assert connect(place.tracking_uri).get_run(report.run_id).info.status == "KILLED"


def test_an_infinite_value_becomes_a_tag_and_never_a_number(tmp_path, place):
    tracked = tracker(tmp_path, place)

    tracked.log_metrics({"loss": 1.0}, 11)
    tracked.log_metrics({"loss": math.inf}, 12)
    tracked.log_metrics({"loss": -math.inf}, 13)
    tracked.log_metrics({"loss": math.nan}, 14)
    run_id = finish(tracked)

    run = connect(place.tracking_uri).get_run(run_id)
    points = connect(place.tracking_uri).get_metric_history(run_id, "loss")
    assert run.data.tags["nonfinite.loss"] == "infinite at step 12 and 1 more"
    assert sorted(point.step for point in points) == [11, 14]
    assert all(math.isnan(point.value) for point in points if point.step == 14)


def test_a_parameter_that_changes_on_resume_is_kept_as_a_tag(tmp_path, place):
    first = tracker(tmp_path, place)
    first.log_params({"workers": 1, "rank": 16})
    finish(first)

    second = tracker(tmp_path, place)
    second.log_params({"workers": 2, "rank": 16})
    run = connect(place.tracking_uri).get_run(finish(second))

    assert run.data.params == {"workers": "1", "rank": "16"}
    assert run.data.tags["changed.workers"] == "2"
    assert "changed.rank" not in run.data.tags


def test_what_mlflow_refuses_is_counted_and_holds_nothing_up(tmp_path, place):
    tracked = tracker(tmp_path, place)

    tracked.log_metrics({"loss": 1.0}, 1)
    tracked.log_dataset("n" * 501, "d" * 64, "org/cron", "training", 7)
    tracked.log_metrics({"loss": 2.0}, 2)
    report = tracked.close("FINISHED", timeout_s=60)

    assert (report.num_waiting, report.num_refused) == (0, 1)
    assert "refused 1" in report.sentence()
    assert history(place, report.run_id, "loss") == [(1, 1.0), (2, 2.0)]


def test_a_file_that_is_not_there_is_counted_as_lost(tmp_path, place):
    tracked = tracker(tmp_path, place)

    tracked.log_file(tmp_path / "nothing.txt")
    report = tracked.close("FINISHED", timeout_s=60)

    assert report.num_lost == 1
    assert "nothing.txt" in report.sentence()


def test_passwords_are_written_nowhere(tmp_path, place, nowhere):
    secret = "hunter2canary"
    uri = nowhere.tracking_uri.replace("://", f"://me:{secret}@")
    tracked = tracker(tmp_path, Place(tracking_uri=uri), tags={"server": uri})
    tracked.log_params({"workspace.tracking_uri": uri})
    tracked.log_dataset("cron", "d" * 64, f"s3://key:{secret}@bucket/x", "training", 1)
    report = tracked.close("FINISHED", timeout_s=60)
    with pytest.raises(UserError, match="password"):
        replay(tmp_path / "journal")
    replay(tmp_path / "journal", place.tracking_uri)

    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert secret not in report.reason
    assert [path for path in written if secret.encode() in path.read_bytes()] == []
    assert b"***@" in (tmp_path / "store" / "mlflow.db").read_bytes()


def test_a_text_is_kept_as_a_file_without_what_opens_doors(tmp_path, place, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "c4nary-of-ray")
    monkeypatch.setenv("SOME_API_KEY", "1")
    said = (
        "1 worker, hf_abcdefghijklmnopqrstuv, token c4nary-of-ray,\n"
        "Authorization: Bearer c4nary.of+http/==\nhttps://me:c4nary@host/ says \u00e9\n"
    )
    tracked = tracker(tmp_path, place)

    tracked.log_text("logs/train_adapter.log", said)
    run_id = finish(tracked)

    kept = connect(place.tracking_uri).download_artifacts(run_id, "logs/train_adapter.log")
    assert Path(kept).read_text("utf-8") == (
        "1 worker, ***, token ***,\nAuthorization: Bearer ***\nhttps://***@host/ says \u00e9\n"
    )
    copies = [path for path in (tmp_path / "journal").rglob("*") if path.is_file()]
    assert [path for path in copies if b"c4nary" in path.read_bytes()] == []


def test_a_password_with_an_at_sign_is_masked_whole():
    assert mask_credentials("postgresql://me:p@ss@host/db") == "postgresql://***@host/db"


def test_the_machine_is_sampled_while_a_run_goes_on(tmp_path, place):
    tracked = tracker(tmp_path, place, sample_every_s=0.0)
    deadline = time.monotonic() + 60
    name = "system/run_memory_megabytes"
    journal = Journal(tmp_path / "journal")

    def samples():
        records = [entry.record for entry in journal.read().entries]
        return [r for r in records if isinstance(r, MetricsRecord) and name in r.values]

    while not samples() and time.monotonic() < deadline:
        time.sleep(0.05)
    run_id = finish(tracked)

    assert all(value > 10 for _, value in history(place, run_id, name))
    assert history(place, run_id, name)


def test_replay_of_a_folder_without_a_journal_says_so(tmp_path):
    with pytest.raises(ArtifactError, match="no tracking journal"):
        replay(tmp_path)


def test_mlflow_is_not_imported_by_the_caller_and_its_globals_stay_untouched(tmp_path, place):
    script = f"""
import sys
from pathlib import Path
from qlora_core.backends.mlflow_registry import MlflowRegistry
from qlora_core.backends.mlflow_tracking import MlflowTracker
from qlora_core.backends.mlflow_registry import MlflowRegistry
assert "mlflow" not in sys.modules
tracker = MlflowTracker(Path({str(tmp_path / "journal")!r}), {place.tracking_uri!r}, "cron", "run")
tracker.log_metrics({{"loss": 1.0}}, 1)
assert tracker.close("FINISHED", 60).is_complete()
import mlflow
assert mlflow.active_run() is None
assert mlflow.get_tracking_uri() != {place.tracking_uri!r}
"""
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    assert not (tmp_path / "mlruns").exists()
    assert not (tmp_path / "mlflow.db").exists()


class Inner(Frozen):
    learning_rate: float
    betas: tuple[float, float]
    max_steps: int | None


class Outer(Frozen):
    name: str
    training: Inner
    columns: dict[str, str]


def test_a_nested_config_becomes_dotted_parameters():
    config = Outer(
        name="cron",
        training=Inner(learning_rate=2e-4, betas=(0.9, 0.999), max_steps=None),
        columns={},
    )

    assert flatten(config) == {
        "name": "cron",
        "training.learning_rate": 2e-4,
        "training.betas": "[0.9, 0.999]",
        "training.max_steps": "none",
        "columns": "{}",
    }


def test_the_doctor_sees_a_number_go_to_mlflow_and_back(tmp_path, place):
    assert local_place(tmp_path / "store") == place

    assert "SQLite and back" in try_out(tmp_path / "store")


@pytest.fixture
def late_server(tmp_path):
    """Gives an address, and a function that starts a real server there."""
    port = closed_port()
    processes = []

    def start():
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", fresh_place(tmp_path / "server").tracking_uri]
        command += ["--artifacts-destination", str(tmp_path / "server" / "files")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        processes.append(
            subprocess.Popen(command, env=os.environ | quiet, start_new_session=True, cwd=tmp_path)
        )

    yield f"http://127.0.0.1:{port}", start
    for process in processes:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def test_a_server_that_comes_late_gets_everything_once_and_keeps_models(tmp_path, late_server):
    address, start = late_server
    away = Place(tracking_uri=address)
    tracked = tracker(tmp_path, away)
    (tmp_path / "report.txt").write_text("good")
    tracked.log_metrics({"loss": 1.0}, 1)
    tracked.log_dataset("cron", "d" * 64, "org/cron", "training", 7)

    start()
    tracked.log_metrics({"loss": 2.0}, 2)
    tracked.log_file(tmp_path / "report.txt", "reports")
    run_id = tracked.wait_for_run_id(120)
    tracked.log_metrics({"loss": 3.0}, 3)

    assert finish(tracked) == run_id
    assert history(away, run_id, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    files = connect(address).list_artifacts(run_id, "reports")
    assert [file.path for file in files] == ["reports/report.txt"]

    (tmp_path / "adapter" / "sub").mkdir(parents=True)
    (tmp_path / "adapter" / "sub" / "weights").write_text("1")
    model = Candidate(
        name="cron",
        adapter=tmp_path / "adapter",
        merged=None,
        base="org/base@1",
        tags={},
        dataset_digest="d" * 64,
        metrics={"loss": Metric(value=1.0, num_rows=3)},
    )
    registry = MlflowRegistry(address, "cron", run_id=lambda: run_id)
    versions = [registry.register(model), registry.register(model)]
    registry.promote("cron", "1")

    assert versions == [("1", None), ("1", None)]
    assert registry.champion("cron").metrics == model.metrics
    kept = (tmp_path / "server" / "files").rglob("weights")
    assert [path.read_text() for path in kept] == ["1"]
    assert connect(address).get_model_version("cron", "1").run_id == run_id
