import pytest

from qlora_core.backends import ray_resources
from qlora_core.backends.ray_resources import require_local_room, share_out
from qlora_core.config import ClusterConfig, WorkerRange
from qlora_core.errors import ResourceError

TWO_SMALL = [{"CPU": 3.0}, {"CPU": 3.0}]
GPU_NODE = [{"CPU": 16.0, "GPU": 4.0}]


@pytest.mark.parametrize(
    ("workers", "nodes", "expected"),
    [
        (1, TWO_SMALL, (3, 0.0)),
        (2, TWO_SMALL, (3, 0.0)),
        (4, TWO_SMALL, (1, 0.0)),
        (4, GPU_NODE, (4, 1.0)),
        (3, GPU_NODE, (5, 1.0)),
    ],
)
def test_workers_share_out_what_the_nodes_have(workers, nodes, expected):
    assert share_out(ClusterConfig(workers=workers), nodes) == expected


@pytest.mark.parametrize(
    ("workers", "nodes", "expected"),
    [
        (3, GPU_NODE, (4, 1.0)),
        (4, GPU_NODE, (4, 1.0)),  # no GPU is left
        (7, [{"CPU": 64.0, "GPU": 8.0}], (8, 1.0)),
        (6, [{"CPU": 32.0, "GPU": 4.0}] * 2, (8, 1.0)),
        (WorkerRange(min=1, max=3), GPU_NODE, (4, 1.0)),
        (1, TWO_SMALL, (3, 0.0)),  # cores are not idle; a worker takes them
    ],
)
def test_a_gpu_that_is_left_for_a_worker_more_gets_cores(workers, nodes, expected):
    assert share_out(ClusterConfig(workers=workers), nodes, one_more=True) == expected


def test_what_is_asked_for_is_given():
    cluster = ClusterConfig(workers=2, cpus_per_worker=2, gpus_per_worker=0.5)

    assert share_out(cluster, GPU_NODE) == (2, 0.5)


@pytest.mark.parametrize(
    ("cluster", "nodes", "room"),
    [
        (ClusterConfig(workers=7), TWO_SMALL, 6),
        (ClusterConfig(workers=3, cpus_per_worker=2), TWO_SMALL, 2),
        (ClusterConfig(workers=1, cpus_per_worker=4), TWO_SMALL, 0),
        (ClusterConfig(workers=5), GPU_NODE, 4),
        (ClusterConfig(workers=1, gpus_per_worker=1), TWO_SMALL, 0),
        (ClusterConfig(workers=1), [], 0),
    ],
)
def test_too_little_is_said_before_anything_waits(cluster, nodes, room):
    with pytest.raises(ResourceError) as caught:
        share_out(cluster, nodes)

    assert f"cluster.workers={cluster.workers}" in caught.value.what
    assert f"room for {room}." in caught.value.what


def test_a_cluster_without_gpus_is_told_how_to_do_without():
    with pytest.raises(ResourceError) as caught:
        share_out(ClusterConfig(workers=1, gpus_per_worker=1), TWO_SMALL)

    assert caught.value.fix == "Try cluster.gpus_per_worker=0, if the cluster has no GPUs."


@pytest.mark.parametrize(("cores", "most"), [(1, 2), (2, 2), (8, 8)])
def test_this_machine_holds_a_worker_for_each_core_or_two(cores, most, monkeypatch):
    monkeypatch.setattr(ray_resources, "own_cores", lambda: cores)
    require_local_room(ClusterConfig(workers=most))

    with pytest.raises(ResourceError, match=f"workers={most + 48}") as caught:
        require_local_room(ClusterConfig(workers=most + 48))

    assert caught.value.fix == f"Try cluster.workers={most}."
