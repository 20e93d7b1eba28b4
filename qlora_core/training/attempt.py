"""Who may write: one attempt at a time, told by a fencing token in the scratch folder's `ATTEMPT`.

A launcher starts *launch* 1, 2, ...; within a launch, Ray may start the workers several times. So a
token is ``<launch>.<start>``, as in ``0002.1``. A worker of an older attempt (cut off by the
network, or a driver killed a second ago) finds another token and stops before it writes. Reading
and writing are two steps, so a race of milliseconds remains: therefore the token is also part of
each snapshot's name, and two attempts never write to one folder.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from qlora_core.artifacts import Frozen
from qlora_core.errors import LaunchError, storing
from qlora_core.training.durable import replace_durably

ATTEMPT_FILE = "ATTEMPT"


class AttemptRecord(Frozen):
    """What `ATTEMPT` holds."""

    launch: str = "0000"
    token: str = ""
    """Of the newest attempt; empty before a worker claimed one."""
    started_after: tuple[int, ...] = ()
    """The step after which each attempt so far started; 0 is the beginning."""
    num_workers: tuple[int, ...] = ()
    """Of each attempt so far."""
    claimed_s: float = 0.0
    """When the newest attempt claimed the folder [Unix seconds]."""


@dataclass(frozen=True)
class Attempt:
    """The right to write into a scratch folder, until a newer attempt claims it."""

    scratch: Path
    token: str

    def require_current(self) -> None:
        """Stop a stale worker.

        Raises:
            LaunchError: A newer attempt has taken over.
        """
        current = read_record(self.scratch).token
        if current != self.token:
            raise LaunchError(
                f"attempt {self.token} is stale: attempt {current or '(new)'} has taken over.",
                why="Two attempts must not write the same snapshots.",
            )


def next_launch(scratch: Path) -> str:
    """Fence off all earlier launches on this scratch folder and return the new one's name.

    Raises:
        StoreError: The folder cannot be made, or not be written.
    """
    with storing(scratch):
        scratch.mkdir(parents=True, exist_ok=True)
    record = read_record(scratch)
    launch = f"{int(record.launch) + 1:04d}"
    _write(scratch, record.model_copy(update={"launch": launch, "token": ""}))
    return launch


def claim(scratch: Path, launch: str, step: int, num_workers: int = 1) -> Attempt:
    """Become the current attempt, of ``num_workers``, which goes on after ``step``.

    Raises:
        LaunchError: A newer launch is already there.
        StoreError: There is no room, say.
    """
    record = read_record(scratch)
    if record.launch > launch:
        raise LaunchError(f"launch {launch} is stale: launch {record.launch} has taken over.")
    is_same = record.launch == launch and record.token
    start = int(record.token.partition(".")[2]) + 1 if is_same else 1
    token = f"{launch}.{start}"
    fresh = AttemptRecord(
        launch=launch,
        token=token,
        started_after=(*record.started_after, step),
        num_workers=(*record.num_workers, num_workers),
        claimed_s=time.time(),
    )
    _write(scratch, fresh)
    return Attempt(scratch, token)


def read_record(scratch: Path) -> AttemptRecord:
    """Return what is known of the attempts; nothing if there is no file, or a damaged one.

    Raises:
        StoreError: There may be one, but it cannot be read.
    """
    path = scratch / ATTEMPT_FILE
    with storing(path, "read"):
        try:
            return AttemptRecord.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return AttemptRecord()


def _write(scratch: Path, record: AttemptRecord) -> None:
    replace_durably(scratch / ATTEMPT_FILE, record.model_dump_json().encode())
