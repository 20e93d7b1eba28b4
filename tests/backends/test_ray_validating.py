"""Snapshots are measured beside training on Ray, which does not wait for it.

Whatever needs no Ray is tested without: in a place whose room comes and goes, by judges that
answer, die or fail as they are told.
"""

import errno
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ray.exceptions import RayActorError, RayTaskError, RpcError

from qlora_core.artifacts import AdapterCheckpoint
from qlora_core.backends.ray_train import RayTrainLauncher
from qlora_core.backends.ray_validating import Measuring, validated_beside
from qlora_core.backends.ray_worker import RaySpec
from qlora_core.config import ClusterConfig, SnapshotConfig
from qlora_core.errors import LaunchError, ResourceError
from qlora_core.training import snapshot
from qlora_core.training.desk import SUMMARY_FILE
from qlora_core.training.incidents import history
from qlora_core.training.journal import VALIDATIONS_FILE, Validation, read_validations
from qlora_core.training.snapshot import FOLDER, step_of
from tests.backends.ray_head import wait_until
from tests.backends.ray_nodes import place_taken, ray_cluster

pytestmark = pytest.mark.usefixtures("one_thread")
SNAPSHOTS = SnapshotConfig(every_steps=25, keep=4, validate_beside=True)


@dataclass
class ScriptedJudge:
    """Measures when it is let."""

    is_done: bool = False
    meets: Exception | None = None
    is_ended: bool = False
    asked: list[int] = field(default_factory=list)

    def ask(self, folder: Path) -> None:
        self.asked.append(step_of(folder))

    def answer(self) -> Validation | None:
        if self.meets:
            raise self.meets
        return Validation(step=self.asked[-1], heldout_loss=1.0) if self.is_done else None

    def end(self) -> None:
        assert not self.is_ended, "killed twice"
        self.is_ended = True


@dataclass
class ScriptedPlace:
    """Has room when it is told so, and remembers who was hired."""

    is_free: bool = True
    is_training: bool = True
    is_used: bool = False
    num_wanted: int = 17
    meets: Exception | None = None
    hired: list[ScriptedJudge] = field(default_factory=list)

    def has_room(self) -> bool:
        if self.meets:
            raise self.meets
        return self.is_free

    def is_unused(self) -> bool:
        return not self.is_used

    def is_training_placed(self) -> bool:
        return self.is_training

    def hire(self, job) -> ScriptedJudge:
        self.hired.append(ScriptedJudge())
        return self.hired[-1]

    @property
    def judge(self) -> ScriptedJudge:
        """The last one that was hired."""
        return self.hired[-1]


@pytest.fixture
def job(make_job):
    return make_job()


@pytest.fixture
def place():
    return ScriptedPlace()


def save(job, step: int) -> Path:
    """Leave what is seen of a snapshot."""
    folder = job.scratch / FOLDER / f"step_{step:08d}-0001.1"
    folder.mkdir(parents=True)
    return folder


def told(job) -> list[Validation]:
    file = job.scratch / VALIDATIONS_FILE
    lines = file.read_text().splitlines() if file.exists() else []
    return list(read_validations(lines))


def notes(job) -> list[str]:
    return [each.note for each in told(job) if each.note]


def measured(job) -> list[int]:
    return [each.step for each in told(job) if each.heldout_loss is not None]


@pytest.mark.parametrize(
    ("what", "told"),
    [
        (
            "is_free",
            [
                "snapshots.validate_beside: there is no room for a worker more; snapshots are "
                "measured as soon as there is room for 17 workers."
            ],
        ),
        ("is_training", []),
    ],
)
def test_a_judge_is_there_only_while_there_is_room_and_all_that_train_have_theirs(
    what, told, job, place
):
    setattr(place, what, False)
    measuring = Measuring(job, place)
    measuring.begin()
    save(job, 10)

    measuring.poll()
    assert place.hired == []
    setattr(place, what, True)
    measuring.poll()
    assert place.judge.asked == [10]
    setattr(place, what, False)
    measuring.poll()
    measuring.poll()
    assert [judge.is_ended for judge in place.hired] == [True]
    setattr(place, what, True)
    measuring.poll()
    measuring.poll()
    assert [judge.is_ended for judge in place.hired] == [True, False]
    assert place.judge.asked == [10]
    place.judge.is_done = True
    measuring.poll()

    assert measured(job) == [10]
    assert notes(job) == told


def test_a_store_that_cannot_be_read_for_a_moment_ends_no_measuring(job, place, monkeypatch):
    measuring, look = Measuring(job, place), snapshot.snapshots_in
    measuring.begin()
    save(job, 10)

    def hiccup(_) -> list[Path]:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(snapshot, "snapshots_in", hiccup)
    measuring.poll()
    assert place.judge.asked == []
    monkeypatch.setattr(snapshot, "snapshots_in", look)
    measuring.poll()

    assert place.judge.asked == [10]


def test_a_place_that_others_use_is_waited_for_without_a_judge_that_is_asked_meanwhile(job, place):
    place.is_used = True
    measuring = Measuring(job, place)
    measuring.begin()
    save(job, 10)

    measuring.poll()
    assert place.hired == []
    save(job, 20)
    place.is_used = False
    measuring.poll()
    place.is_used = True  # by the judge
    measuring.poll()

    assert [(judge.asked, judge.is_ended) for judge in place.hired] == [([20], False)]


def test_nothing_is_measured_twice_whoever_measured_it(job, place):
    first = Measuring(job, place)
    first.begin()
    save(job, 10)
    first.poll()
    place.judge.is_done = True
    for _ in range(3):
        first.poll()
    first.dismiss()

    second = Measuring(job, place)
    second.begin()
    second.poll()
    save(job, 20)
    second.poll()
    place.judge.is_done = True
    second.poll()

    assert [judge.asked for judge in place.hired] == [[10], [20]]
    assert measured(job) == [10, 20]
    assert notes(job) == []


def test_a_line_that_was_cut_short_spoils_no_other(job, place):
    (job.scratch / VALIDATIONS_FILE).write_text('{"step": 10, "heldout_lo')  # a full disk, say
    measuring = Measuring(job, place)
    measuring.begin()
    save(job, 10)
    measuring.poll()
    place.judge.is_done = True
    measuring.poll()

    again = Measuring(job, place)
    again.begin()
    again.poll()

    assert measured(job) == [10]
    assert [judge.asked for judge in place.hired] == [[10], []]


def test_the_newest_is_measured_and_those_left_out_are_counted_though_they_are_gone(job, place):
    measuring = Measuring(job, place)
    measuring.begin()
    for step in (10, 20, 30):
        folder = save(job, step)
        measuring.poll()
        if step == 20:
            folder.rmdir()  # the trainer keeps but few
    place.judge.is_done = True
    measuring.poll()
    measuring.poll()
    measuring.tell_left_out()

    assert measured(job) == [10, 30]
    assert told(job)[-1].step == 20
    assert notes(job)[-1].startswith("1 snapshots were not measured beside training")


def test_what_came_while_there_was_no_room_is_counted_as_left_out(job, place):
    place.is_free = False
    measuring = Measuring(job, place)
    measuring.begin()
    for step in (10, 20):
        save(job, step)
        measuring.poll()

    measuring.tell_left_out()

    assert notes(job)[-1].startswith("2 snapshots were not measured beside training")
    assert "there was no room" in notes(job)[-1]


def test_judges_that_are_lost_are_replaced_thrice_and_those_killed_for_room_do_not_count(
    job, place
):
    measuring = Measuring(job, place)
    measuring.begin()
    save(job, 10)
    for is_free in [True, False] * 9:
        place.is_free = is_free
        measuring.poll()
    place.is_free = True

    def lose_one() -> None:
        measuring.poll()
        place.judge.meets = RayActorError()
        measuring.poll()

    for _ in range(3):
        lose_one()
    with pytest.raises(LaunchError, match="4 workers were lost"):
        lose_one()

    assert len(place.hired) == 9 + 4
    assert all(judge.is_ended for judge in place.hired)


def beside(job, place, *, is_wanted: bool = True):
    """What a driver does around training."""
    snapshots = SnapshotConfig(validate_beside=is_wanted)
    spec = RaySpec(job=job, snapshots=snapshots, launch="1", log=job.scratch / "log")
    return validated_beside(lambda: spec, place)


def test_the_judge_is_let_go_of_when_training_ends(job, place):
    with beside(job, place):
        save(job, 10)
        wait_until(lambda: place.hired and place.judge.asked)

    assert place.judge.is_ended
    assert notes(job)[-1].startswith("1 snapshots were not measured")


def test_nobody_is_hired_who_is_not_asked_for(job, place):
    with beside(job, place, is_wanted=False):
        save(job, 10)

    assert place.hired == []
    assert told(job) == []


def test_a_ray_that_dies_is_told_and_training_goes_on(job, place):
    with beside(job, place):
        wait_until(lambda: place.hired)
        place.meets = RpcError("the GCS is gone")
        wait_until(lambda: notes(job))

    assert notes(job) == ["Snapshots are not measured any more: RpcError: the GCS is gone"]
    assert place.judge.is_ended


def test_a_judge_that_cannot_measure_says_why_and_holds_no_place(job, place):
    cause = ResourceError("There is no GPU.", fix="Bring one.")
    wrapped = RayTaskError("measure", "Traceback ...", cause, ip="here").as_instanceof_cause()
    with beside(job, place):
        save(job, 10)
        wait_until(lambda: place.hired and place.judge.asked)
        place.judge.meets = wrapped
        wait_until(lambda: notes(job))

    assert notes(job)[0] == "Snapshots are not measured any more: There is no GPU. Bring one."
    assert [judge.is_ended for judge in place.hired] == [True]


@pytest.mark.ray
def test_snapshots_are_measured_beside_training_and_those_left_out_are_counted(make_job):
    job, steps = make_job(epochs=500, heldout_every=25, learning_rate=1e-4), []

    RayTrainLauncher(ClusterConfig(workers=1, cpus_per_worker=1), SNAPSHOTS, print).train(
        job, steps.append
    )

    losses = {each.step: each.heldout_loss for each in told(job) if each.heldout_loss is not None}
    by_training = {step.step: step.heldout_loss for step in steps if step.heldout_loss is not None}
    assert len(losses) >= 3
    assert losses == {step: by_training[step] for step in losses}
    left = len(by_training) - len(losses)
    assert left == 0 or f"{left} snapshots were not measured beside training" in notes(job)[-1]


@pytest.mark.ray
def test_a_range_of_workers_gets_all_places_while_snapshots_are_measured(make_job):
    job, steps = make_job(epochs=500, heldout_every=25, learning_rate=1e-4), []

    with ray_cluster() as nodes:
        nodes.start_head()
        nodes.add_node()
        nodes.wait_for(2)
        cluster = ClusterConfig(
            address=nodes.address, workers={"min": 1, "max": 16}, cpus_per_worker=1, max_failures=0
        )
        RayTrainLauncher(cluster, SNAPSHOTS, print).train(job, steps.append)

    by_training = {step.step: step.heldout_loss for step in steps if step.heldout_loss is not None}
    losses = {each.step: each.heldout_loss for each in told(job) if each.heldout_loss is not None}
    facts = AdapterCheckpoint.model_validate_json((job.scratch / SUMMARY_FILE).read_bytes())
    assert facts.num_workers == 2
    assert history(job.scratch) == ()  # from the first step on
    assert len(losses) >= 3
    assert losses == pytest.approx({step: by_training[step] for step in losses}, rel=1e-5)


@pytest.mark.ray
def test_training_gets_the_last_place_and_the_judge_one_that_others_leave(make_job):
    job, steps = make_job(epochs=300, heldout_every=None, learning_rate=3e-5), []

    with ray_cluster() as nodes:
        nodes.start_head()
        nodes.add_node()
        nodes.wait_for(2)
        cluster = ClusterConfig(address=nodes.address, workers=1, cpus_per_worker=1, max_failures=0)

        with ExitStack() as others:
            others.enter_context(place_taken(nodes.address))

            def go_on(metrics) -> None:
                steps.append(metrics)
                if metrics.step == 30:
                    others.close()

            RayTrainLauncher(cluster, SNAPSHOTS, print).train(job, go_on)

    assert history(job.scratch) == ()
    assert len(steps) == steps[-1].step
    assert len(measured(job)) >= 1


@pytest.mark.ray
def test_a_node_that_joins_is_used_to_measure_until_it_is_lost(make_job):
    job, steps = make_job(epochs=800, heldout_every=None, learning_rate=3e-5), []

    with ray_cluster() as nodes:
        nodes.start_head()
        nodes.wait_for(1)
        cluster = ClusterConfig(address=nodes.address, workers=1, cpus_per_worker=1, max_failures=0)

        def come_and_go(metrics) -> None:
            steps.append(metrics)
            if metrics.step == 1:
                nodes.add_node()
            if len(measured(job)) >= 2 and len(nodes.nodes) == 2:
                nodes.nodes.pop().kill()

        RayTrainLauncher(cluster, SNAPSHOTS, print).train(job, come_and_go)
        num_left = len(nodes.nodes)

    assert len(steps) == steps[-1].step
    assert "there is room for 2 workers" in notes(job)[0]
    assert len(measured(job)) >= 2
    assert num_left == 1, "the node was lost again"
    assert not any("any more" in note for note in notes(job))
