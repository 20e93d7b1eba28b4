"""Which job a flow submits, attaches to, takes for done, or stops; the cluster is scripted."""

import errno
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlora_core.backends import ray_job_watch
from qlora_core.backends.node_probe import own_code
from qlora_core.backends.ray_job_order import (
    found_last_word,
    last_word,
    order_file,
    submission_stem,
)
from qlora_core.backends.ray_job_patience import OutOfReachError
from qlora_core.backends.ray_jobs import RayJobsLauncher
from qlora_core.backends.ray_voice import LogTeller, last_lines
from qlora_core.config import (
    AdapterConfig,
    ClusterConfig,
    QuantizationConfig,
    SnapshotConfig,
    TrainingConfig,
)
from qlora_core.errors import (
    DataError,
    LaunchError,
    ResourceError,
    StoreAwayError,
    StoreError,
    TrainingError,
    UserError,
)
from qlora_core.ports import StepMetrics, TrainJob
from qlora_core.training.attempt import next_launch
from qlora_core.training.incidents import history
from qlora_core.training.journal import Tail
from tests.backends.jobs_endpoint import (
    CancelledError,
    Endpoint,
    as_another_process,
    at_check,
    death,
    hasten,
    raising,
    serving,
    throwing,
)
from tests.training.faulty_disk import FaultyDisk, numberless


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    hasten(monkeypatch)


@pytest.fixture
def endpoint():
    with serving(Endpoint()) as running:
        yield running


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    return TrainJob(
        base=tmp_path / "base",
        data=tmp_path / "data",
        out=tmp_path / "out",
        scratch=tmp_path / ".abcdef0123456789.scratch",
        quantization=QuantizationConfig(),
        adapter=AdapterConfig(),
        training=TrainingConfig(),
        seed=0,
    )


class Flow:
    """A flow's end of a training, and all that it was told."""

    def __init__(self, endpoint: Endpoint, **options) -> None:
        self.steps: list[StepMetrics] = []
        self.said: list[str] = []
        cluster = ClusterConfig(address=endpoint.address, max_failures=2)
        self.launcher = RayJobsLauncher(cluster, SnapshotConfig(), self.said.append, **options)

    def train(self, job: TrainJob) -> "Flow":
        self.launcher.train(job, self.steps.append)
        return self

    @property
    def numbers(self) -> list[int]:
        return [metrics.step for metrics in self.steps]


def test_a_job_is_named_by_the_stages_key_and_apart_from_that_of_another_store(tmp_path):
    here, there = (submission_stem(tmp_path / name / ".c0ffee99.scratch") for name in "ab")

    assert here.startswith("qlora-c0ffee99-")
    assert here != there
    assert here == submission_stem(tmp_path / "a" / ".c0ffee99.scratch")


def test_a_training_is_one_job_whose_result_and_steps_arrive(endpoint, job):
    endpoint.on_submit = endpoint.finish

    flow = Flow(endpoint).train(job)

    assert list(endpoint.jobs) == [submission_stem(job.scratch) + "0001"]
    assert flow.numbers == [1, 2, 3]
    assert (job.out / "adapter").read_text() == "0001"
    (environment,) = endpoint.environments
    assert environment["py_modules"] == [f"gcs://{name}" for name in endpoint.packages]


def test_no_secret_travels_with_the_job(endpoint, job, monkeypatch):
    endpoint.on_submit, endpoint.token = endpoint.finish, "c4nary"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "c4nary")
    monkeypatch.setenv("HF_TOKEN", "c4nary")

    flow = Flow(endpoint).train(job)

    assert "c4nary" not in f"{endpoint.environments} {endpoint.jobs} {flow.said}"
    files = [path for path in job.scratch.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if b"c4nary" in path.read_bytes()]


def test_after_the_death_of_its_flow_the_job_is_attached_to_and_tells_every_step(endpoint, job):
    endpoint.on_submit = lambda order: endpoint.write_steps(order, 1, 2)
    first = Flow(endpoint, check=death())
    with pytest.raises(OutOfReachError):
        first.train(job)
    (order,) = endpoint.orders.values()
    assert endpoint.jobs[order.submission_id]["status"] == "RUNNING"

    second = Flow(endpoint, check=at_check(c3=lambda: endpoint.finish(order))).train(job)

    assert list(endpoint.jobs) == [order.submission_id]
    assert (first.numbers, second.numbers) == ([1, 2], [1, 2, 3])
    assert any("is running; attached to it" in sentence for sentence in second.said)
    assert (job.out / "adapter").exists()


def test_a_job_that_finished_while_nobody_looked_is_taken_for_done(endpoint, job):
    with pytest.raises(OutOfReachError):
        Flow(endpoint, check=death()).train(job)
    (order,) = endpoint.orders.values()
    endpoint.finish(order)
    endpoint.jobs.clear()  # even the cluster may be another one by now

    again = [Flow(endpoint).train(job) for _ in range(2)]

    assert endpoint.jobs == {}
    assert [flow.numbers for flow in again] == [[1, 2, 3]] * 2
    assert (job.out / "adapter").read_text() == "0001"


def test_a_result_that_somebody_deleted_is_made_again(endpoint, job):
    endpoint.on_submit = endpoint.finish
    Flow(endpoint).train(job)
    shutil.rmtree(job.scratch / "result-0001")

    flow = Flow(endpoint).train(job)

    assert any("its result is gone" in sentence for sentence in flow.said)
    assert (job.out / "adapter").read_text() == "0002"


def test_after_a_job_that_failed_while_nobody_looked_comes_the_next_number(endpoint, job):
    with pytest.raises(OutOfReachError):
        Flow(endpoint, check=death()).train(job)
    (order,) = endpoint.orders.values()
    endpoint.fail(order, DataError("rows are odd"))
    endpoint.on_submit = endpoint.finish

    flow = Flow(endpoint).train(job)

    assert [name[-4:] for name in endpoint.jobs] == ["0001", "0002"]
    assert any("has failed: rows are odd" in sentence for sentence in flow.said)
    assert (job.out / "adapter").read_text() == "0002"


def test_a_number_that_the_cluster_remembers_is_not_used_again(endpoint, job):
    endpoint.set(submission_stem(job.scratch) + "0001", "SUCCEEDED")
    endpoint.on_submit = endpoint.finish

    Flow(endpoint).train(job)

    assert [name[-4:] for name in endpoint.jobs] == ["0001", "0002"]
    assert (job.out / "adapter").read_text() == "0002"


def test_a_job_of_an_attempt_that_is_over_is_stopped_before_another_starts(endpoint, job):
    with pytest.raises(OutOfReachError):
        Flow(endpoint, check=death()).train(job)
    next_launch(job.scratch)  # somebody trained on this machine meanwhile
    endpoint.on_submit = endpoint.finish

    Flow(endpoint).train(job)

    states = {name[-4:]: known["status"] for name, known in endpoint.jobs.items()}
    assert states == {"0001": "STOPPED", "0003": "SUCCEEDED"}


def test_a_running_job_whose_order_is_in_another_store_is_left_alone(endpoint, job):
    with pytest.raises(OutOfReachError):
        Flow(endpoint, check=death()).train(job)
    shutil.rmtree(job.scratch)  # the same path, on a machine that has not mounted the store
    endpoint.on_submit = endpoint.finish

    with pytest.raises(UserError, match=r"no order of it: no .*/job-0001\.json") as caught:
        Flow(endpoint).train(job)

    assert [known["status"] for known in endpoint.jobs.values()] == ["RUNNING"]
    (name,) = endpoint.jobs
    assert f"ray job stop {name} --address {endpoint.address}" in caught.value.fix


def dropping(store: Path) -> Callable[[], None]:
    """Return what drops the store's mount when it is called, and fails for it."""

    def drop() -> None:
        store.rename(store.with_name("unmounted"))
        raise StoreAwayError("there is no such file or folder")

    return drop


def test_a_mount_that_is_dropped_while_a_job_runs_does_not_stop_it(endpoint, job):
    check = at_check(c6=dropping(job.scratch), c12=throwing(CancelledError()))

    with pytest.raises(UserError, match="no order of it"):
        Flow(endpoint, pauses_s=(0.0,), check=check).train(job)

    assert [known["status"] for known in endpoint.jobs.values()] == ["RUNNING"]


def test_jobs_of_other_trainings_are_left_alone(endpoint, job):
    endpoint.set("qlora-abcdef012345-another-0001", "RUNNING")
    endpoint.on_submit = endpoint.finish

    Flow(endpoint).train(job)

    assert endpoint.jobs["qlora-abcdef012345-another-0001"]["status"] == "RUNNING"


@pytest.mark.parametrize("error", [CancelledError(), KeyboardInterrupt(), SystemExit(1)])
def test_cancelling_stops_the_job(endpoint, job, error):
    with pytest.raises(type(error)):
        Flow(endpoint, check=raising(error)).train(job)

    assert [known["status"] for known in endpoint.jobs.values()] == ["STOPPED"]


def test_an_error_of_who_hears_of_steps_stops_the_job(endpoint, job):
    endpoint.on_submit = lambda order: endpoint.write_steps(order, 1)
    flow = Flow(endpoint)

    def hear(_: StepMetrics) -> None:
        raise CancelledError

    with pytest.raises(CancelledError):
        flow.launcher.train(job, hear)

    assert [known["status"] for known in endpoint.jobs.values()] == ["STOPPED"]


def test_a_job_that_does_not_stop_is_told_with_what_to_do(endpoint, job, monkeypatch):
    monkeypatch.setattr(ray_job_watch, "STOP_S", 0.1)
    flow = Flow(endpoint, check=raising(CancelledError()))
    endpoint.on_submit = lambda order: setattr(endpoint, "answers", 503)

    with pytest.raises(CancelledError):
        flow.train(job)

    assert f"--address {endpoint.address}" in flow.said[-1]


def test_what_a_job_answers_is_raised_as_it_was_and_not_tried_again(endpoint, job):
    endpoint.on_submit = lambda order: endpoint.fail(order, TrainingError("nan at step 3"))

    with pytest.raises(TrainingError, match="nan at step 3"):
        Flow(endpoint).train(job)

    assert len(endpoint.jobs) == 1


def test_an_error_that_a_worker_leaves_ends_the_job_at_once(endpoint, job):
    def leave(order) -> None:
        order.spec.error_file.write_text(
            '{"type": "ResourceError", "what": "too big", "why": "8 GB", "fix": "Shrink it."}'
        )

    endpoint.on_submit = leave

    with pytest.raises(ResourceError) as caught:
        Flow(endpoint).train(job)

    error = caught.value
    assert (error.what, error.why, error.fix) == ("too big", "8 GB", "Shrink it.")
    assert len(endpoint.jobs) == 1, "it is not tried again"
    assert [known["status"] for known in endpoint.jobs.values()] == ["STOPPED"]


def test_a_lost_job_is_started_again_under_the_next_number_and_no_step_told_twice(endpoint, job):
    def lose_the_first(order) -> None:
        if order.spec.launch == "0001":
            endpoint.write_steps(order, 1, 2)
            endpoint.set(order.submission_id, "FAILED", "Job supervisor actor died")
        else:
            endpoint.finish(order)

    endpoint.on_submit = lose_the_first

    flow = Flow(endpoint).train(job)

    assert [name[-4:] for name in endpoint.jobs] == ["0001", "0002"]
    assert flow.numbers == [1, 2, 3]
    assert "supervisor actor died" in (job.scratch / "ray.log").read_text()
    assert [incident.kind for incident in history(job.scratch)] == ["lost_driver"]


def test_a_full_store_is_waited_for_and_a_result_is_not_trained_twice(endpoint, job, monkeypatch):
    def fill_up(order) -> None:
        if order.spec.launch == "0001":
            endpoint.fail(order, StoreAwayError("the disk is full"))
        else:
            endpoint.finish(order)

    endpoint.on_submit = fill_up
    disk = FaultyDisk((job.out,)).install(monkeypatch)
    disk.fail_at("mkdir out", errno.ENOSPC)  # handing over fails at first as well

    flow = Flow(endpoint, pauses_s=(0.0, 0.0)).train(job)

    assert [name[-4:] for name in endpoint.jobs] == ["0001", "0002"]
    assert flow.numbers == [1, 2, 3]
    kinds = [incident.kind for incident in history(job.scratch)]
    assert kinds == ["storage", "storage"]


def test_a_store_that_is_in_the_way_is_a_persons_to_change_and_tried_once(endpoint, job):
    endpoint.on_submit = endpoint.finish
    job.out.write_text("in the way")

    with pytest.raises(StoreError, match="a file is in the way"):
        Flow(endpoint).train(job)

    assert history(job.scratch) == ()
    assert [known["status"] for known in endpoint.jobs.values()] == ["SUCCEEDED"]


@pytest.mark.parametrize("file", ["error-#.json r", "answer-#.json rb", "journal.jsonl rb"])
def test_a_disk_that_hiccups_while_a_job_is_followed_costs_neither_job_nor_steps(
    file, endpoint, job, monkeypatch
):
    disk = FaultyDisk((job.scratch,)).install(monkeypatch)
    operation = f"open {numberless(job.scratch.name)}/{file}"

    def fail() -> None:
        disk.fail_at(operation, errno.EIO)

    checks = {f"c{number}": fail for number in range(6, 12)}
    checks["c12"] = lambda: endpoint.finish(*endpoint.orders.values())
    flow = Flow(endpoint, check=at_check(**checks, c13=fail, c14=fail)).train(job)

    assert operation in disk.done
    assert flow.numbers == [1, 2, 3]
    assert [known["status"] for known in endpoint.jobs.values()] == ["SUCCEEDED"]
    assert history(job.scratch) == ()


def test_a_store_that_stays_out_of_reach_of_the_flow_leaves_the_job_alone(
    endpoint, job, monkeypatch
):
    monkeypatch.setattr(Tail.__init__, "__defaults__", (0.0,))
    disk = FaultyDisk((job.scratch,)).install(monkeypatch)
    journal = f"open {numberless(job.scratch.name)}/journal.jsonl rb"

    with pytest.raises(StoreAwayError, match="has failed"):
        Flow(
            endpoint, pauses_s=(), check=at_check(c6=lambda: disk.fail_at(journal, errno.EIO))
        ).train(job)

    assert [known["status"] for known in endpoint.jobs.values()] == ["RUNNING"]


def test_an_order_that_cannot_be_read_just_now_is_not_taken_for_none(endpoint, job, monkeypatch):
    with pytest.raises(OutOfReachError):
        Flow(endpoint, check=death()).train(job)
    (order,) = endpoint.orders.values()
    disk = FaultyDisk((job.scratch,)).install(monkeypatch)
    disk.fail_at(f"open {numberless(job.scratch.name)}/job-#.json r", errno.ESTALE)

    finish = at_check(c3=lambda: endpoint.finish(order))
    flow = Flow(endpoint, pauses_s=(0.0,), check=finish).train(job)

    assert list(endpoint.jobs) == [order.submission_id], "the job that ran went on"
    assert flow.numbers == [1, 2, 3]


def test_jobs_lost_again_and_again_end_with_their_last_words(endpoint, job):
    endpoint.on_submit = lambda order: endpoint.set(order.submission_id, "FAILED", "out of luck")

    with pytest.raises(LaunchError, match=r"max_failures=2(.|\n)*out of luck"):
        Flow(endpoint).train(job)

    assert len(endpoint.jobs) == 3


def test_a_cluster_that_forgot_the_job_gets_another(endpoint, job):
    def forget_the_first(order) -> None:
        if order.spec.launch == "0001":
            endpoint.jobs.clear()
        else:
            endpoint.finish(order)

    endpoint.on_submit = forget_the_first

    assert Flow(endpoint).train(job).numbers == [1, 2, 3]


def test_a_job_that_somebody_stopped_is_not_started_again_by_itself(endpoint, job):
    endpoint.on_submit = lambda order: endpoint.set(order.submission_id, "STOPPED")

    with pytest.raises(TrainingError, match="stopped by somebody else") as caught:
        Flow(endpoint).train(job)

    assert not caught.value.is_transient
    assert len(endpoint.jobs) == 1


@pytest.mark.parametrize(
    "said", ["ModuleNotFoundError: No module named 'peft'", "/bin/sh: 1: exec: python: not found"]
)
def test_a_cluster_without_our_packages_is_told_at_once(endpoint, job, said):
    message = f"Job entrypoint command failed with exit code 1, last available logs:\n{said}\n"
    endpoint.on_submit = lambda order: endpoint.set(order.submission_id, "FAILED", message)

    with pytest.raises(ResourceError, match="cannot run Ray job") as caught:
        Flow(endpoint).train(job)

    assert said.split(": ")[-1] in str(caught.value)
    assert len(endpoint.jobs) == 1


def test_a_store_that_the_cluster_does_not_see_is_told_by_its_log(endpoint, job):
    error = UserError("node7 cannot read /store/job.json", fix="Mount it.")
    message = f"last available logs:\n{last_word(error)}\n"
    endpoint.on_submit = lambda order: endpoint.set(order.submission_id, "FAILED", message)

    with pytest.raises(UserError, match="node7 cannot read") as caught:
        Flow(endpoint).train(job)

    assert caught.value.fix == "Mount it."


def test_a_result_that_does_not_arrive_is_the_stores_fault(endpoint, job):
    endpoint.on_submit = lambda order: endpoint.set(order.submission_id, "SUCCEEDED")

    with pytest.raises(UserError, match="one folder, at one path"):
        Flow(endpoint).train(job)


@pytest.mark.parametrize("file", ["answer-#.json", "journal.jsonl"])
def test_an_outage_of_the_store_as_a_job_succeeds_is_waited_out(file, endpoint, job, monkeypatch):
    disk = FaultyDisk((job.scratch,)).install(monkeypatch)

    def finish_unseen() -> None:
        endpoint.finish(*endpoint.orders.values())
        disk.fail_at(f"open {numberless(job.scratch.name)}/{file} rb", errno.ESTALE, num_times=9)

    flow = Flow(endpoint, check=at_check(c6=finish_unseen)).train(job)

    assert flow.numbers == [1, 2, 3]
    assert history(job.scratch) == ()


def test_an_odd_word_that_there_is_no_such_job_takes_no_time_from_its_real_end(
    endpoint, job, monkeypatch
):
    for name in ("_GRACE_S", "_SHARED_S"):
        monkeypatch.setattr(ray_job_watch, name, 1.0)
    name = submission_stem(job.scratch) + "0001"
    checks = at_check(
        c6=endpoint.jobs.clear,
        c7=lambda: endpoint.set(name, "RUNNING"),
        c20=lambda: endpoint.set(name, "SUCCEEDED"),
        c22=lambda: endpoint.finish(endpoint.orders[name]),  # where the store is a network's
    )

    flow = Flow(endpoint, check=checks).train(job)

    assert flow.numbers == [1, 2, 3]


def test_an_endpoint_that_is_away_for_a_while_is_waited_for(endpoint, job):
    endpoint.on_submit = lambda order: setattr(endpoint, "answers", 503)
    back = at_check(
        c5=lambda: setattr(endpoint, "answers", None),
        c8=lambda: endpoint.finish(*endpoint.orders.values()),
    )

    flow = Flow(endpoint, check=back).train(job)

    assert flow.numbers == [1, 2, 3]
    assert len(endpoint.jobs) == 1
    assert sum("answers 503" in sentence for sentence in flow.said) == 1
    assert any("answers again" in sentence for sentence in flow.said)


ODD = [429, 524, 403, 302, 404, 200]
"""A limit, a proxy's timeout, a token that ran out, a login page, no backend, a page of HTML."""


@pytest.mark.parametrize("answers", ODD)
def test_an_odd_answer_while_a_job_runs_neither_stops_it_nor_starts_another(endpoint, job, answers):
    endpoint.on_submit = lambda order: setattr(endpoint, "answers", answers)
    back = at_check(
        c6=lambda: setattr(endpoint, "answers", None),
        c9=lambda: endpoint.finish(*endpoint.orders.values()),
    )

    flow = Flow(endpoint, check=back).train(job)

    assert flow.numbers == [1, 2, 3]
    assert len(endpoint.jobs) == 1
    assert not [asked for asked in endpoint.asked if asked.endswith("/stop")]
    assert sum("goes on meanwhile" in sentence for sentence in flow.said) == 1


@pytest.mark.parametrize("answers", ODD)
def test_an_endpoint_that_stays_odd_ends_the_flow_and_not_the_job(endpoint, job, answers):
    endpoint.on_submit = lambda order: setattr(endpoint, "answers", answers)

    with pytest.raises(OutOfReachError, match=r"it goes on\. Run again") as caught:
        Flow(endpoint, patience_s=0.2).train(job)

    assert caught.value.why, "what came instead of an answer"
    assert [known["status"] for known in endpoint.jobs.values()] == ["RUNNING"]


AWAY = [(403, "GET /api/jobs/"), (403, ""), (503, ""), (200, "")]
"""The list of jobs alone is refused; all is refused, has nobody behind it, or is a page of HTML."""


@pytest.mark.parametrize(("answers", "to"), AWAY)
def test_an_endpoint_that_is_away_before_attaching_is_waited_for_where_a_job_may_run(
    answers, to, endpoint, job, monkeypatch
):
    with pytest.raises(OutOfReachError):
        Flow(endpoint, check=death()).train(job)
    (order,) = endpoint.orders.values()
    as_another_process(monkeypatch)
    endpoint.answers, endpoint.answers_to = answers, to
    back = at_check(
        c2=lambda: setattr(endpoint, "answers", None), c4=lambda: endpoint.finish(order)
    )

    flow = Flow(endpoint, check=back).train(job)

    assert flow.numbers == [1, 2, 3]
    assert list(endpoint.jobs) == [order.submission_id]
    assert any("answers again" in sentence for sentence in flow.said)


@pytest.mark.parametrize(("answers", "to"), AWAY)
def test_an_endpoint_that_stays_away_before_attaching_leaves_the_job_alone_however_often_tried(
    answers, to, endpoint, job, monkeypatch
):
    with pytest.raises(OutOfReachError):
        Flow(endpoint, check=death()).train(job)
    as_another_process(monkeypatch)
    endpoint.answers, endpoint.answers_to = answers, to

    for _ in range(2):  # as Prefect retries
        with pytest.raises(OutOfReachError, match=r"it goes on\. Run again"):
            Flow(endpoint, patience_s=0.1).train(job)

    assert [known["status"] for known in endpoint.jobs.values()] == ["RUNNING"]


def test_an_order_given_to_another_endpoint_says_nothing_of_this_one(endpoint, job):
    with pytest.raises(OutOfReachError):
        Flow(endpoint, check=death()).train(job)

    with serving(Endpoint(answers=403)) as other, pytest.raises(UserError, match="RAY_AUTH_TOKEN"):
        Flow(other, patience_s=0.1).train(job)


def test_cancelling_while_an_endpoint_is_waited_for_stops_the_job_that_runs(endpoint, job):
    with pytest.raises(OutOfReachError):
        Flow(endpoint, check=death()).train(job)
    endpoint.answers = 503

    def come_back_and_cancel() -> None:
        endpoint.answers = None
        raise CancelledError

    with pytest.raises(CancelledError):
        Flow(endpoint, check=at_check(c2=come_back_and_cancel)).train(job)

    assert [known["status"] for known in endpoint.jobs.values()] == ["STOPPED"]


def test_cancelling_while_an_endpoint_stays_away_is_told_with_what_to_do(
    endpoint, job, monkeypatch
):
    with pytest.raises(OutOfReachError):
        Flow(endpoint, check=death()).train(job)
    (name,) = endpoint.jobs
    monkeypatch.setattr(ray_job_watch, "STOP_S", 0.1)
    endpoint.answers = 503
    flow = Flow(endpoint, check=raising(KeyboardInterrupt(), number=2))

    with pytest.raises(KeyboardInterrupt):
        flow.train(job)

    assert f"By hand: ray job stop {name} --address {endpoint.address}" in flow.said[-1]


def test_cancelling_while_the_store_is_waited_for_stops_the_job_that_was_left_alone(endpoint, job):
    checks = at_check(c6=dropping(job.scratch), c7=throwing(CancelledError()))

    with pytest.raises(CancelledError):
        Flow(endpoint, pauses_s=(60.0,), check=checks).train(job)

    assert [known["status"] for known in endpoint.jobs.values()] == ["STOPPED"]


def test_who_has_started_nothing_is_told_at_once_that_jobs_may_not_be_listed(endpoint, job):
    endpoint.answers, endpoint.answers_to = 403, "GET /api/jobs/"

    with pytest.raises(UserError, match="RAY_AUTH_TOKEN"):
        Flow(endpoint).train(job)

    assert endpoint.asked.count("GET /api/jobs/") == 1


def test_who_has_started_nothing_is_told_so_though_the_endpoint_let_another_training_in(
    endpoint, job
):
    endpoint.on_submit = endpoint.finish
    Flow(endpoint).train(job)
    endpoint.answers = 403
    another = job.model_copy(update={"scratch": job.scratch.with_name(".c0ffee99.scratch")})

    with pytest.raises(UserError, match="RAY_AUTH_TOKEN"):
        Flow(endpoint, patience_s=0.1).train(another)


def test_cancelling_while_a_submission_is_on_its_way_stops_the_job_that_comes_of_it(endpoint, job):
    endpoint.late_s = 0.5

    with pytest.raises(CancelledError):
        Flow(endpoint, check=raising(CancelledError(), number=2)).train(job)

    assert [known["status"] for known in endpoint.jobs.values()] == ["STOPPED"]


def test_a_submission_nobody_knows_the_outcome_of_is_told_with_what_to_do(
    endpoint, job, monkeypatch
):
    monkeypatch.setattr(ray_job_watch, "STOP_S", 0.2)
    endpoint.late_s = 60.0
    flow = Flow(endpoint, check=raising(CancelledError(), number=2))

    with pytest.raises(CancelledError):
        flow.train(job)

    name = submission_stem(job.scratch) + "0001"
    assert "nobody knows whether that was heard" in flow.said[-1]
    assert f"ray job stop {name} --address {endpoint.address}" in flow.said[-1]


def test_a_submission_that_is_refused_leaves_nothing_to_stop(endpoint, job):
    endpoint.answers, endpoint.answers_to = 403, "POST /api/jobs/"
    flow = Flow(endpoint)

    with pytest.raises(UserError, match="RAY_AUTH_TOKEN"):
        flow.train(job)

    assert endpoint.asked[-1] == "POST /api/jobs/"
    assert flow.said == []


def test_an_endpoint_that_stays_away_ends_the_flow_and_not_the_job(endpoint, job):
    endpoint.on_submit = lambda order: setattr(endpoint, "answers", 503)

    with pytest.raises(OutOfReachError, match=r"it goes on\. Run again") as caught:
        Flow(endpoint, patience_s=0.2).train(job)

    assert caught.value.is_transient
    assert [known["status"] for known in endpoint.jobs.values()] == ["RUNNING"]


def test_who_attaches_is_told_the_end_of_what_the_job_said_while_nobody_looked(endpoint, job):
    with pytest.raises(OutOfReachError):
        Flow(endpoint, check=death()).train(job)
    (order,) = endpoint.orders.values()
    order.spec.log.write_text("".join(f"line {number}\n" for number in range(100)))

    flow = Flow(endpoint, check=at_check(c3=lambda: endpoint.finish(order))).train(job)

    (told,) = [sentence for sentence in flow.said if "line 99" in sentence]
    assert told.startswith(f"the cluster said before (88 more lines in {order.spec.log}")
    assert told.splitlines()[1:] == [f"line {number}" for number in range(88, 100)]


def test_a_job_is_told_what_its_flow_imports(endpoint, job):
    endpoint.on_submit = endpoint.finish

    Flow(endpoint).train(job)

    (order,) = endpoint.orders.values()
    assert order.flow.versions["torch"] == torch.__version__
    assert order.flow.code == own_code()


def test_other_settings_are_said_to_count_later(endpoint, job):
    with pytest.raises(OutOfReachError):
        Flow(endpoint, check=death()).train(job)
    (order,) = endpoint.orders.values()
    flow = Flow(endpoint, check=at_check(c3=lambda: endpoint.finish(order)))
    more = flow.launcher.cluster.model_copy(update={"workers": 4})
    flow.launcher = replace(flow.launcher, cluster=more)

    flow.train(job)

    assert any("count from the next attempt" in sentence for sentence in flow.said)


def test_an_order_of_another_version_is_not_attached_to(endpoint, job):
    with pytest.raises(OutOfReachError):
        Flow(endpoint, check=death()).train(job)
    order_file(job.scratch, "0001").write_text("{}")
    endpoint.on_submit = endpoint.finish

    Flow(endpoint).train(job)

    states = [known["status"] for known in endpoint.jobs.values()]
    assert states == ["STOPPED", "SUCCEEDED"]


def test_a_last_word_is_found_in_a_log_and_a_torn_one_is_not():
    line = last_word(DataError("odd", why="rows", fix="mend"))

    found = found_last_word(f"(raylet) noise\n{line}\n")

    assert (type(found), found.what, found.fix) == (DataError, "odd", "mend")
    assert found_last_word(line[:-9]) is None
    assert found_last_word("") is None


def test_a_log_is_told_in_doses_its_end_in_full_and_nothing_of_before(tmp_path):
    file, said = tmp_path / "ray.log", []
    file.write_text("old\n")
    teller = LogTeller(file, said.append, every_s=0.0)

    with file.open("ab") as log:
        log.write(b"\x1b[36m(worker)\x1b[0m one\nbroken \xff byte\n")
    teller.catch_up()
    with file.open("a") as log:
        log.writelines(f"line {number}\n" for number in range(1000))
    teller.catch_up()
    teller.catch_up()

    assert said[0] == "the cluster says:\n(worker) one\nbroken \ufffd byte"
    assert said[1].splitlines()[0].startswith(f"the cluster says (988 more lines in {file}, ")
    assert said[1].splitlines()[-1] == "line 999"
    assert len(said) == 2


def test_what_bitsandbytes_says_of_kernels_from_a_hub_is_no_news(tmp_path):
    said = []
    teller = LogTeller(tmp_path / "ray.log", said.append, every_s=0.0)

    (tmp_path / "ray.log").write_text(
        "(RayTrainWorker pid=1) Failed to load CPU gemm_4bit_forward from kernels-community: No "
        "module named 'kernels'.\nloading the base\n"
    )
    teller.catch_up()

    assert said == ["the cluster says:\nloading the base"]


def test_of_a_traceback_the_last_line_is_told_and_the_others_are_counted(tmp_path):
    file, said = tmp_path / "ray.log", []
    teller = LogTeller(file, said.append, every_s=0.0)

    file.write_text(
        "\x1b[36m(Worker pid=1)\x1b[0m going down\n"
        "\x1b[36m(Worker pid=1)\x1b[0m Traceback (most recent call last):\n"
        '\x1b[36m(Worker pid=1)\x1b[0m   File "a.py", line 1, in f\n'
    )
    teller.catch_up()
    with file.open("a") as log:
        log.write(
            "(Worker pid=1)     g()\n(Worker pid=1) OSError: no room\n"
            "(Worker pid=1)   at once\nTraceback (most recent call last):\n  none\nValueError\n"
        )
    teller.catch_up()

    assert said[0].splitlines()[0].startswith(f"the cluster says (2 more lines in {file}, ")
    assert said[0].splitlines()[1:] == ["(Worker pid=1) going down"]
    assert said[1].splitlines()[0].startswith(f"the cluster says (3 more lines in {file}, ")
    assert said[1].splitlines()[1:] == [
        "(Worker pid=1) OSError: no room",
        "(Worker pid=1)   at once",
        "ValueError",
    ]


def test_what_opens_doors_is_masked_in_what_is_told_of_a_log(tmp_path):
    file, said = tmp_path / "ray.log", []
    secrets = "https://me:c4nary@host/x Authorization: Bearer c4nary.of+http hf_c4naryc4naryc4nary"
    across = f"{'x' * 230} hf_c4naryc4naryc4nary"  # cut first, it would be no token any more
    file.write_text(f"before {secrets}\n")
    teller = LogTeller(file, said.append, every_s=0.0)

    teller.recall()
    with file.open("a") as log:
        log.write(f"after {secrets}\n{across}\n")
    teller.catch_up()

    assert len(said) == 2
    assert "c4nary" not in f"{said} {last_lines(file)}"
    assert said[0].endswith("before https://***@host/x Authorization: Bearer *** ***")
    assert said[1].endswith("xxx ***")


def test_a_log_that_never_rests_is_told_now_and_then(tmp_path):
    said = []
    teller = LogTeller(tmp_path / "ray.log", said.append, every_s=60.0)

    for number in range(5):
        with (tmp_path / "ray.log").open("a") as log:
            log.write(f"line {number}\n")
        teller.catch_up()
    assert said == []
    teller.catch_up(is_end=True)

    assert said == ["the cluster says:\nline 0\nline 1\nline 2\nline 3\nline 4"]
