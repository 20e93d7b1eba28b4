"""Whether this machine has the memory for a training, asked before workers of our own Ray load it.

Without this the kernel kills a worker that does not fit, again and again, with passes of half as
many rows each time. Counted as preflight counts on a cluster, but here and without Ray: a task on
it would take longer than all of this. Nor does it open a GPU: this process would hold some hundred
MB of it for as long as training lasts. The driver's tool is asked what is free instead.

In doubt there is room: swap counts as free, and a worker still finds out by itself.
"""

import subprocess

import psutil

from qlora_core.backends.errands import training_errand
from qlora_core.backends.node_probe import Gpu, Installation, NodeReport
from qlora_core.backends.ray_resources import local_cpus, places_on, share_out
from qlora_core.backends.readiness import Wanted, memory_error
from qlora_core.config import ClusterConfig
from qlora_core.errors import ResourceError
from qlora_core.ports import TrainJob

_TOOL_S = 5.0
_MIB = 1 << 20


def require_memory(job: TrainJob, cluster: ClusterConfig, *, is_waiting: bool) -> None:
    """Return if the smallest pass of ``job`` fits, as far as can be told.

    Args:
        job: What is to be trained.
        cluster: How many workers of what size.
        is_waiting: Workers are there already, without a model.

    Raises:
        ResourceError: It does not fit on this machine.
        NoRoomError: It would, if others did not use the memory.
    """
    gpus_here = _gpus()
    node = {"CPU": float(local_cpus(cluster)), "GPU": float(len(gpus_here))}
    try:
        cpus, gpus = share_out(cluster, [node])
    except ResourceError:
        return  # Ray counts again, and tells that
    errand = training_errand(job, cluster, cpus, gpus)
    try:
        needs = errand.needs()
    except Exception:  # a base or rows that cannot be read: a worker tells what it is about them
        return
    num_workers = min(cluster.max_workers, places_on(node, cpus, gpus))
    report = _report(gpus_here, num_waiting=num_workers if is_waiting and not gpus else 0)
    wanted = Wanted(
        installed=report.installed,
        num_workers=num_workers,
        gpus_per_worker=gpus,
        num_gpus=len(gpus_here),
        compute_dtype=errand.compute_dtype,
        need_bytes=needs.least_bytes,
        smaller=errand.smaller,
        host=needs.host,
    )
    if error := memory_error(report, wanted):
        raise error


def _report(gpus: tuple[Gpu, ...], num_waiting: int) -> NodeReport:
    """Return this machine's memory; of it, what waiting workers hold counts as free for them."""
    from qlora_core.modeling.machine import free_bytes, total_bytes
    from qlora_core.training.room import RUNTIME_BYTES

    free, in_all = free_bytes() + psutil.swap_memory().free, total_bytes()
    return NodeReport(
        paths=(),
        installed=Installation(versions={}, code=""),  # workers import what this process does
        gpus=gpus,
        free_bytes=min(in_all, free + num_waiting * RUNTIME_BYTES),
        total_bytes=in_all,
    )


def _gpus() -> tuple[Gpu, ...]:
    import torch

    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    free = free_by_uuid(_said_by_tool()) if properties else {}
    return tuple(
        Gpu(
            name=found.name,
            capability=(found.major, found.minor),
            total_bytes=found.total_memory,
            free_bytes=min(found.total_memory, free.get(str(found.uuid), found.total_memory)),
        )
        for found in properties
    )


def _said_by_tool() -> str:
    asked = ["nvidia-smi", "--query-gpu=uuid,memory.free", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=_TOOL_S)
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout


def free_by_uuid(said: str) -> dict[str, int]:
    """Return the free bytes of each GPU, by its id as torch knows it.

    Args:
        said: A line for each, as `GPU-0b9e..., 80994`; in MiB, or `[N/A]` of a GPU in parts.
    """
    lines = [line.rpartition(",") for line in said.splitlines()]
    return {
        name.strip().removeprefix("GPU-"): int(size) * _MIB
        for name, _, size in lines
        if size.strip().isdigit()
    }
