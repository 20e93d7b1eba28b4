"""Was a worker killed for the memory it took? It cannot say so itself.

The kernel ends a process without a word, but it counts how many it has ended: for this container
(cgroup v2), else for the whole machine. A worker that starts compares the count with what its
predecessor found in the same launch. Somebody else's process may be counted on a machine without
containers; then passes have fewer rows for nothing, which costs a little speed and no correctness.

Source: Linux, Documentation/admin-guide/cgroup-v2.rst (memory.events), mm/vmstat.c (oom_kill).
"""

import socket
from pathlib import Path

from pydantic import ValidationError

from qlora_core.artifacts import Frozen
from qlora_core.training.durable import replace_durably

FOLDER = "killed"
COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))


class _Count(Frozen):
    launch: str
    num_killed: int


def killed_since_last_start(
    scratch: Path, launch: str, rank: int, counters: tuple[Path, ...] = COUNTERS
) -> bool:
    """Say whether the kernel killed for memory here since worker ``rank`` last started.

    Only starts of the same launch are compared, which are minutes apart.
    """
    file = scratch / FOLDER / f"{socket.gethostname()}-{rank}.json"
    found = _Count(launch=launch, num_killed=_num_killed(counters))
    before = _read(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(file, found.model_dump_json().encode())
    return before is not None and before.launch == launch and found.num_killed > before.num_killed


def _read(file: Path) -> _Count | None:
    try:
        return _Count.model_validate_json(file.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _num_killed(counters: tuple[Path, ...]) -> int:
    for path in counters:
        try:
            stated = dict(line.split() for line in path.read_text().splitlines())
            return int(stated["oom_kill"])
        except (OSError, ValueError, KeyError):
            continue
    return 0
