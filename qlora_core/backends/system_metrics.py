"""What the machine is doing while a run goes on, sampled for the run's system page.

Not MLflow's own monitor: that needs an answering server for every sample, and gives up for good at
the first outage. The names are MLflow's, so its UI puts them on the right page.
"""

import psutil

_MEGABYTE = 1e6


def sample_system() -> dict[str, float]:
    """Return the machine's load, and the memory of this process and all that it started."""
    memory = psutil.virtual_memory()
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(interval=None),
        "system/system_memory_usage_megabytes": memory.used / _MEGABYTE,
        "system/system_memory_usage_percentage": memory.percent,
        "system/run_memory_megabytes": _tree_bytes() / _MEGABYTE,
    }


def _tree_bytes() -> int:
    total = 0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it ended just now
            continue
    return total
