"""Memory that a worker has used, and what it may use.

On a CPU the peak is the kernel's own high-water mark of resident memory (`VmHWM`), which counts
from the start of this program; `ru_maxrss` also remembers the parent's from before it. What is free
is what the machine says, or the container's limit (cgroup v2), which the machine does not know of.
"""

import resource
import sys
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")
_OUT_OF_MEMORY = (
    "can't allocate memory",  # torch on a CPU
    "CUDA error: out of memory",  # pinned host memory, other libraries' kernels
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process used so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_for_worker(device: torch.device, num_sharing: int) -> int:
    """Return what this worker may use [bytes], what it uses already included.

    Args:
        device: Its own GPU, or the CPU.
        num_sharing: Workers on this machine, who share a CPU's memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device))
    own = int(psutil.Process().memory_info().rss)
    return own + free_bytes() // num_sharing


def free_bytes(cgroup: Path = _CGROUP) -> int:
    """Return what is free for new memory on this machine, or in this container if that is less."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((cgroup / "memory.max").read_text())  # "max": none
        used = int((cgroup / "memory.current").read_text())
        stated = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    cached = int(stated.get("inactive_file", 0))  # given back when memory is short
    return max(0, min(free, limit - used + cached))


def total_bytes(cgroup: Path = _CGROUP) -> int:
    """Return what this machine has, or what this container may use if that is less."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int((cgroup / "memory.max").read_text()))
    except (OSError, ValueError):  # "max": no limit
        return total


def is_out_of_memory(error: RuntimeError) -> bool:
    """Say whether a computation failed for want of memory, which fewer rows may have enough of."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error) for text in _OUT_OF_MEMORY
    )
