"""How much memory there is: free on a GPU, free on this machine, and what it has.

A container may use less than its machine has and does not know of it: its limit (cgroup v2) counts
where it is lower.
"""

from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def gpu_bytes(device: torch.device) -> int:
    """Return what this process may use of a GPU: what is free, and what it holds already."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device))


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
