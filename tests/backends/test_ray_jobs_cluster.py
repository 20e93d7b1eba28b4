"""Training as a job of a real Ray cluster with a token, whatever happens to who asked for it."""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_core.backends import ray_jobs
from qlora_core.backends.in_process import InProcessLauncher
from qlora_core.backends.node_probe import own_installation
from qlora_core.backends.ray_jobs import RayJobsLauncher
from qlora_core.config import ClusterConfig, SnapshotConfig
from qlora_core.errors import ClusterError, NotFiniteError, UserError
from qlora_core.fingerprint import file_digest, files_below
from qlora_core.ports import StepMetrics, TrainJob
from qlora_core.training.journal import JOURNAL_FILE, read_journal
from tests.backends.ray_head import Head, jobs_head, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("one_thread")]

SNAPSHOTS = SnapshotConfig(every_steps=5)
LONG = {"epochs": 200, "heldout_every": None}
"""550 steps: time enough to kill somebody."""
IN_A_PROCESS = """
import sys
from pathlib import Path
from qlora_core.backends.node_probe import own_installation
from qlora_core.backends.ray_jobs import RayJobsLauncher
from qlora_core.config import ClusterConfig, SnapshotConfig
from qlora_core.ports import TrainJob
job = TrainJob.model_validate_json(Path(sys.argv[1]).read_text())
cluster = ClusterConfig(address=sys.argv[2], cpus_per_worker=1)
say = lambda text: print(text, flush=True)
RayJobsLauncher(cluster, SnapshotConfig(every_steps=5), say).train(job, lambda _: None)
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with jobs_head() as running:
        yield running


def launcher_at(head: Head, said: list[str], **options) -> RayJobsLauncher:
    cluster = ClusterConfig(address=head.address, cpus_per_worker=1)
    return RayJobsLauncher(cluster, SNAPSHOTS, said.append, **options)


def train_here(job: TrainJob) -> list[StepMetrics]:
    told: list[StepMetrics] = []
    InProcessLauncher(SNAPSHOTS).train(job, told.append)
    return told


def digests(folder: Path) -> dict[str, str]:
    return {name: file_digest(folder / name) for name in files_below(folder)}


def num_steps_of(job: TrainJob) -> int:
    file = job.scratch / JOURNAL_FILE
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def test_a_job_gives_the_same_bytes_as_training_here_and_its_log_arrives(head, make_job):
    here, there = make_job("here"), make_job("there")
    alone = train_here(here)
    said, steps = [], []

    launcher_at(head, said).train(there, steps.append)

    assert digests(there.out) == digests(here.out)
    assert [step.loss for step in steps] == [step.loss for step in alone]
    assert head.jobs_of(there.scratch)["0001"] in ("RUNNING", "SUCCEEDED")
    assert "the cluster says" in "\n".join(said)
    assert (there.scratch / "ray.log").stat().st_size > 0
    wait_until(lambda: head.running() == [], timeout_s=15)


def test_a_job_outlives_its_flow_and_the_next_flow_attaches_to_it(head, make_job, tmp_path):
    here, there = make_job("here", **LONG), make_job("there", **LONG)
    (tmp_path / "job.json").write_text(there.model_dump_json())
    first = subprocess.Popen(
        [sys.executable, "-c", IN_A_PROCESS, str(tmp_path / "job.json"), head.address],
        cwd=Path(__file__).parents[2],
    )
    try:
        wait_until(lambda: num_steps_of(there) >= 10 or first.poll() is not None)
        assert first.poll() is None
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    before = num_steps_of(there)
    wait_until(lambda: num_steps_of(there) > before)

    said, steps = [], []
    launcher_at(head, said).train(there, steps.append)

    assert any("is running; attached to it" in sentence for sentence in said)
    assert list(head.jobs_of(there.scratch)) == ["0001"]
    assert [step.step for step in steps] == list(range(1, 551))
    assert read_journal(there.scratch / JOURNAL_FILE) == steps
    train_here(here)
    assert digests(there.out) == digests(here.out)


def test_cancelling_stops_the_job_and_frees_its_workers(head, make_job):
    job = make_job("there", **LONG)
    wait_until(lambda: head.running() == [], timeout_s=15)

    def cancel(step: StepMetrics) -> None:
        if step.step == 5:
            assert head.running("RayTrainWorker")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launcher_at(head, []).train(job, cancel)

    wait_until(lambda: head.running() == [], timeout_s=15)
    assert head.jobs_of(job.scratch) == {"0001": "STOPPED"}


def test_a_driver_that_is_killed_is_followed_by_the_next_attempt(head, make_job):
    medium = {"epochs": 100, "heldout_every": None}
    here, there = make_job("here", **medium), make_job("there", **medium)
    killed = []

    def kill_the_driver(step: StepMetrics) -> None:
        if not killed:
            for driver in head.processes("ray_job_entry"):
                killed.append(driver.pid)
                driver.kill()

    said, steps = [], []
    launcher_at(head, said).train(there, lambda step: (steps.append(step), kill_the_driver(step)))

    assert len(killed) == 1
    assert list(head.jobs_of(there.scratch)) == ["0001", "0002"]
    assert [step.step for step in steps] == list(range(1, 276))
    assert any(sentence.startswith("Lost driver after step") for sentence in said)
    train_here(here)
    assert digests(there.out) == digests(here.out)


def test_an_error_of_a_worker_arrives_as_what_it_is(head, broken_base, make_job):
    job = make_job("there").model_copy(update={"base": broken_base})

    with pytest.raises(NotFiniteError, match="at step"):
        launcher_at(head, []).train(job, lambda _: None)

    assert list(head.jobs_of(job.scratch)) == ["0001", "0002"]  # once more, as its remedy is
    wait_until(lambda: head.running() == [], timeout_s=15)


def test_a_cluster_with_other_packages_than_the_flow_is_told_so(head, make_job, monkeypatch):
    here = own_installation()
    flow = here.model_copy(update={"versions": here.versions | {"peft": "0.1.0"}})
    monkeypatch.setattr(ray_jobs, "own_installation", lambda: flow)
    job = make_job("there")

    with pytest.raises(ClusterError, match=r"peft is .*, the launcher's is 0\.1\.0"):
        launcher_at(head, []).train(job, lambda _: None)

    assert list(head.jobs_of(job.scratch)) == ["0001"]
    wait_until(lambda: head.running() == [], timeout_s=15)


def test_a_wrong_token_is_refused_before_anything_is_submitted(head, make_job):
    job = make_job("there")

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        with pytest.raises(UserError, match="refuses the token that was sent") as caught:
            launcher_at(head, []).train(job, lambda _: None)

    assert "RAY_AUTH_TOKEN_PATH" in caught.value.fix
    assert head.jobs_of(job.scratch) == {}
