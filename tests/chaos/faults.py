"""All faults, in the order of the table."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tests.chaos import flow_runs, network, nodes, processes, storage, tracking
from tests.chaos.place import Place
from tests.chaos.trial import Trial

Prepare = Callable[[Place], object]
"""Makes what a fault's trials compare with, so that none of them pays for it."""


@dataclass(frozen=True)
class Fault:
    """Something that is broken on purpose."""

    name: str
    what: str
    times: int
    """How often, in the whole table."""
    breaks: Callable[[Place, Random], Trial]
    prepare: Prepare


def _two_workers(place: Place) -> object:
    return place.undisturbed(2)


def _medium(place: Place) -> object:
    return place.undisturbed(2, nodes.MEDIUM)


def _one_worker(place: Place) -> object:
    return place.undisturbed(1)


def _here(place: Place) -> object:
    return place.undisturbed_here()


def _flow(place: Place) -> object:
    return flow_runs.undisturbed_digest(place)


def _long(place: Place) -> object:
    return place.undisturbed(2, nodes.LONG)


def _long_alone(place: Place) -> object:
    return place.undisturbed(1, nodes.LONG)


FAULTS = (
    Fault(
        "kill-worker",
        "SIGKILL of a random worker at a random step",
        20,
        processes.kill_worker,
        _two_workers,
    ),
    Fault(
        "kill-raylet",
        "SIGKILL of one of two nodes' raylet, workers 1 to 2: goes on with one",
        5,
        nodes.kill_raylet,
        _medium,
    ),
    Fault(
        "lose-node",
        "SIGKILL of one of two nodes' raylet, workers 2: waits for its return",
        5,
        nodes.kill_raylet_that_returns,
        _medium,
    ),
    Fault(
        "kill-driver",
        "SIGKILL of the process that talks to Ray",
        10,
        processes.kill_driver,
        _two_workers,
    ),
    Fault(
        "kill-launcher",
        "SIGKILL of the process that trains on Ray, the same command again",
        10,
        processes.kill_launcher,
        _two_workers,
    ),
    Fault(
        "kill-flow",
        "SIGKILL of the flow in each of its 8 stages, the same command again",
        10,
        flow_runs.kill_flow,
        _flow,
    ),
    Fault(
        "kill-head",
        "SIGKILL of all of a cluster, the cluster started anew",
        5,
        nodes.kill_head,
        _two_workers,
    ),
    Fault(
        "damage-snapshot",
        "a file of the newest snapshot truncated, or a bit flipped",
        10,
        storage.damage_snapshot,
        _here,
    ),
    Fault(
        "fill-store",
        "no room in the store while saving, for 10 s",
        5,
        storage.fill_store,
        _one_worker,
    ),
    Fault(
        "read-only-store",
        "snapshots' folder read-only while saving, for 10 s",
        5,
        storage.make_store_read_only,
        _one_worker,
    ),
    Fault(
        "stop-mlflow",
        "SIGSTOP of MLflow's server for a minute",
        5,
        tracking.stop_tracking,
        _here,
    ),
    Fault(
        "kill-mlflow",
        "SIGKILL of MLflow's server, started again after a minute",
        5,
        tracking.kill_tracking,
        _here,
    ),
    Fault(
        "preempt",
        "a node announced to be preempted, and taken",
        5,
        nodes.preempt,
        _long,
    ),
    Fault(
        "cut-network",
        "network between two nodes cut for 6 s",
        5,
        network.cut_for_a_moment,
        _two_workers,
    ),
    Fault(
        "cut-network-for-good",
        "network between two nodes cut for good",
        5,
        network.cut_for_good,
        _two_workers,
    ),
    Fault(
        "wake-stale",
        "the only worker cut off for good; it goes on when another has taken over",
        5,
        network.wake_when_replaced,
        _long_alone,
    ),
    Fault(
        "damage-ray-snapshot",
        "Ray's own record of the run truncated, empty, of another version",
        4,
        storage.damage_ray_snapshot,
        _two_workers,
    ),
    Fault(
        "at-once",
        "the same recipe started 2 to 6 times at once",
        5,
        flow_runs.start_at_once,
        _flow,
    ),
)
BY_NAME = {fault.name: fault for fault in FAULTS}
