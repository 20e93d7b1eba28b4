import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from qlora_core.backends import process_session, ray_address, triage
from qlora_core.backends.in_process import InProcessLauncher
from qlora_core.backends.ray_address import require_ray
from qlora_core.backends.ray_process import start_driver
from qlora_core.backends.ray_train import RayTrainLauncher
from qlora_core.config import ClusterConfig, SnapshotConfig
from qlora_core.errors import NoRoomError, NotFiniteError, QLoraError, ResourceError, UserError
from qlora_core.modeling import machine
from qlora_core.ports import StepMetrics, TrainJob
from qlora_core.training.incidents import history
from tests.backends.ray_nodes import free_port, ray_cluster

pytestmark = pytest.mark.usefixtures("one_thread", "processes_before")
SNAPSHOTS = SnapshotConfig(every_steps=5)
BEFORE: set[psutil.Process] = set()


@pytest.fixture
def processes_before() -> None:
    """Earlier tests leave helpers of Python's own: multiprocessing's resource tracker."""
    BEFORE.clear()
    BEFORE.update(psutil.Process().children(recursive=True))


def ours(text: str = "") -> list[psutil.Process]:
    """Everything running that this test's launcher started, with ``text`` in its command."""
    now = psutil.Process().children(recursive=True)
    return [p for p in now if p not in BEFORE and text in command(p)]


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return ""


def train_on_ray(job: TrainJob, on_step=lambda _: None, **cluster) -> tuple[list[StepMetrics], str]:
    told, said = [], []

    def hear(metrics: StepMetrics) -> None:
        told.append(metrics)
        on_step(metrics)

    RayTrainLauncher(ClusterConfig(**cluster), SNAPSHOTS, said.append).train(job, hear)
    return told, "\n".join(said)


def train_here(job: TrainJob) -> list[StepMetrics]:
    told: list[StepMetrics] = []
    InProcessLauncher(SNAPSHOTS).train(job, told.append)
    return told


def losses(steps: list[StepMetrics]) -> list[float]:
    return [step.loss for step in steps]


@pytest.mark.ray
def test_a_killed_worker_is_replaced_and_two_workers_equal_one(make_job):
    alone = train_here(make_job("alone", epochs=12, heldout_every=None))
    killed = []

    def kill_a_worker(metrics: StepMetrics) -> None:
        if metrics.step == 7:
            worker = ours("RayTrainWorker")[-1]
            killed.append(worker.pid)
            worker.kill()

    job = make_job("ray", epochs=12, heldout_every=None)
    steps, said = train_on_ray(job, kill_a_worker, workers=2)

    assert len(killed) == 1
    assert [step.step for step in steps] == list(range(1, len(alone) + 1))
    assert losses(steps) == pytest.approx(losses(alone), rel=1e-4)
    assert "went on after step" in said
    assert ours() == []


@pytest.mark.ray
def test_a_lost_driver_is_started_again(make_job):
    alone = train_here(make_job("alone", epochs=12))

    def kill_the_head(metrics: StepMetrics) -> None:
        if metrics.step == 7:
            ours("ray_driver")[0].kill()

    steps, said = train_on_ray(make_job("ray", epochs=12), kill_the_head, workers=1)

    assert losses(steps) == pytest.approx(losses(alone), rel=1e-4)
    assert "driver process was lost" in said
    assert ours() == []


@pytest.mark.ray
def test_a_lost_controller_of_ray_trains_costs_a_new_driver(make_job):
    alone, killed = train_here(make_job("alone", epochs=12)), []

    def kill_the_controller(metrics: StepMetrics) -> None:
        if metrics.step == 7:
            (controller,) = ours("TrainController")
            killed.append(controller.pid)
            controller.kill()

    job = make_job("ray", epochs=12)
    steps, said = train_on_ray(job, kill_the_controller, workers=1)

    assert len(killed) == 1
    assert losses(steps) == pytest.approx(losses(alone), rel=1e-4)
    assert "Ray Train's controller was lost" in said
    assert [incident.kind for incident in history(job.scratch)] == ["lost_launch"]
    assert ours() == []


@pytest.mark.ray
def test_a_loss_that_stays_without_a_number_is_tried_once_more_and_told(broken_base, make_job):
    job = make_job().model_copy(update={"base": broken_base})

    with pytest.raises(NotFiniteError, match=r"(?s)at step 1.*came back after going on"):
        train_on_ray(job, workers=1)

    assert [incident.kind for incident in history(job.scratch)] == ["not_finite"]
    assert (job.scratch / "ray.log").is_file()
    assert ours() == []


@pytest.mark.ray
def test_an_error_of_a_worker_arrives_as_what_it_is_and_is_not_retried(make_job, tmp_path):
    job = make_job().model_copy(update={"data": tmp_path / "nothing"})

    with pytest.raises(QLoraError, match="nothing") as caught:
        train_on_ray(job, workers=1)

    assert not caught.value.is_transient
    assert history(job.scratch) == ()
    assert ours() == []


@pytest.mark.ray
def test_ray_comes_up_before_there_is_a_job_and_is_used_for_it(make_job):
    alone = train_here(make_job("alone"))
    said = []
    launcher = RayTrainLauncher(ClusterConfig(), SNAPSHOTS, said.append)

    with launcher.awake():
        waiting = ours("ray_driver")[0]
        wait_for_ray(waiting)
        steps, drivers = [], set()
        job = make_job("ray")
        launcher.train(job, lambda step: (steps.append(step), drivers.update(ours("ray_driver"))))

    assert drivers == {waiting}
    assert losses(steps) == pytest.approx(losses(alone), rel=1e-4)
    assert not any("lost" in sentence for sentence in said)
    assert not any("the cluster says" in sentence for sentence in said), "it is nobody's cluster"
    assert (job.scratch / "ray.log").stat().st_size > 0
    assert ours() == []


@pytest.mark.ray
def test_a_ray_that_nobody_came_to_use_leaves_nothing(make_job):
    with RayTrainLauncher(ClusterConfig(), SNAPSHOTS, print).awake():
        waiting = ours("ray_driver")[0]
        temp = Path(json.loads(waiting.cmdline()[3])["temp"])
        wait_for_ray(waiting)

    assert ours() == []
    assert not temp.exists()


@pytest.mark.ray
def test_a_ray_that_died_while_it_waited_is_started_again(make_job):
    steps, said = [], []
    launcher = RayTrainLauncher(ClusterConfig(max_failures=0), SNAPSHOTS, said.append)

    with launcher.awake():
        waiting = ours("ray_driver")[0]
        waiting.kill()
        waiting.wait(timeout=10)
        launcher.train(make_job("ray", epochs=2), steps.append)

    assert steps
    assert said == []
    assert ours() == []


@pytest.mark.ray
def test_a_ray_that_waited_in_vain_ends_by_itself():
    driver = start_driver(ClusterConfig(), idle_s=3.0)
    deadline = time.monotonic() + 60

    while not driver.has_answered():
        assert time.monotonic() < deadline
        time.sleep(0.2)

    assert driver.outcome() is None
    assert not driver.home.temp.exists()
    assert ours("raylet") == []
    driver.end()


def wait_for_ray(driver: psutil.Process) -> None:
    deadline = time.monotonic() + 60
    while not any("raylet" in command(child) for child in driver.children(recursive=True)):
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.ray
def test_nothing_is_left_when_the_launcher_is_killed(make_job, tmp_path):
    job = make_job(epochs=4000, heldout_every=None)
    (tmp_path / "job.json").write_text(job.model_dump_json())
    script = (
        "import sys; from pathlib import Path; from qlora_core.ports import TrainJob\n"
        "from qlora_core.config import *; from qlora_core.backends.ray_train import *\n"
        "job = TrainJob.model_validate_json(Path(sys.argv[1]).read_text())\n"
        "RayTrainLauncher(ClusterConfig(), SnapshotConfig(), print).train(job, lambda _: None)\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "job.json")])
    try:
        while not (job.scratch / "journal.jsonl").exists():
            assert launcher.poll() is None
            time.sleep(0.2)
        session = ours("ray_driver")[0].pid
        temp = Path(json.loads(ours("ray_driver")[0].cmdline()[3])["temp"])
    finally:
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()

    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and list(process_session.members(session)):
        time.sleep(0.2)
    assert list(process_session.members(session)) == []
    assert not temp.exists()


@pytest.mark.ray
def test_a_running_ray_is_used_where_an_address_is_given(make_job):
    alone = train_here(make_job("alone"))

    port = free_port()
    with ray_cluster() as running:
        head = running.start_head(f"--ray-client-server-port={port}")
        cleaners = []
        steps, said = train_on_ray(
            make_job("ray"),
            lambda _: cleaners.extend(head.members("PlacementGroupCleaner")),
            workers=1,
            address=running.address,
        )
        client = f"ray://127.0.0.1:{port}"
        require_ray(client, patience_s=90)  # that door opens later than the others
        through_client, _ = train_on_ray(make_job("client"), workers=1, address=client)

    assert losses(steps) == pytest.approx(losses(alone), rel=1e-4)
    assert losses(through_client) == losses(steps)
    assert "the cluster says" in said
    assert cleaners == [], "it would outlive a driver that is killed"


@pytest.mark.ray
def test_a_ray_that_wants_a_token_is_not_taken_for_a_lost_head(make_job, monkeypatch):
    job = make_job()
    with ray_cluster() as running, monkeypatch.context() as ours:
        running.start_head()
        ours.setenv("RAY_AUTH_MODE", "disabled")

        with pytest.raises(UserError, match=r"does not let us in.*InvalidAuthToken") as caught:
            train_on_ray(job, workers=1, address=running.address)

    assert "RAY_AUTH_TOKEN" in caught.value.fix
    assert history(job.scratch) == ()


def test_more_cores_than_the_machine_has_are_refused_at_once(make_job):
    with pytest.raises(ResourceError, match="do not fit"):
        train_on_ray(make_job(), workers=1, cpus_per_worker=100_000)


def memory_is(monkeypatch, free_bytes: int, total_bytes: int) -> None:
    """Let this machine have so much memory, and no swap."""
    monkeypatch.setattr(machine, "free_bytes", lambda: free_bytes)
    monkeypatch.setattr(machine, "total_bytes", lambda: total_bytes)
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=0))


def test_a_machine_too_small_for_the_smallest_pass_starts_no_worker(monkeypatch, make_job):
    job = make_job()
    memory_is(monkeypatch, free_bytes=10**9 // 2, total_bytes=10**9 // 2)

    with pytest.raises(ResourceError, match=r"finds 0\.50 GB of memory in all.* smallest pass"):
        train_on_ray(job, workers=1)

    assert history(job.scratch) == ()
    assert not (job.scratch / "ray.log").exists()
    assert ours() == []


def test_memory_that_others_use_is_waited_for_a_while(monkeypatch, make_job):
    monkeypatch.setattr(triage, "_ROOM_PAUSE_S", 0.0)
    job, said = make_job(), []
    memory_is(monkeypatch, free_bytes=10**9 // 2, total_bytes=8 * 10**9)
    cluster = ClusterConfig(workers=1, wait_for_nodes_s=0)

    with pytest.raises(NoRoomError, match=r"finds 0\.50 GB of memory free"):
        RayTrainLauncher(cluster, SNAPSHOTS, said.append).train(job, pytest.fail)

    assert [incident.kind for incident in history(job.scratch)] == ["no_room"] * 3
    assert ours() == []


def test_a_cluster_that_does_not_answer_is_told_at_once_and_for_good(monkeypatch, make_job):
    monkeypatch.setattr(ray_address, "_PATIENCE_S", 0.0)

    with pytest.raises(UserError, match=r"no Ray answers at 127\.0\.0\.1:1: .*refused") as caught:
        train_on_ray(make_job(), workers=1, address="127.0.0.1:1")

    assert not caught.value.is_transient


@pytest.mark.parametrize("address", ["head", "head:six", "ray://"])
def test_what_is_no_address_of_a_ray_is_told_with_one_that_would_do(address):
    with pytest.raises(UserError, match="head:6379"):
        require_ray(address)


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "[::1]:{}", "auto"])
def test_a_cluster_that_is_just_starting_is_waited_for(form):
    host, family = ("::1", socket.AF_INET6) if "::1" in form else ("127.0.0.1", socket.AF_INET)
    with socket.socket(family) as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    listening = []
    starting = threading.Timer(
        0.3, lambda: listening.append(socket.create_server((host, port), family=family))
    )

    starting.start()
    require_ray(form.format(port))
    starting.join()

    listening[0].close()


def test_a_session_is_ended_with_what_moved_into_other_groups():
    script = (
        "import os, subprocess, sys, time\n"
        "sleep = [sys.executable, '-c', 'import signal, time;"
        " signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)']\n"
        "subprocess.Popen(sleep, process_group=0)\n"
        "print('up', flush=True)\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], start_new_session=True, stdout=subprocess.PIPE
    )
    child.stdout.readline()
    assert len(list(process_session.members(child.pid))) == 2

    process_session.end(child.pid, patience_s=1.0)

    assert list(process_session.members(child.pid)) == []
    child.wait()
