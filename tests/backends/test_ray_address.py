"""A head that was lost is waited for where it has been; a wrong address is told within seconds."""

import socket
import threading
from contextlib import closing

import pytest

from qlora_core.backends import ray_address
from qlora_core.backends.ray_address import await_ray, tell_if_silent
from qlora_core.backends.ray_crew import RayCrew
from qlora_core.backends.ray_jobs import RayJobsLauncher
from qlora_core.backends.ray_train import RayTrainLauncher
from qlora_core.config import ClusterConfig, EvaluationConfig, SnapshotConfig
from qlora_core.errors import HeadLostError, UserError
from qlora_core.ports import AskJob
from qlora_core.training.incidents import history
from tests.backends.ray_nodes import free_port


class StopError(Exception):
    """What ends a wait."""


class Head:
    """Something that listens at an address, or not."""

    def __init__(self) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._socket: socket.socket | None = None

    def come(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", self.port))

    def go(self) -> None:
        if self._socket:
            self._socket.close()

    close = go


@pytest.fixture
def head(monkeypatch):
    monkeypatch.setattr(ray_address, "_PAUSE_S", 0.02)
    with closing(Head()) as there:
        yield there


def test_a_head_that_comes_back_is_waited_for_and_it_is_said_once(head):
    said, num_checks = [], []
    threading.Timer(0.3, head.come).start()

    await_ray(head.address, 30.0, said.append, lambda: num_checks.append(1))

    assert len(said) == 1
    assert f"Nobody answers at {head.address}, where a Ray has been" in said[0]
    assert len(num_checks) > 2


def test_a_head_that_is_there_is_not_worth_a_word(head):
    head.come()
    said = []

    await_ray(head.address, 30.0, said.append, lambda: None)

    assert said == []


def test_a_head_that_stays_away_may_come_back_later(head):
    with pytest.raises(HeadLostError, match=r"where a Ray has been, for 0\.1 s") as caught:
        await_ray(head.address, 0.1, print, lambda: None)

    assert caught.value.is_transient
    assert "cluster.address" in caught.value.fix


def test_a_run_that_is_cancelled_waits_no_longer(head):
    def cancel() -> None:
        raise StopError

    with pytest.raises(StopError):
        await_ray(head.address, 300.0, print, cancel)


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "http://127.0.0.1:{}"])
def test_a_silent_cluster_is_told_before_the_stages_that_do_not_need_it(head, form):
    address, said = form.format(head.port), []
    cluster, snapshots = ClusterConfig(address=address), SnapshotConfig()
    kind = RayJobsLauncher if form.startswith("http") else RayTrainLauncher

    with kind(cluster, snapshots, said.append).awake():
        pass
    head.come()
    with kind(cluster, snapshots, said.append).awake():
        pass

    assert len(said) == 1
    assert f"nobody answers at {address} now" in said[0]


def test_what_ray_has_to_find_by_itself_is_not_asked_for():
    tell_if_silent("auto", pytest.fail)


def launcher(head: Head, said: list[str], patience_s: float = 30.0) -> RayTrainLauncher:
    cluster = ClusterConfig(address=head.address, workers=1, wait_for_nodes_s=patience_s)
    return RayTrainLauncher(cluster, SnapshotConfig(), said.append)


def test_where_a_ray_has_been_the_next_command_waits_for_it_too(head, make_job, monkeypatch):
    """Its head was lost while, or after, an earlier command trained there."""
    monkeypatch.setattr(ray_address, "_PATIENCE_S", 0.0)
    job, said, launched = make_job(), [], []

    def launch(_, __, name: str, ___) -> None:
        launched.append(name)
        head.go()
        if len(launched) == 1:
            raise StopError

    monkeypatch.setattr(RayTrainLauncher, "_launch", launch)
    with pytest.raises(UserError, match="no Ray answers"):
        launcher(head, said).train(job, print)
    head.come()
    with pytest.raises(StopError):
        launcher(head, said).train(job, print)
    threading.Timer(0.3, head.come).start()

    launcher(head, said).train(job, print)

    assert launched == ["0001", "0002"]
    assert sum("where a Ray has been" in sentence for sentence in said) == 1


def test_a_head_that_stays_away_is_asked_for_a_few_times_and_then_told(head, make_job, monkeypatch):
    monkeypatch.setattr(RayTrainLauncher, "_pause", lambda *_: None)
    job = make_job()
    (job.scratch / "address.txt").write_text(head.address)

    with pytest.raises(HeadLostError):
        launcher(head, [], patience_s=0.05).train(job, print)

    assert [incident.kind for incident in history(job.scratch)] == ["lost_head"] * 3


def test_at_another_address_nobody_is_waited_for(head, make_job, monkeypatch):
    monkeypatch.setattr(ray_address, "_PATIENCE_S", 0.0)
    job = make_job()
    (job.scratch / "address.txt").write_text("elsewhere:6379")

    with pytest.raises(UserError, match="no Ray answers"):
        launcher(head, []).train(job, print)

    assert history(job.scratch) == ()


def test_questions_wait_for_a_head_that_is_lost_while_they_are_asked(head, tmp_path, monkeypatch):
    said, launched = [], []
    job = AskJob(
        model=tmp_path,
        is_merged=True,
        adapter=None,
        data=tmp_path,
        evaluation=EvaluationConfig(),
        questions="",
        scratch=tmp_path / "scratch",
    )

    def launch(_, spec, __) -> bool:
        launched.append(spec)
        if len(launched) == 1:
            head.go()
            threading.Timer(0.3, head.come).start()
        return len(launched) == 2

    monkeypatch.setattr(RayCrew, "_launch", launch)
    head.come()
    RayCrew(ClusterConfig(address=head.address), said.append).ask(job, print)

    assert len(launched) == 2
    assert sum("where a Ray has been" in sentence for sentence in said) == 1
