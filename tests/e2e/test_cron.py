"""The cron example as a person runs it: real model, real Ray, Prefect and MLflow; killed and called
again.

Everything slow happens once, in `story`: a crash in training, the same command again, and again,
then a question to the result. The tests read what that left. It is small (few steps, few rows), so
it asks whether the whole chain works on a pretrained model; how well the model becomes is the demo.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import psutil
import pytest

from flows.records import RunRecord
from qlora_core.artifacts import AdapterCheckpoint, EvalReport, MergedModel, Metric
from tests.e2e.desk import Desk

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.ray,
    pytest.mark.prefect,
    pytest.mark.timeout(900),  # the fixture is four commands long
]

NUM_STEPS, NUM_ROWS, SNAPSHOT_EVERY = 24, 16, 5
SMALL = {
    "training.max_steps": NUM_STEPS,
    "training.heldout_rows": NUM_ROWS,
    "evaluation.max_rows": NUM_ROWS,
    "merge.parity_rows": 16,
    "snapshots.every_steps": SNAPSHOT_EVERY,
    "snapshots.every_s": 3600,
}
RUN = ["run", "cron/recipe.yaml", *(f"--set={name}={value}" for name, value in SMALL.items())]


@dataclass(frozen=True)
class Story:
    """What was seen of one recipe, called three times."""

    desk: Desk
    at_work: list[str]
    """Names of the processes of the run that was about to be killed."""
    crashed: RunRecord
    second: CompletedProcess[str]
    resumed: RunRecord
    third: CompletedProcess[str]
    repeated: RunRecord
    answer: CompletedProcess[str]
    left: list[psutil.Process]
    """Still there when all commands and servers had ended."""

    def report(self, subject: str) -> EvalReport:
        return EvalReport.model_validate(self.resumed.artifacts[f"{subject}_report"].facts)

    def metric(self, subject: str, name: str) -> Metric:
        return self.report(subject).metrics[name]


@pytest.fixture(scope="module")
def story(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    desk = Desk.at(tmp_path_factory.mktemp("desk"))
    try:
        at_work = crash_in_training(desk)
        crashed = desk.record()
        second = desk.qlora(*RUN)
        resumed = desk.record()
        third = desk.qlora(*RUN)
        repeated = desk.record()
        answer = desk.qlora("chat", "-m", "every weekday at half past nine")
    finally:
        desk.qlora("ui", "--stop")
    left = psutil.wait_procs(desk.processes(), timeout=30)[1]
    return Story(desk, at_work, crashed, second, resumed, third, repeated, answer, left)


def crash_in_training(desk: Desk) -> list[str]:
    """Run the recipe and take its process away, without a word, once it has a snapshot.

    Returns:
        Command lines of all that worked at it just before.
    """
    process = desk.start(*RUN)
    try:
        while not any(desk.snapshots()):
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        return [" ".join(found.cmdline()) for found in desk.processes()]
    finally:
        process.kill()
        process.communicate()


def test_the_run_that_was_killed_trained_on_ray(story):
    assert any("RayTrainWorker" in command for command in story.at_work)


def test_the_killed_run_is_known_to_be_interrupted_in_training(story):
    assert story.crashed.state == "interrupted"
    assert {"data", "base"} <= set(story.crashed.artifacts)
    assert "adapter" not in story.crashed.artifacts


def test_the_same_command_goes_on_with_the_killed_run_and_completes_it(story):
    assert story.second.returncode == 0, story.second.stderr
    assert "Traceback" not in story.second.stdout + story.second.stderr
    assert story.resumed.run_id == story.crashed.run_id
    assert story.resumed.state == "completed"
    assert [attempt.state for attempt in story.resumed.attempts] == ["interrupted", "completed"]


def test_stages_that_were_finished_before_the_kill_are_not_done_again(story):
    for role in story.crashed.artifacts:
        assert story.resumed.artifacts[role].cached
        assert story.resumed.artifacts[role].digest == story.crashed.artifacts[role].digest
    assert not story.resumed.artifacts["adapter"].cached


def test_training_goes_on_from_a_snapshot(story):
    facts = AdapterCheckpoint.model_validate(story.resumed.artifacts["adapter"].facts)

    assert facts.num_attempts == 2
    (resumed_at,) = facts.resumed_at
    assert resumed_at in range(SNAPSHOT_EVERY, NUM_STEPS + 1, SNAPSHOT_EVERY)
    assert facts.num_steps_run == facts.num_steps == NUM_STEPS
    assert f"resumed at {resumed_at}" in story.second.stdout


def test_the_peak_of_memory_was_planned_about_as_it_was_measured(story):
    facts = AdapterCheckpoint.model_validate(story.resumed.artifacts["adapter"].facts)

    assert facts.predicted_peak_bytes == pytest.approx(facts.peak_memory_bytes, rel=0.15)


def test_both_attempts_are_one_run_in_mlflow_with_each_step_once(story):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{story.desk.home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("cron").experiment_id
    runs = {run.info.run_id: run for run in client.search_runs([experiment])}

    assert set(runs) == {story.resumed.mlflow_run_id, story.repeated.mlflow_run_id}
    run = runs[story.resumed.mlflow_run_id]
    assert run.info.status == "FINISHED"
    assert run.data.tags["qloraflow.run_id"] == story.resumed.run_id
    curve = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in curve] == list(range(1, NUM_STEPS + 1))
    assert run.data.metrics["tuned/loss"] == story.metric("tuned", "loss").value


def test_the_tuned_model_knows_the_task_far_better_than_the_base_model(story):
    base, tuned = story.metric("base", "loss"), story.metric("tuned", "loss")

    assert base.num_rows == tuned.num_rows == NUM_ROWS
    assert 4.0 < base.value < 6.0
    assert tuned.value < base.value / 3
    assert story.metric("base", "same_schedule").value == 0.0


def test_the_merged_model_is_the_tuned_one(story):
    facts = MergedModel.model_validate(story.resumed.artifacts["merged"].facts)
    kept = facts.parity[0]

    assert facts.onto == kept.onto
    assert 0.0 <= kept.kl.value < 0.01
    assert kept.agreement.value > 0.95
    tuned, merged = story.metric("tuned", "loss").value, story.metric("merged", "loss").value
    assert merged == pytest.approx(tuned, rel=0.02)


def test_the_run_ends_in_a_table_of_base_tuned_and_merged(story):
    for subject in ("base", "tuned", "merged"):
        assert f"{story.metric(subject, 'loss').value:.3f}" in story.second.stdout
    assert f"qlora chat {story.resumed.run_id}" in story.second.stdout


def test_a_further_call_is_another_run_that_finds_every_stage(story):
    assert story.third.returncode == 0, story.third.stderr
    assert story.repeated.run_id != story.resumed.run_id
    assert [ref.cached for ref in story.repeated.artifacts.values()] == [True] * 8
    digests = {role: ref.digest for role, ref in story.resumed.artifacts.items()}
    assert {role: ref.digest for role, ref in story.repeated.artifacts.items()} == digests


def test_a_run_is_shown_again_by_how_its_name_begins(story):
    shown = story.desk.qlora("show", story.resumed.run_id, "--json")

    assert RunRecord.model_validate(json.loads(shown.stdout)) == story.resumed


def test_the_result_can_be_talked_to(story):
    assert story.answer.returncode == 0, story.answer.stderr
    assert story.answer.stdout.strip()


def test_nothing_is_left_running(story):
    assert story.left == []
