"""Was a worker killed for the memory it took? It cannot say so itself.

The kernel ends a process without a word, but it counts whom it has ended: in the container that a
worker runs in (cgroup v2; a login session is one, too), and on the whole machine. A worker that
starts compares the count with what was found at the last start of the same launch, whichever worker
that was. Where only the machine counts, it may have been anybody's process, and in a container with
all its workers accounted for (`start`) another one of its own. Then passes have fewer rows for
nothing, or training is told to go on as it is, which costs a little speed and no correctness; it
never ends a run.

Source: Linux, Documentation/admin-guide/cgroup-v2.rst (memory.events), mm/vmstat.c (oom_kill).
"""

import re
import socket
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from qlora_core.artifacts import Frozen
from qlora_core.errors import storing
from qlora_core.fingerprint import fingerprint
from qlora_core.training.durable import replace_durably

Counted = Literal["container", "machine"]
"""Whose count has grown."""
FOLDER = "killed"
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


class _Count(Frozen):
    launch: str
    num_killed: int


def killed_since_last_start(scratch: Path, launch: str) -> Counted | None:
    """Say who has counted a kill for memory since workers last started on this machine.

    Only starts of the same launch are compared, which are minutes apart. Workers of one machine may
    do so at once: then each or only the first of them says so.

    Args:
        scratch: The job's scratch folder, which is there.
        launch: Of this start.

    Raises:
        StoreError: The count cannot be kept.
    """
    of, group, num_killed = _num_killed()
    file = scratch / FOLDER / f"{socket.gethostname()}-{fingerprint(str(group))[:12]}.json"
    found, before = _Count(launch=launch, num_killed=num_killed), _read(file)
    with storing(file.parent):
        file.parent.mkdir(exist_ok=True)
    replace_durably(file, found.model_dump_json().encode())
    if before is None or before.launch != launch:
        return None
    return of if num_killed > before.num_killed else None


def _read(file: Path) -> _Count | None:
    with storing(file, "read"):
        try:
            return _Count.model_validate_json(file.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None


def _num_killed() -> tuple[Counted, Path, int]:
    """Return the count that says most of this process, and where it is kept.

    It is that of its own container, if that is counted.
    """
    for of, path in _counters():
        with suppress(OSError, ValueError, KeyError):
            stated = dict(line.split() for line in path.read_text().splitlines())
            return of, path, int(stated["oom_kill"])
    return "machine", PROC, 0


def _counters() -> list[tuple[Counted, Path]]:
    found: list[tuple[Counted, Path]] = []
    with suppress(OSError):
        if own := re.search(r"^0::/(.+)$", (PROC / "self/cgroup").read_text(), re.MULTILINE):
            found.append(("container", CGROUPS / own[1] / "memory.events"))
    return [*found, ("container", CGROUPS / "memory.events"), ("machine", PROC / "vmstat")]
