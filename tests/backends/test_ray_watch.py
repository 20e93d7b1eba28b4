"""How a driver is followed where the disk fails now and then; the driver is scripted."""

import errno

import pytest

from qlora_core.backends import ray_voice
from qlora_core.backends.ray_train import _watch
from qlora_core.backends.ray_voice import StepFollower, last_lines
from qlora_core.backends.ray_worker import RaySpec
from qlora_core.config import SnapshotConfig
from qlora_core.errors import ResourceError
from qlora_core.training.journal import JOURNAL_FILE, Journal
from tests.training.faulty_disk import FaultyDisk, numberless
from tests.training.steps import step_metrics


class ScriptedDriver:
    """Answers that all went well when it is asked for the third time."""

    num_asked = 0

    def has_answered(self) -> bool:
        self.num_asked += 1
        return self.num_asked >= 3

    def outcome(self) -> dict[str, str]:
        return {}


@pytest.fixture
def spec(make_job) -> RaySpec:
    job = make_job()
    Journal(job.scratch / JOURNAL_FILE, map(step_metrics, (1, 2, 3)))
    return RaySpec(job=job, snapshots=SnapshotConfig(), launch="0001", log=job.scratch / "ray.log")


def follow(spec: RaySpec, check=lambda: None) -> list[int]:
    told: list[int] = []
    follower = StepFollower.of(spec.job, lambda metrics: told.append(metrics.step), print)
    assert _watch(ScriptedDriver(), spec, follower, check)
    return told


@pytest.mark.parametrize("file", ["error-#.json r", "journal.jsonl rb", "notes.txt rb"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_look_that_fails_ends_no_training_and_loses_no_step(file, code, spec, monkeypatch):
    disk, num_failed = FaultyDisk((spec.job.scratch,)).install(monkeypatch), 0

    def fail_a_few() -> None:
        nonlocal num_failed
        num_failed += 1
        if num_failed <= 5:  # past the driver's answer
            disk.fail_at(f"open scratch/{file}", code)
        else:
            disk.mend()

    assert follow(spec, fail_a_few) == [1, 2, 3]
    assert num_failed >= 3


def test_an_error_that_arrives_in_parts_is_read_when_it_is_whole(spec):
    error, parts = ResourceError("too big", fix="Take a smaller one."), iter('{"type"')
    whole = '{"fix": "Take a smaller one.", "type": "ResourceError", "what": "too big", "why": ""}'

    def arrive() -> None:
        part = next(parts, None)
        spec.error_file.write_text(part if part else whole + " " * 99)

    with pytest.raises(ResourceError) as caught:
        _watch(NeverAnswering(), spec, StepFollower.of(spec.job, print, print), arrive)

    assert caught.value.to_json() == error.to_json()


class NeverAnswering(ScriptedDriver):
    def has_answered(self) -> bool:
        return False


def test_a_store_that_is_away_for_a_while_is_told_once(spec, monkeypatch):
    disk, said = FaultyDisk((spec.job.scratch,)).install(monkeypatch), []
    follower = StepFollower.of(spec.job, print, said.append)
    monkeypatch.setattr(ray_voice, "_WORTH_A_WORD_S", 1e-9)

    for _ in range(3):
        disk.fail_at("open scratch/journal.jsonl rb", errno.EIO)
        follower.catch_up()

    assert len(said) == 1
    assert "cannot be read from here" in said[0]


def test_last_words_that_cannot_be_read_hide_nothing(tmp_path, monkeypatch):
    (tmp_path / "ray.log").write_text("gone\n")
    FaultyDisk((tmp_path,)).install(monkeypatch).fail_at(
        numberless(f"open {tmp_path.name}/ray.log r"), errno.EIO
    )

    assert last_lines(tmp_path / "ray.log") == ""
