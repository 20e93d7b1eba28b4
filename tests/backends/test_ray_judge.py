"""When the nodes have room for a worker more. No Ray in here: a node is a plain dict."""

from types import SimpleNamespace

import pytest
import ray

from qlora_core.backends import ray_judge
from qlora_core.backends.ray_judge import WorkerMore
from qlora_core.backends.ray_resources import share_out
from qlora_core.config import ClusterConfig

ELASTIC = {"min": 2, "max": 16}
CPU_NODE, GPU_NODE = {"CPU": 4.0}, {"CPU": 16.0, "GPU": 4.0}


def fits(nodes, cpus=2, gpus=0.0, num_lost=0, address="head:6379", **cluster):
    listed = [{"Alive": n >= num_lost, "Resources": node} for n, node in enumerate(nodes)]
    place = WorkerMore(ClusterConfig(address=address, **cluster), cpus, gpus)
    return place.fits(listed)


@pytest.mark.parametrize(
    ("workers", "num_nodes", "expected"), [(4, 2, False), (3, 2, True), (4, 3, True), (1, 0, False)]
)
def test_workers_without_gpus_leave_room_where_a_whole_one_fits_besides(
    workers, num_nodes, expected
):
    assert fits([CPU_NODE] * num_nodes, workers=workers) is expected


@pytest.mark.parametrize(
    ("workers", "nodes"),
    [(3, [GPU_NODE]), (7, [{"CPU": 64.0, "GPU": 8.0}]), (6, [{"CPU": 32.0, "GPU": 4.0}] * 2)],
)
def test_workers_that_share_out_the_cores_leave_room_where_a_gpu_is_left(workers, nodes):
    cpus, gpus = share_out(ClusterConfig(workers=workers), nodes, one_more=True)

    assert fits(nodes, cpus=cpus, gpus=gpus, workers=workers)


@pytest.mark.parametrize(
    ("workers", "num_nodes", "expected"),
    [(3, 1, True), (4, 1, False), (4, 2, True), (ELASTIC, 1, False), (ELASTIC, 4, False),
     (ELASTIC, 5, True)],
)  # fmt: skip
def test_a_range_of_workers_leaves_a_gpu_only_beyond_its_most(workers, num_nodes, expected):
    assert fits([GPU_NODE] * num_nodes, gpus=1.0, workers=workers) is expected


def test_a_node_that_is_lost_has_no_room():
    assert fits([CPU_NODE] * 3, workers=4)
    assert not fits([CPU_NODE] * 3, workers=4, num_lost=1)


def test_a_range_of_workers_without_gpus_has_room_wherever_one_of_them_fits():
    assert fits([CPU_NODE], workers=ELASTIC)
    assert not fits([CPU_NODE], workers=ELASTIC, num_lost=1)


def test_on_a_ray_of_our_own_cores_are_shared_and_gpus_are_not():
    assert fits([{"CPU": 1.0}], address=None, cpus=1, workers=1)
    assert fits([GPU_NODE], address=None, cpus=5, gpus=1.0, workers=3)
    assert not fits([GPU_NODE], address=None, cpus=4, gpus=1.0, workers=4)


@pytest.mark.parametrize(
    ("free", "workers", "gpus", "expected"),
    [
        ({"CPU": 2.0}, 3, 0.0, True),
        ({"CPU": 1.0}, 3, 0.0, False),
        ({}, ELASTIC, 0.0, True),
        ({"CPU": 8.0, "GPU": 1.0}, 3, 1.0, True),
        ({"CPU": 8.0}, 3, 1.0, False),
    ],
)
def test_a_place_is_unused_when_what_is_booked_is_free(free, workers, gpus, expected, monkeypatch):
    monkeypatch.setattr(ray, "available_resources", lambda: free)
    node = {"NodeID": "ab" * 28, "Alive": True, "Resources": GPU_NODE}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    place = WorkerMore(ClusterConfig(address="head:6379", workers=workers), 2, gpus)

    assert place.is_unused() is expected


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({}, False),
        ({"ab01": "PENDING"}, False),
        ({"ab01": "REMOVED"}, False),
        ({"ab01": "CREATED"}, True),
        ({"ab01": "CREATED", "ab02": "PENDING"}, True),
        ({"ab02": "CREATED"}, False),
        ({"ab01": "CREATED", "cd01": "PENDING"}, False),
        ({"ab01": "RESCHEDULING"}, False),
        ({"ab01": "REMOVED", "cd01": "CREATED"}, True),
    ],
)
def test_training_is_placed_while_all_groups_of_its_job_are(groups, expected, monkeypatch):
    table = {name: {"state": state} for name, state in groups.items()}
    monkeypatch.setattr(ray_judge, "placement_group_table", lambda: table)
    ours = SimpleNamespace(get_job_id=lambda: "01")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: ours)
    place = WorkerMore(ClusterConfig(address="head:6379", workers=1), 2, 0.0)

    assert place.is_training_placed() is expected


@pytest.mark.parametrize(
    ("address", "workers", "gpus", "expected"),
    [
        (None, 1, 0.0, (0, 0.0)),
        (None, 1, 1.0, (0, 1.0)),
        ("head:6379", 1, 0.0, (2, 0.0)),
        ("head:6379", ELASTIC, 0.0, (0, 0.0)),
        ("head:6379", ELASTIC, 1.0, (2, 1.0)),
    ],
)
def test_cores_are_booked_unless_nobody_else_is_there_or_training_takes_them_all(
    address, workers, gpus, expected
):
    place = WorkerMore(ClusterConfig(address=address, workers=workers), 2, gpus)

    booked = place.booking([{"NodeID": "ab" * 28, "Alive": True, "Resources": GPU_NODE}])

    assert (booked["num_cpus"], booked["num_gpus"]) == expected


def test_what_books_no_cores_runs_where_most_are_not_on_a_bare_or_a_lost_node():
    nodes = [
        {"NodeID": name * 28, "Alive": name != "dd", "Resources": {"CPU": cores}}
        for name, cores in {"aa": 0.0, "bb": 2.0, "cc": 8.0, "dd": 64.0}.items()
    ]

    booked = WorkerMore(ClusterConfig(address="head:6379", workers=ELASTIC), 2, 0.0).booking(nodes)

    assert booked["scheduling_strategy"].node_id == "cc" * 28
