"""Each fault that is quickly over, once; `make chaos` lets all of them loose, many times."""

import functools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import pytest

from tests.chaos import flow_runs, tracking
from tests.chaos.family import family
from tests.chaos.faults import BY_NAME, FAULTS, Fault
from tests.chaos.joined import joined
from tests.chaos.place import Place, open_place
from tests.chaos.running import Row, let_loose, one_trial, table
from tests.chaos.trial import CannotBreakError, Trial, Watch, curve_problems
from tests.training.steps import step_metrics

SHORTER = {
    "stop-mlflow": functools.partial(tracking.stop_tracking, away_s=6.0),
    "kill-mlflow": functools.partial(tracking.kill_tracking, away_s=2.0),
    "at-once": functools.partial(flow_runs.start_at_once, least=3, most=3),
}
ON_RAY = [
    "kill-worker", "kill-launcher", "fill-store", "read-only-store", "damage-ray-snapshot",
    "cut-network",
]  # fmt: skip
ALONE = ["damage-snapshot", "stop-mlflow", "kill-mlflow"]


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with open_place() as made:
        yield made


def let_loose_once(name: str, place: Place) -> None:
    fault = BY_NAME[name]
    fault = replace(fault, breaks=SHORTER.get(name, fault.breaks))
    (row,) = [let_loose(fault, place, 1, 0, print)]
    if row.skipped:
        pytest.skip(row.skipped)
    assert row.trials[0].problems == ()


@pytest.mark.ray
@pytest.mark.parametrize("name", ON_RAY)
def test_a_training_on_ray_gets_over(name, place):
    let_loose_once(name, place)


@pytest.mark.parametrize("name", ALONE)
def test_a_training_gets_over(name, place):
    let_loose_once(name, place)


@pytest.mark.prefect
def test_a_recipe_started_three_times_at_once_is_one_training(place):
    let_loose_once("at-once", place)


def test_the_table_has_every_fault_once_and_says_how_often():
    assert len(BY_NAME) == len(FAULTS)
    assert all(fault.times > 0 for fault in FAULTS)


def broken_by(breaks) -> Fault:
    return Fault("name", "what", 1, breaks, lambda _: None)


def test_a_trial_that_ends_with_an_error_has_not_held():
    def fails(place: Place, random: Random) -> Trial:
        raise ValueError("no")

    trial = one_trial(broken_by(fails), None, 0)

    assert trial.problems == ("ended with ValueError: no",)


def test_a_fault_that_this_machine_does_not_allow_is_skipped_aloud():
    def not_here(place: Place, random: Random) -> Trial:
        raise CannotBreakError("mount needs root")

    row = let_loose(broken_by(not_here), None, 3, 0, print)

    assert row.trials == ()
    assert "| what | 0 | skipped: mount needs root |" in table([row])


def test_an_orphan_in_a_session_of_its_own_is_found_named_and_ended():
    import subprocess
    import sys

    orphan = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', "
        "'import time; time.sleep(60)'], start_new_session=True)"
    )
    with family() as ours:
        subprocess.run([sys.executable, "-c", orphan], check=True)
        left = list(ours.left_over(patience_s=0.5))
        time.sleep(0.5)
        again = list(ours.left_over(patience_s=5.0))

    assert len(left) == 1
    assert "time.sleep(60)" in left[0]
    assert again == []


def test_silence_is_counted_from_the_fault_and_ends_with_a_new_step_not_a_repeated_one():
    watch = Watch(2, lambda: None)
    for step in (1, 2, 3):
        watch(step_metrics(step))
    watch.told.clear()
    for step in (1, 2, 3):  # the same command again tells all
        watch(step_metrics(step))
    time.sleep(0.2)
    watch(step_metrics(4))

    seconds, before = watch.silence()

    assert before == 3
    assert 0.2 <= seconds < 2.0


def test_a_curve_that_is_a_little_off_is_a_problem_only_where_it_must_be_equal(tmp_path, place):
    job, other = place.job(num_steps=2), tmp_path / "other"
    other.mkdir()
    point = {"epoch": 0.0, "heldout_loss": None, "learning_rate": 1.0, "grad_norm": 1.0,
             "num_tokens": 1, "num_supervised_tokens": 1}  # fmt: skip
    _write(job.out, [point | {"step": 1, "loss": 1.0}])
    _write(other, [point | {"step": 1, "loss": 1.00001}])

    assert list(curve_problems(job, other, exactly=False)) == []
    assert len(list(curve_problems(job, other, exactly=True))) == 1

    _write(other, [point | {"step": 1, "loss": 1.001}])
    assert len(list(curve_problems(job, other, exactly=False))) == 1


def _write(folder: Path, points: list[dict[str, object]]) -> None:
    (folder / "curve.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    (folder / "adapter_model.safetensors").write_bytes(b"the same")


def test_a_table_counts_what_held_and_shows_the_worst():
    trials = (Trial((), 2.0, 3), Trial((), 4.0, 1), Trial(("late",), 30.0, None))

    text = table([Row("kill", "SIGKILL", trials, 40.0)])

    assert "| SIGKILL | 3 | 2/3 | 4.0 | 30.0 | 3 |" in text


def test_records_of_several_runs_make_one_table_in_the_order_of_the_faults(tmp_path):
    def stored(name: str, *rows: Row) -> Path:
        file = tmp_path / name
        plain = [asdict(row) | {"num_held": row.num_held} for row in rows]
        file.write_text(json.dumps({"faults": plain}))
        return file

    first, last = FAULTS[0], FAULTS[-1]
    one = stored("1", Row(last.name, "old words", (Trial((), 9.0, 1),), 10.0))
    two = stored(
        "2",
        Row(last.name, "old words", (Trial(("late",), 11.0, 2),), 10.0),
        Row(first.name, "old words", (Trial((), 3.0, 0),), 10.0),
        Row(FAULTS[1].name, "old words", (), 1.0, skipped="needs root"),
    )

    rows = list(joined([one, two]))

    assert [row.fault for row in rows] == [first.name, last.name]
    assert f"| {last.what} | 2 | 1/2 | 10.0 | 11.0 | 2 |" in table(rows)
