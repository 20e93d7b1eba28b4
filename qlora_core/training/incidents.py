"""What went wrong on the way, told apart, and what was done about it.

Whoever meets a fault writes one line into `incidents.jsonl` in the scratch folder: a worker what it
raises itself, the launcher what happens to workers, drivers and nodes. The file outlasts them all, so
the run's history is whole whoever dies, and remedies can be counted: the same fault at the same step
does not get the same remedy twice.

================  ===========================================  ==================================
kind              how it is known                              remedy
================  ===========================================  ==================================
out_of_memory     a worker killed for its memory               passes of half as many rows
collective        a collective that fails or takes too long    new workers, last snapshot
not_finite        loss or gradient NaN or infinite             last snapshot, once; then the end
lost_worker       a worker that is gone without a word         new workers, last snapshot
lost_driver       the driver process is gone                   new driver, last snapshot
storage           the store is full or cannot be written       wait, then last snapshot
preemption        Ray says that a node will be taken away      snapshot at once
user              whatever only a person can mend              none: the end
================  ===========================================  ==================================
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from qlora_core.artifacts import Frozen
from qlora_core.errors import storing

INCIDENTS_FILE = "incidents.jsonl"

Kind = Literal[
    "out_of_memory",
    "collective",
    "not_finite",
    "lost_worker",
    "lost_driver",
    "storage",
    "preemption",
    "user",
]


class Incident(Frozen):
    """One fault, or one warning."""

    kind: Kind
    what: str
    remedy: str
    step: int | None = None
    """The last step that was done, as far as whoever writes knows."""
    launch: str = ""
    unix_time: float = 0.0

    def sentence(self) -> str:
        """Say it to a person."""
        place = "" if self.step is None else f" after step {self.step}"
        return f"{self.kind.replace('_', ' ')}{place}: {self.what} Remedy: {self.remedy}."


def note(scratch: Path, incident: Incident) -> None:
    """Add ``incident`` to the history.

    Raises:
        StoreError: There is no room, say.
    """
    stamped = incident.model_copy(update={"unix_time": time.time()})
    path = scratch / INCIDENTS_FILE
    with storing(path), path.open("a", encoding="utf-8") as file:
        file.write(stamped.model_dump_json() + "\n")


def history(scratch: Path) -> tuple[Incident, ...]:
    """Return what happened so far; a line that a dying process left unfinished is none."""
    try:
        lines = (scratch / INCIDENTS_FILE).read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ()
    return tuple(_parsed(lines))


def _parsed(lines: Iterable[str]) -> Iterable[Incident]:
    for line in lines:
        try:
            yield Incident.model_validate_json(line)
        except ValidationError:
            continue
