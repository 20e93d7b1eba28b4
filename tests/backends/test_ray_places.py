"""How long a training may be without workers; Ray's controller is played by its own states."""

import pytest
import ray.train  # noqa: F401  # before its inner parts
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    RestartingState,
    RunningState,
    SchedulingState,
)

from qlora_core.backends.ray_places import PlacesAwaited
from qlora_core.backends.ray_worker import RaySpec, WorkerOrder
from qlora_core.config import ClusterConfig, SnapshotConfig
from qlora_core.errors import NoRoomError
from qlora_core.training.journal import NOTES_FILE

RANGE = ClusterConfig(address="head:6379", workers={"min": 2, "max": 8})
WAITING = [InitializingState(), SchedulingState(None), RestartingState(None)]


class Clock:
    """A clock that stands until it is set."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def spec(make_job) -> RaySpec:
    job = make_job()
    return RaySpec(job=job, snapshots=SnapshotConfig(), launch="0001", log=job.scratch / "log")


@pytest.fixture
def controller(spec, clock):
    """Return what tells the state that a controller is in at a time."""
    awaited = PlacesAwaited(RANGE, WorkerOrder(spec=spec), patience_s=300.0, clock=clock)

    def at(now_s: float, state: object) -> None:
        clock.now_s = now_s
        awaited.after_controller_state_update(None, state)

    return at


@pytest.mark.parametrize("state", WAITING, ids=lambda state: type(state).__name__)
def test_without_places_for_the_least_workers_a_launch_ends_after_a_while(state, controller):
    controller(1000.0, state)
    controller(1299.0, state)

    with pytest.raises(NoRoomError, match=r"^2 workers, the least .* no places for 300 s"):
        controller(1300.0, state)


def test_it_is_said_once_that_places_are_waited_for(spec, controller):
    notes = spec.job.scratch / NOTES_FILE
    controller(0.0, WAITING[0])
    controller(29.0, WAITING[0])
    assert not notes.exists(), "workers that start anew take as long"

    for now_s in (30.0, 31.0, 200.0):
        controller(now_s, WAITING[0])

    (note,) = notes.read_text().splitlines()
    assert "no places for 2, the least" in note
    assert "Waiting up to 300 s" in note


def test_only_time_at_a_stretch_counts(controller):
    for start_s in (0.0, 400.0, 800.0):
        controller(start_s, RestartingState(None))
        controller(start_s + 299.0, SchedulingState(None))
        controller(start_s + 299.5, RunningState())
        controller(start_s + 399.0, RunningState())
