import pytest

from qlora_core.backends import ray_resources
from qlora_core.backends.ray_resources import idle_gpus, require_local_room, share_out
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


FOUR_OF_FOUR = 4 * [{"CPU": 16.0, "GPU": 4.0}]


def test_gpus_that_stay_idle_are_counted_with_what_would_use_them():
    said = idle_gpus(ClusterConfig(workers=1), FOUR_OF_FOUR, gpus=1.0)

    assert "1 of 16 places for workers is used" in said
    assert "15 of the GPUs" in said
    assert said.endswith("cluster.workers=16")
    assert share_out(ClusterConfig(workers=16), FOUR_OF_FOUR) == (4, 1.0)


def test_a_range_of_workers_is_told_a_larger_one():
    cluster = ClusterConfig(workers={"min": 2, "max": 8})

    assert "8 of 16 places for workers are used" in idle_gpus(cluster, FOUR_OF_FOUR, 1.0)
    assert idle_gpus(cluster, FOUR_OF_FOUR, 1.0).endswith("cluster.workers={min: 2, max: 16}")


def test_the_gpu_of_a_worker_that_measures_snapshots_is_not_idle():
    seven = ClusterConfig(workers=7)

    assert idle_gpus(seven, 2 * GPU_NODE, 1.0, num_beside=1) == ""
    assert idle_gpus(seven, 2 * GPU_NODE, 1.0).endswith("cluster.workers=8")
    six = idle_gpus(seven.model_copy(update={"workers": 5}), 2 * GPU_NODE, 1.0, num_beside=1)
    assert "6 of 8 places" in six
    assert six.endswith("cluster.workers=7")


@pytest.mark.parametrize(
    ("cluster", "nodes", "gpus"),
    [
        (ClusterConfig(workers=4), GPU_NODE, 1.0),
        (ClusterConfig(workers={"min": 1, "max": 64}), GPU_NODE, 1.0),
        (ClusterConfig(workers=1), TWO_SMALL, 0.0),  # one place of six; it has a node's cores
        (ClusterConfig(workers=1, gpus_per_worker=0), GPU_NODE, 0.0),  # as the recipe wants it
        (ClusterConfig(workers=1), [{"CPU": 1.0, "GPU": 4.0}], 1.0),  # no cores for a second worker
        (ClusterConfig(workers=1, cpus_per_worker=16), GPU_NODE, 1.0),
        (ClusterConfig(workers=1, gpus_per_worker=0.5), [{"CPU": 4.0, "GPU": 1.0}], 0.5),
    ],
)
def test_nothing_is_said_where_no_gpu_stays_idle_that_a_worker_could_have(cluster, nodes, gpus):
    assert idle_gpus(cluster, nodes, gpus) == ""


@pytest.mark.parametrize(("cores", "most"), [(1, 2), (2, 2), (8, 8)])
def test_this_machine_holds_a_worker_for_each_core_or_two(cores, most, monkeypatch):
    monkeypatch.setattr(ray_resources, "own_cores", lambda: cores)
    require_local_room(ClusterConfig(workers=most))

    with pytest.raises(ResourceError, match=f"workers={most + 48}") as caught:
        require_local_room(ClusterConfig(workers=most + 48))

    assert caught.value.fix == f"Try cluster.workers={most}."
