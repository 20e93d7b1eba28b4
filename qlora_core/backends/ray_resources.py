"""What workers need against what nodes have, compared first: Ray itself would wait for ever.

No Ray in here: a node is the plain dict of resources that Ray reports for it.
"""

import itertools
import os

from qlora_core.config import ClusterConfig, WorkerRange
from qlora_core.errors import ResourceError

Node = dict[str, float]
"""The resources of one node by Ray's names: CPU, GPU, ..."""

WORKER_PROCESS = {
    "TOKENIZERS_PARALLELISM": "false",
    # Active spinning is up to 1.6 times faster on idle cores, 2 to 6 times slower on shared ones;
    # and they are shared: the base model is evaluated beside training.
    "OMP_WAIT_POLICY": "passive",
    # glibc gives memory back after every step and takes it again, page by page: let it keep it.
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    # For what is given back at once all the same (`modeling.heap`): pages of 2 MB, not of 4 KB.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    # torch's own default: of a lost peer nccl's watchdog ends the process. Ray Train sets 1, which
    # aborts the sum under way first, so a step might go on with half of it. Not run on GPUs yet.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
}
"""Environment of a process that trains; read when it starts."""


def own_cores() -> int:
    """Return the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_cpus(cluster: ClusterConfig) -> int:
    """Return the CPUs a Ray of our own counts: two workers may share one core, unless told.

    So everything can be tried out anywhere; more workers than cores would only fill the memory.
    """
    is_told = cluster.cpus_per_worker is not None
    return own_cores() if is_told else max(own_cores(), min(cluster.max_workers, 2))


def cores_of_worker(cluster: ClusterConfig) -> int:
    """Return how many cores a worker has if all of them run on this machine."""
    local = [{"CPU": float(local_cpus(cluster))}]
    return share_out(cluster.model_copy(update={"gpus_per_worker": 0.0}), local)[0]


def require_local_room(cluster: ClusterConfig) -> None:
    """Find at once that this machine is too small; GPUs are counted when Ray runs.

    Raises:
        ResourceError: It has not the cores.
    """
    cores_of_worker(cluster)


def share_out(
    cluster: ClusterConfig, nodes: list[Node], *, one_more: bool = False
) -> tuple[int, float]:
    """Return (cpus, gpus) of each worker: what was asked for, else as many CPUs as fit.

    Of a range of workers, as many as there is room for share out the cores.

    Args:
        cluster: What is asked for.
        nodes: What there is.
        one_more: Leave cores to a worker more where a GPU is left for it, so that it is not idle.

    Raises:
        ResourceError: The nodes cannot hold so many workers of that size.
    """
    has_gpus = any(node.get("GPU", 0) for node in nodes)
    gpus = cluster.gpus_per_worker if cluster.gpus_per_worker is not None else float(has_gpus)
    most = int(max((node.get("CPU", 0) for node in nodes), default=0))
    wanted = [cluster.cpus_per_worker] if cluster.cpus_per_worker else range(most, 0, -1)
    room = _places(nodes, cluster.cpus_per_worker or 1, gpus)
    num_workers = max(cluster.min_workers, min(cluster.max_workers, room))
    most_wanted = [cluster.max_workers + 1] if one_more and gpus else []
    for num_places, cpus in itertools.product([*most_wanted, num_workers], wanted):
        if _places(nodes, cpus, gpus) >= num_places:
            return cpus, gpus
    raise _too_little(cluster, nodes, cluster.cpus_per_worker or 1, gpus)


def idle_gpus(cluster: ClusterConfig, nodes: list[Node], gpus: float, num_beside: int = 0) -> str:
    """Return what to say of GPUs that more workers would use; nothing if there are none.

    Of GPUs alone: without them one worker takes all the cores of a node, and no place stays empty.

    Args:
        cluster: How many workers were asked for.
        nodes: Hold them.
        gpus: Of each worker.
        num_beside: Workers that take a GPU but do not train: one measures snapshots.
    """
    room = _places(nodes, cluster.cpus_per_worker or 1, gpus)
    used = min(cluster.max_workers + num_beside, room)
    num_idle = int(sum(node.get("GPU", 0) for node in nodes) - used * gpus)
    if not gpus or used == room or not num_idle:
        return ""
    most, workers = room - num_beside, cluster.workers
    more = most if isinstance(workers, int) else workers.model_copy(update={"max": most})
    return (
        f"{used} of {room} places for workers {'is' if used == 1 else 'are'} used, and {num_idle} "
        f"of the GPUs will stay idle. To train on all of them: cluster.workers={_shown(more)}"
    )


def _too_little(cluster: ClusterConfig, nodes: list[Node], cpus: int, gpus: float) -> ResourceError:
    places = _places(nodes, cpus, gpus)
    there = ", ".join(f"{n.get('CPU', 0):g} CPU and {n.get('GPU', 0):g} GPU" for n in nodes)
    ways = [f"cluster.workers={places}"] if places else []
    if gpus and not any(node.get("GPU", 0) for node in nodes):
        ways.append("cluster.gpus_per_worker=0, if the cluster has no GPUs")
    elif gpus or cpus > 1:
        ways.append("smaller workers (cluster.cpus_per_worker, cluster.gpus_per_worker)")
    return ResourceError(
        f"cluster.workers={_shown(cluster.workers)} with {cpus} CPU and {gpus:g} GPU each do not "
        f"fit: there is room for {places}.",
        why=f"The nodes have: {there or 'nothing'}.",
        fix=f"Try {' or '.join(ways)}." if ways else "Add a node to the cluster.",
    )


def _shown(workers: int | WorkerRange) -> str:
    return (
        str(workers) if isinstance(workers, int) else f"{{min: {workers.min}, max: {workers.max}}}"
    )


def places_on(node: Node, cpus: int, gpus: float) -> int:
    """Return how many workers of that size a node holds when nothing else runs there."""
    return _places([node], cpus, gpus)


def _places(nodes: list[Node], cpus: int, gpus: float) -> int:
    by_cpu = [int(node.get("CPU", 0) // cpus) for node in nodes]
    if not gpus:
        return sum(by_cpu)
    by_gpu = [int(node.get("GPU", 0) // gpus) for node in nodes]
    return sum(min(pair) for pair in zip(by_cpu, by_gpu, strict=True))
