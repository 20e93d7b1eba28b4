"""What went wrong on the way, told apart, and what was done about it.

Whoever meets a fault writes one line into `incidents.jsonl` in the scratch folder: a worker what it
sees itself, the launcher what happens to drivers and what they answer. The file outlasts them all,
so the run's history is whole whoever dies, and remedies can be counted: none is tried for ever.

==============  =====================================  ============================================
kind            how it is known                        remedy
==============  =====================================  ============================================
out_of_memory   the kernel or Ray killed a process     passes of half as many rows, last snapshot;
                                                       with one row once more as it is, then the end
halved          a pass ran out of memory               passes of half as many rows, this step again
killed_nearby   the kernel killed one of this machine  last snapshot; passes have one row already
collective      a message between workers fails        new workers, last snapshot
lost_worker     a worker is gone without a word        new workers, last snapshot
lost_gpu        CUDA says so                           new workers, last snapshot
blind_node      a node that joined lacks the store     wait for it; then new workers, a few times
ray_gave_up     more losses than ``max_failures``      a new driver, if training got on in between
resized         the cluster has more or fewer places   other workers, last snapshot
lost_driver     the driver process is gone             a new driver, last snapshot
lost_launch     a loss that Ray does not get over      a new driver, last snapshot
lost_head       nobody answers where a Ray has been    wait, last snapshot; a few times after a step
no_room         the cluster has no places for workers  wait, last snapshot; a few times after a step
not_finite      loss or gradient NaN or infinite       last snapshot, once for a step; then the end
storage         the store cannot be written            wait, last snapshot; a few times
preemption      Ray says a node will be taken away     a snapshot at once
==============  =====================================  ============================================

What only a person can mend (recipe, data, model, too few resources) is none of these: it ends the
run at once.
"""

import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from qlora_core.artifacts import Incident, IncidentKind
from qlora_core.errors import storing

INCIDENTS_FILE = "incidents.jsonl"


def note(scratch: Path, incident: Incident) -> Incident:
    """Add ``incident`` to the history, with the time; return it.

    Raises:
        StoreError: There is no room, say.
    """
    stamped = incident.model_copy(update={"unix_time": time.time()})
    path = scratch / INCIDENTS_FILE
    with storing(path), path.open("a", encoding="utf-8") as file:
        file.write("\n" + stamped.model_dump_json())  # whatever a dying process left unfinished
    return stamped


def history(scratch: Path) -> tuple[Incident, ...]:
    """Return what happened so far; a line that a dying process left unfinished is none.

    Raises:
        StoreError: There may be something, but it cannot be read.
    """
    path = scratch / INCIDENTS_FILE
    with storing(path, "read"):
        try:
            lines = path.read_text("utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return ()
    return tuple(_parsed(lines))


def count(scratch: Path, kind: IncidentKind, step: int | None = None) -> int:
    """Return how often ``kind`` happened so far; with ``step``, after that step alone."""
    return sum(
        past.kind == kind and (step is None or past.step == step) for past in history(scratch)
    )


def ended_with(scratch: Path, kind: IncidentKind, launch: str) -> bool:
    """Say whether ``kind`` is what ended ``launch``, and the last that happened.

    Raises:
        StoreError: The history cannot be read.
    """
    past = history(scratch)
    return bool(past) and past[-1].kind == kind and past[-1].launch == launch


def _parsed(lines: list[str]) -> Iterator[Incident]:
    for line in lines:
        try:
            yield Incident.model_validate_json(line)
        except ValidationError:
            continue
