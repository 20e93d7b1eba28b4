"""Memory that a worker has used, and what it may use.

On a CPU the peak is the kernel's own high-water mark of resident memory (`VmHWM`), which counts
from the start of this program; `ru_maxrss` also remembers the parent's from before it.
"""

import resource
import sys
from pathlib import Path

import psutil
import torch

from qlora_core.modeling.machine import free_bytes, gpu_bytes

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
        return gpu_bytes(device)
    own = int(psutil.Process().memory_info().rss)
    return own + free_bytes() // num_sharing


def is_out_of_memory(error: RuntimeError) -> bool:
    """Say whether a computation failed for want of memory, which fewer rows may have enough of."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error) for text in _OUT_OF_MEMORY
    )
