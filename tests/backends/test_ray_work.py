"""What drivers and workers make of what Ray says, told by plain stand-ins for its answers."""

import json
import pickle
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import ray
import ray.train
import torch
from ray import cloudpickle
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus
from torch.distributed import DistNetworkError

from qlora_core.backends import ray_driver, ray_job_entry, ray_work
from qlora_core.backends.node_probe import own_installation
from qlora_core.backends.ray_job_order import JobOrder, found_last_word, order_file
from qlora_core.backends.ray_killed import KillsNoted
from qlora_core.backends.ray_preflight import is_booked
from qlora_core.backends.ray_work import await_room, outcome, shares, tell_of_idle_gpus
from qlora_core.backends.ray_worker import RayHome, RaySpec, WorkerOrder, _leave, _seconds_left
from qlora_core.backends.triage import LostDriverError, Triage
from qlora_core.config import ClusterConfig, SnapshotConfig
from qlora_core.errors import (
    CollectiveError,
    DeviceError,
    HeadLostError,
    KilledError,
    LaunchError,
    LaunchLostError,
    NoRoomError,
    ResourceError,
    TrainingError,
    UserError,
    WorkersLostError,
    from_json,
)
from qlora_core.training.attempt import claim, next_launch
from qlora_core.training.incidents import count, history
from qlora_core.training.journal import NOTES_FILE

ELSEWHERE = ClusterConfig(address="head:6379")
NODE = {"Alive": True, "Resources": {"CPU": 2.0}}


@pytest.fixture
def spec(make_job) -> RaySpec:
    job = make_job()
    launch = next_launch(job.scratch)
    return RaySpec(job=job, snapshots=SnapshotConfig(), launch=launch, log=job.scratch / "log")


@pytest.fixture
def nodes(monkeypatch):
    """Nodes that come one after the other, as often as they are looked for."""

    def come(*seen):
        looks = iter([*seen, *[seen[-1]] * 1000])
        monkeypatch.setattr(ray, "nodes", lambda: next(looks))
        monkeypatch.setattr(ray_work, "_POLL_S", 0.01)

    return come


def test_nodes_that_come_back_one_by_one_are_waited_for_and_it_is_said_once(nodes):
    nodes([], [], [NODE], [NODE, NODE | {"Alive": False}], [NODE, NODE])
    cluster, said = ClusterConfig(address="head:6379", workers=2, cpus_per_worker=2), []

    assert shares(cluster, said.append) == (2, 0.0)

    assert "there is room for 0" in said[0]
    assert "Waiting 300 s" in said[0]
    assert said[1:] == ["Try smaller workers (cluster.cpus_per_worker, cluster.gpus_per_worker)."]


@pytest.mark.parametrize("address", [None, "head:6379"])
def test_nodes_that_do_not_come_are_an_error_for_a_person(address, nodes):
    nodes([NODE])
    cluster = ClusterConfig(address=address, workers=3, cpus_per_worker=1, wait_for_nodes_s=0.05)
    said = []

    with pytest.raises(ResourceError, match="there is room for 2"):
        shares(cluster, said.append)

    assert bool(said) == (address is not None), "on a Ray of our own nothing comes"


def test_gpus_that_stay_idle_are_told_with_the_training_once_it_is_known_and_once(nodes, spec):
    nodes([NODE | {"Resources": {"CPU": 8.0, "GPU": 8.0}}])
    given = threading.Event()

    def wait_for_spec() -> RaySpec:
        given.wait(30)
        return spec

    def told(wait_for_spec) -> list[str]:
        before = set(threading.enumerate())
        tell_of_idle_gpus(ELSEWHERE, 1.0, wait_for_spec)
        begun = set(threading.enumerate()) - before
        given.set()
        for thread in begun:
            thread.join(30)
        return (spec.job.scratch / NOTES_FILE).read_text().splitlines()

    (note,) = told(wait_for_spec)
    assert "1 of 8 places" in note
    assert told(lambda: spec) == [note], "a driver that was lost has told it"


def test_a_cluster_without_room_is_told_from_workers_that_were_lost(tmp_path):
    cluster, log = ClusterConfig(address="head:6379"), tmp_path / "log"
    busy = ControllerError(WorkerGroupStartupTimeoutError(2))
    broken = ControllerError(ValueError("no such folder"))

    assert isinstance(outcome(busy, cluster, log), NoRoomError)
    assert type(outcome(broken, cluster, log)) is LaunchError


def met_by_a_task(cause: Exception) -> Exception:
    """What `ray.get` raises: an error of Ray's and of its cause's class at once."""
    return RayTaskError("setup", str(cause), cause).as_instanceof_cause()


@pytest.mark.parametrize(
    "cause",
    [
        ActorDiedError(),
        met_by_a_task(
            DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed.")
        ),
        met_by_a_task(RuntimeError("Gloo connectFullMesh failed with Connection closed by peer")),
        met_by_a_task(ActorDiedError()),
        ray.exceptions.NodeDiedError("its node is dead"),
    ],
)
def test_a_worker_lost_while_ray_starts_it_is_worth_another_launch_and_told_as_that(
    cause, tmp_path
):
    error = pickle.loads(cloudpickle.dumps(ControllerError(cause)))  # as it comes from Ray

    found = outcome(error, ELSEWHERE, tmp_path / "log")

    assert type(found) is LaunchLostError
    assert "while Ray started or ended workers" in found.what
    assert "max_failures" not in str(found)


def test_ray_trains_own_process_may_be_lost_as_any_other(tmp_path):
    found = outcome(ActorDiedError(), ELSEWHERE, tmp_path / "log")

    assert type(found) is LaunchLostError
    assert "Ray Train's controller was lost: ActorDiedError" in found.what


@pytest.mark.parametrize(
    "cause",
    [
        met_by_a_task(ModuleNotFoundError("No module named 'gone'")),
        met_by_a_task(RuntimeError("Distributed package doesn't have NCCL built in")),
        ActorDiedError(RayTaskError("__init__", "its own error", ValueError("no folder"))),
        ray.exceptions.RuntimeEnvSetupError("no such package"),
    ],
)
def test_what_a_process_of_rays_fails_at_by_itself_is_no_loss(cause, tmp_path):
    for error in (ControllerError(cause), cause):
        assert type(outcome(error, ELSEWHERE, tmp_path / "log")) is LaunchError


def test_an_error_of_ours_in_a_task_of_rays_stays_what_it_is(tmp_path):
    error = ResourceError("The device ran out of memory.", fix="Try a smaller one.")

    found = outcome(ControllerError(met_by_a_task(error)), ELSEWHERE, tmp_path / "log")

    assert found is error


def test_a_worker_that_ray_killed_for_its_memory_makes_the_next_ones_passes_smaller(spec):
    noted = KillsNoted(WorkerOrder(spec=spec))
    killed = ray.exceptions.OutOfMemoryError("killed: the node was running low on memory")

    poll(noted, {0: ValueError("an error"), 1: RuntimeError("lost")})
    assert history(spec.job.scratch) == ()

    on_one_row = ResourceError(
        "The device ran out of memory on a single row.", why="torch.OutOfMemoryError: CUDA"
    )
    poll(noted, {0: UserExceptionWithTraceback(on_one_row, traceback_of(on_one_row))})
    poll(noted, {0: torch.OutOfMemoryError("CUDA out of memory")})
    assert history(spec.job.scratch) == (), "what a device has too little of is not Ray's doing"

    poll(noted, {0: RuntimeError("lost"), 1: killed})
    assert count(spec.job.scratch, "out_of_memory") == 1
    assert "worker 1" in history(spec.job.scratch)[0].what


def poll(noted: KillsNoted, met: dict[int, Exception]) -> None:
    """Have workers polled that ended with what they have met."""
    ended = {rank: WorkerStatus(running=False, error=error) for rank, error in met.items()}
    noted.after_worker_group_poll_status(WorkerGroupPollStatus(ended))


def test_a_kill_counts_once_however_often_its_group_is_polled_and_if_it_ends_the_launch(spec):
    noted, scratch = KillsNoted(WorkerOrder(spec=spec)), spec.job.scratch
    killed = ray.exceptions.OutOfMemoryError("killed: the node was running low on memory")
    claim(scratch, spec.launch, 0)

    for _ in range(2):
        noted.before_worker_group_start(None)
        for _ in range(3):
            poll(noted, {0: killed})
    assert count(scratch, "out_of_memory") == 2

    ended = outcome(WorkerGroupError("[Rank 0]", {0: killed}), ELSEWHERE, spec.log)
    incident, _ = Triage(scratch, 5).remedy(ended, 7, spec.launch)
    assert incident.kind == "out_of_memory", "a person is told all the same"
    assert count(scratch, "out_of_memory") == 2

    Triage(scratch, 5).remedy(ended, 7, next_launch(scratch))
    assert count(scratch, "out_of_memory") == 3, "of workers that were never polled"


@pytest.mark.parametrize(
    "killed",
    [
        ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory."),
        WorkerHealthCheckFailedError(
            "poll failed", ray.exceptions.OutOfMemoryError("the node was running low on memory")
        ),
        ray.exceptions.ActorUnavailableError("died:\nthe node was running low on memory", None),
    ],
)
def test_ray_is_understood_wherever_it_says_that_it_has_killed_a_worker(killed, tmp_path):
    for error in (WorkerGroupError("[Rank 0]", {0: killed}), ControllerError(killed)):
        assert isinstance(outcome(error, ELSEWHERE, tmp_path / "log"), KilledError)


def test_a_device_out_of_memory_is_the_recipes_and_no_kill_of_rays(tmp_path):
    error = ResourceError("The device ran out of memory on a single row.")
    wrapped = UserExceptionWithTraceback(error, traceback_of(error))

    found = outcome(WorkerGroupError("torch.OutOfMemoryError", {1: wrapped}), ELSEWHERE, tmp_path)

    assert found is error


def traceback_of(error: Exception) -> str:
    return f"torch.OutOfMemoryError: CUDA out of memory\n{error}"


def test_workers_lost_more_often_than_they_may_be_are_told_with_what_the_last_one_said(tmp_path):
    gone = DeviceError("A GPU of node7 has failed: CUDA error: uncorrectable ECC error")
    error = WorkerGroupError("[Rank 0]", {0: gone, 1: RuntimeError("lost")})

    found = outcome(error, ELSEWHERE, tmp_path / "log")

    assert type(found) is WorkersLostError
    assert "node7" in found.why


def test_places_that_were_not_found_arrive_as_that(tmp_path):
    error = NoRoomError("2 workers have found no places.")

    assert outcome(ControllerError(error), ELSEWHERE, tmp_path / "log") is error


@pytest.mark.parametrize("way", ["fit", "preflight"])
def test_a_line_to_ray_that_breaks_is_a_lost_driver_and_no_bug(way, spec, monkeypatch, tmp_path):
    broken = ConnectionError("Client is shutting down.")
    if way == "fit":
        error = outcome(broken, ELSEWHERE, tmp_path / "log")
    else:

        def lose() -> None:
            raise broken

        monkeypatch.setattr(ray, "nodes", lose)
        with pytest.raises(LostDriverError) as caught:
            ray_work.carry_out(ELSEWHERE, spec, own_installation())
        error = caught.value

    assert isinstance(error, LostDriverError)
    assert "shutting down" in error.what


def test_nodes_that_are_gone_where_there_were_enough_may_come_back(spec, nodes):
    nodes([NODE])
    cluster = ClusterConfig(
        address="head:6379", workers=3, cpus_per_worker=1, wait_for_nodes_s=0.05
    )
    with pytest.raises(ResourceError, match="there is room for 2"):
        ray_work.carry_out(cluster, spec, own_installation())

    claim(spec.job.scratch, spec.launch, 0, num_workers=3)
    with pytest.raises(NoRoomError, match="there is room for 2"):
        ray_work.carry_out(cluster, spec, own_installation())


def test_a_ray_that_listens_but_does_not_answer_is_worth_another_try(monkeypatch, tmp_path):
    def refuse(**_):
        raise ConnectionError("ray client connection timeout")

    monkeypatch.setattr(ray, "init", refuse)

    with pytest.raises(HeadLostError, match="head:6379"):
        ray_driver._connect(home_of(tmp_path))


def home_of(folder, cluster=ELSEWHERE) -> RayHome:
    return RayHome(cluster=cluster, temp=folder, log=folder / "driver.log", idle_s=None)


@pytest.mark.parametrize("is_told_in_text", [False, True])
def test_a_token_that_is_missing_is_a_persons_to_give_and_no_driver_is_lost_for_it(
    is_told_in_text, monkeypatch, tmp_path
):
    """Where Ray finds out as it connects, it says so in the text of another error."""
    refusal = ray.exceptions.AuthenticationError("InvalidAuthToken: the token is missing")

    def refuse(**_):
        if not is_told_in_text:
            raise refusal
        last = RuntimeError(
            f"Failed to connect to GCS. Traceback ...\nAuthenticationError: {refusal}"
        )
        raise ConnectionError("Failed to connect to Ray cluster") from last

    monkeypatch.setattr(ray, "init", refuse)

    with pytest.raises(UserError, match="the token is missing") as caught:
        ray_driver._connect(home_of(tmp_path))

    assert "RAY_AUTH_TOKEN" in caught.value.fix


def test_what_a_driver_did_not_foresee_is_its_answer(monkeypatch, tmp_path):
    def fail(*_):
        raise KeyError("workers")

    monkeypatch.setattr(ray_driver, "_run", fail)
    home = home_of(tmp_path)

    error = ray_driver._met(home, ray_driver._Jobs(home))

    assert isinstance(error, TrainingError)
    assert "KeyError" in error.what
    assert str(home.log) in error.fix


def test_a_job_that_fails_says_why_in_its_log_too_where_no_file_may_arrive(
    spec, monkeypatch, capsys
):
    error = ResourceError("too big", fix="Try a smaller one.")

    def fail(_):
        raise error

    order, file = (
        JobOrder(cluster=ELSEWHERE, spec=spec, flow=own_installation()),
        order_file(spec.job.scratch, spec.launch),
    )
    file.write_text(order.model_dump_json())
    monkeypatch.setattr(ray_job_entry, "_work", fail)
    monkeypatch.setattr(ray_job_entry, "_also_in", lambda _: nullcontext())
    monkeypatch.setattr("sys.argv", ["ray_job_entry", str(file)])

    with pytest.raises(SystemExit) as left:
        ray_job_entry.main()

    assert left.value.code == 1
    found = found_last_word(capsys.readouterr().out)
    assert found.to_json() == error.to_json() == order.answer()


def test_a_peer_that_is_lost_while_all_are_asked_about_a_preemption_is_no_error_for_good(
    monkeypatch,
):
    def lost():
        raise ray.exceptions.RayActorError

    monkeypatch.setattr(ray.train, "get_preemption_info", lost, raising=False)

    with pytest.raises(CollectiveError):
        _seconds_left()


def test_a_preemption_is_as_near_as_ray_says_and_at_once_if_it_does_not(monkeypatch):
    def said(deadline_ms: float | None):
        info = SimpleNamespace(deadline_ms=deadline_ms)
        monkeypatch.setattr(ray.train, "get_preemption_info", lambda: info, raising=False)
        return _seconds_left()

    assert said((time.time() + 3600) * 1000) == pytest.approx(3600, abs=60)
    assert said((time.time() - 5) * 1000) == said(None) == 0.0
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: None, raising=False)
    assert _seconds_left() is None


def test_what_a_worker_met_that_was_cut_off_does_not_end_its_successors(spec):
    error, scratch = TrainingError("The loss is gone."), spec.job.scratch
    claim(scratch, spec.launch, step=0)  # by this worker's own attempt

    _leave(spec, error, before=0)
    assert str(from_json(json.loads(spec.error_file.read_text()))) == str(error)
    spec.error_file.unlink()

    claim(scratch, spec.launch, step=5)  # by those that came after it was cut off
    _leave(spec, error, before=0)
    assert not spec.error_file.exists()


@pytest.mark.parametrize(
    ("free", "gpus", "expected"),
    [
        ({"CPU": 8.0, "GPU": 4.0}, 1.0, False),
        ({"CPU": 8.0, "GPU": 3.5}, 1.0, True),
        ({"CPU": 8.0}, 1.0, True),  # Ray leaves out what is used up
        ({"CPU": 6.0, "GPU": 4.0}, 1.0, False),  # others compute on CPUs, and hold no GPU
        ({"CPU": 6.0, "GPU": 4.0}, 0.0, True),
        ({}, 0.0, True),
    ],
)
def test_a_node_is_booked_where_ray_has_given_away_what_workers_compute_on(free, gpus, expected):
    assert is_booked({"CPU": 8.0, "GPU": 4.0}, free, gpus) is expected


def full_for(times: int):
    """Return what finds room after so many times, and how often it was asked."""
    asked = []

    def require() -> None:
        asked.append(len(asked))
        if len(asked) <= times:
            raise NoRoomError(f"full, the {len(asked)}. time", fix="Wait.")

    return require, asked


def test_a_cluster_that_others_use_is_asked_until_there_is_room_and_it_is_said_once():
    require, asked = full_for(3)
    said, pauses = [], []

    await_room(require, 300.0, said.append, pauses.append)

    assert len(asked) == 4
    assert len(pauses) == 3
    assert said == ["full, the 1. time Waiting 300 s for room. Wait."]


def test_room_that_does_not_come_is_the_error_of_the_last_look():
    require, asked = full_for(1000)

    with pytest.raises(NoRoomError, match="full, the 1"):
        await_room(require, 0.0, pytest.fail)

    assert len(asked) == 1
