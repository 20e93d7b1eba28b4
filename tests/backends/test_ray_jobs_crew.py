"""Evaluation as a job: what a flow attaches to, asks again, takes for done or stops."""

import shutil
from pathlib import Path

import pytest

from qlora_core.backends import ray_job_watch
from qlora_core.backends.ray_job_order import submission_stem
from qlora_core.backends.ray_job_patience import OutOfReachError
from qlora_core.backends.ray_jobs_crew import RayJobsCrew
from qlora_core.config import ClusterConfig, EvaluationConfig
from qlora_core.errors import LaunchError, ModelError, NoRoomError, TrainingError, UserError
from qlora_core.ports import AskJob, Reply
from tests.backends.jobs_endpoint import (
    CancelledError,
    Endpoint,
    at_check,
    death,
    hasten,
    raising,
    serving,
)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    hasten(monkeypatch)


@pytest.fixture
def endpoint():
    with serving(Endpoint()) as running:
        yield running


@pytest.fixture
def job(tmp_path: Path) -> AskJob:
    return AskJob(
        model=tmp_path / "base",
        is_merged=False,
        adapter=None,
        data=tmp_path / "data",
        evaluation=EvaluationConfig(),
        questions="abc",
        scratch=tmp_path / ".abcdef0123456789.scratch",
    )


class Flow:
    """A flow's end of an evaluation, and all that it was told."""

    def __init__(self, endpoint: Endpoint, **options) -> None:
        self.replies: list[Reply] = []
        self.said: list[str] = []
        cluster = ClusterConfig(address=endpoint.address, max_failures=2)
        self.crew = RayJobsCrew(cluster, self.said.append, **options)

    def ask(self, job: AskJob) -> "Flow":
        self.crew.ask(job, self.replies.append)
        return self

    @property
    def numbers(self) -> list[int]:
        return [number for reply in self.replies for number in reply.batch.numbers]


def states(endpoint: Endpoint) -> dict[str, str]:
    return {name[-4:]: known["status"] for name, known in endpoint.jobs.items()}


def test_an_evaluation_is_one_job_whose_replies_arrive_once_each(endpoint, job):
    endpoint.on_submit = lambda order: endpoint.finish_asking(order, 3, 1, 2)

    flow = Flow(endpoint).ask(job)

    assert list(endpoint.jobs) == [submission_stem(job.scratch) + "0001"]
    assert flow.numbers == [3, 1, 2]
    assert [reply.nats for reply in flow.replies] == [(0.5,)] * 3


def test_after_the_death_of_its_flow_the_job_is_attached_to_and_no_reply_is_lost(endpoint, job):
    endpoint.on_submit = lambda order: endpoint.reply(order, 1, 2)
    with pytest.raises(OutOfReachError):
        Flow(endpoint, check=death()).ask(job)
    (order,) = endpoint.orders.values()
    order.spec.log.write_text("loading weights\n")
    end = at_check(c3=lambda: endpoint.finish_asking(order, 3))

    flow = Flow(endpoint, check=end).ask(job)

    assert states(endpoint) == {"0001": "SUCCEEDED"}
    assert flow.numbers == [1, 2, 3]
    assert any("is running; attached to it" in sentence for sentence in flow.said)
    assert "the cluster said before:\nloading weights" in flow.said


def test_a_job_that_finished_while_nobody_looked_is_taken_for_done(endpoint, job):
    with pytest.raises(OutOfReachError):
        Flow(endpoint, check=death()).ask(job)
    endpoint.finish_asking(*endpoint.orders.values(), 1, 2)

    flow = Flow(endpoint).ask(job)

    assert states(endpoint) == {"0001": "SUCCEEDED"}
    assert flow.numbers == [1, 2]


def test_replies_that_somebody_deleted_are_asked_for_again(endpoint, job):
    endpoint.on_submit = lambda order: endpoint.finish_asking(order, 1, 2)
    Flow(endpoint).ask(job)
    next(iter(endpoint.orders.values())).spec.replies_file.unlink()

    flow = Flow(endpoint).ask(job)

    assert any("its result is gone" in sentence for sentence in flow.said)
    assert states(endpoint) == {"0001": "SUCCEEDED", "0002": "SUCCEEDED"}
    assert flow.numbers == [1, 2]


def test_a_lost_job_is_started_again_and_no_reply_told_twice(endpoint, job):
    def lose_the_first(order) -> None:
        if order.spec.launch == "0001":
            endpoint.reply(order, 1, 2)
            endpoint.set(order.submission_id, "FAILED", "Job supervisor actor died")
        else:
            endpoint.finish_asking(order, 3)

    endpoint.on_submit = lose_the_first

    flow = Flow(endpoint).ask(job)

    assert states(endpoint) == {"0001": "FAILED", "0002": "SUCCEEDED"}
    assert flow.numbers == [1, 2, 3]
    assert "supervisor actor died" in (job.scratch / "ray.log").read_text()


def test_jobs_lost_again_and_again_end_with_their_last_words(endpoint, job):
    endpoint.on_submit = lambda order: endpoint.set(order.submission_id, "FAILED", "out of luck")

    with pytest.raises(LaunchError, match=r"max_failures=2(.|\n)*out of luck"):
        Flow(endpoint).ask(job)

    assert len(endpoint.jobs) == 3


def test_what_a_worker_met_is_raised_as_it_was_and_not_asked_again(endpoint, job):
    endpoint.on_submit = lambda order: endpoint.fail(order, ModelError("nan", fix="Another."))

    with pytest.raises(ModelError, match="nan") as caught:
        Flow(endpoint).ask(job)

    assert caught.value.fix == "Another."
    assert len(endpoint.jobs) == 1


def test_a_cluster_without_room_is_worth_another_try_with_the_next_number(endpoint, job):
    endpoint.on_submit = lambda order: endpoint.fail(order, NoRoomError("others use it"))
    with pytest.raises(NoRoomError) as caught:
        Flow(endpoint).ask(job)
    endpoint.on_submit = lambda order: endpoint.finish_asking(order, 1)

    flow = Flow(endpoint).ask(job)

    assert caught.value.is_transient
    assert states(endpoint) == {"0001": "FAILED", "0002": "SUCCEEDED"}
    assert flow.numbers == [1]


@pytest.mark.parametrize("error", [CancelledError(), KeyboardInterrupt()])
def test_cancelling_stops_the_job(endpoint, job, error):
    with pytest.raises(type(error)):
        Flow(endpoint, check=raising(error)).ask(job)

    assert states(endpoint) == {"0001": "STOPPED"}


def test_an_evaluation_that_does_not_stop_is_told_with_what_to_do(endpoint, job, monkeypatch):
    monkeypatch.setattr(ray_job_watch, "STOP_S", 0.1)
    endpoint.on_submit = lambda order: setattr(endpoint, "answers", 503)
    flow = Flow(endpoint, check=raising(CancelledError()))

    with pytest.raises(CancelledError):
        flow.ask(job)

    assert f"ray job stop {submission_stem(job.scratch)}0001" in flow.said[-1]


def test_a_job_that_somebody_stopped_is_not_started_again_by_itself(endpoint, job):
    endpoint.on_submit = lambda order: endpoint.set(order.submission_id, "STOPPED")

    with pytest.raises(TrainingError, match="stopped by somebody else"):
        Flow(endpoint).ask(job)

    assert len(endpoint.jobs) == 1


def test_an_endpoint_that_is_away_as_an_evaluation_begins_is_waited_for_where_it_was_used(
    endpoint, job
):
    endpoint.on_submit = lambda order: endpoint.finish_asking(order, 1, 2)
    Flow(endpoint).ask(job)
    another = job.model_copy(update={"scratch": job.scratch.with_name(".c0ffee99.scratch")})
    endpoint.answers = 503

    flow = Flow(endpoint, check=at_check(c2=lambda: setattr(endpoint, "answers", None)))

    assert flow.ask(another).numbers == [1, 2]


def test_cancelling_while_an_endpoint_is_waited_for_stops_the_evaluation_that_runs(endpoint, job):
    with pytest.raises(OutOfReachError):
        Flow(endpoint, check=death()).ask(job)
    endpoint.answers, endpoint.answers_to = 503, "GET /api/jobs/"

    def come_back_and_cancel() -> None:
        endpoint.answers = None
        raise CancelledError

    with pytest.raises(CancelledError):
        Flow(endpoint, check=at_check(c2=come_back_and_cancel)).ask(job)

    assert states(endpoint) == {"0001": "STOPPED"}


def test_a_running_evaluation_whose_order_is_in_another_store_is_left_alone(endpoint, job):
    with pytest.raises(OutOfReachError):
        Flow(endpoint, check=death()).ask(job)
    shutil.rmtree(job.scratch)
    endpoint.on_submit = lambda order: endpoint.finish_asking(order, 1)

    with pytest.raises(UserError, match="no order of it"):
        Flow(endpoint).ask(job)

    assert states(endpoint) == {"0001": "RUNNING"}


def test_an_endpoint_that_stays_away_ends_the_flow_and_not_the_evaluation(endpoint, job):
    endpoint.on_submit = lambda order: setattr(endpoint, "answers", 503)

    with pytest.raises(OutOfReachError):
        Flow(endpoint, patience_s=0.2).ask(job)

    assert states(endpoint) == {"0001": "RUNNING"}
