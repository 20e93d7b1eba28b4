"""What workers agree on when they start, before they load anything.

Do all of them see the store? A node that joined late was never asked. And has one been killed for
its memory? Then passes have half as many rows, until they have one; what is killed with that is
given one more chance, as a neighbour may have taken the memory, and ends the run the second time.
"""

import socket
import time
from contextlib import suppress
from pathlib import Path

from qlora_core.artifacts import Incident
from qlora_core.errors import ClusterError, LaunchError, ResourceError, StoreError, storing
from qlora_core.ports import TrainJob
from qlora_core.training.attempt import read_record
from qlora_core.training.comm import Comm
from qlora_core.training.incidents import count, ended_with, history, note
from qlora_core.training.journal import add_notes
from qlora_core.training.killed import Counted, killed_since_last_start
from qlora_core.training.room import SMALLER

_MOST_KILLED = 2
"""With passes of one row."""
_SAYS_NOTHING = {"halved", "collective", "out_of_memory", "killed_nearby"}
"""Of who was lost: what is noted by those that go on, that were left, or that start again."""
_LOOKS = 12
_PAUSE_S = 5.0
"""Between two looks for the store on a node that joined: its mount may take a minute."""


def require_store(job: TrainJob, comm: Comm, launch: str) -> None:
    """Return once every worker sees the folder that the launcher has made.

    Nothing is made here: a node without the store would find its own disk in order. All workers
    raise together, as one that does not see the store cannot leave its error there.

    Where others have trained in this launch, it is a node that joined late, and its mount may be
    later still: it is waited for, and then Ray is left to try again, as often as it may.

    Raises:
        ClusterError: Nodes do not see it.
        LaunchError: Nodes that came later do not see it.
        StoreError: It cannot be read just now.
    """
    for look in range(_LOOKS):
        with storing(job.scratch, "read"):
            told = comm.gather(_seen_here(job.scratch, launch))
        blind = [node for node, _ in told]
        if not any(blind):
            return
        missing = _missing(job.scratch, blind)
        if not any(has_begun for _, has_begun in told):
            raise missing
        if look == 0 and comm.rank == blind.index(None):
            _tell_of(missing, job.scratch, launch)
        time.sleep(_PAUSE_S)
    raise LaunchError(missing.what, why=missing.why, fix=missing.fix)


def _missing(scratch: Path, blind: list[str | None]) -> ClusterError:
    return ClusterError(
        f"{scratch} is not there on {', '.join(sorted(set(filter(None, blind))))}.",
        why="The launcher made it in the store; every node must see the same store.",
        fix="Mount the store at the same path there, for reading and writing, or name one that "
        "every node sees (workspace.store, or QLORAFLOW_HOME).",
    )


def _tell_of(missing: ClusterError, scratch: Path, launch: str) -> None:
    """Tell why training stands still: one worker does, that sees the store."""
    remedy = f"Waiting {_LOOKS * _PAUSE_S:g} s for it there; then new workers."
    incident = Incident(kind="blind_node", what=missing.what, remedy=remedy, launch=launch)
    with suppress(StoreError):  # the others wait for this one's next word
        note(scratch, incident)
        add_notes(scratch, [incident.sentence()])


def _seen_here(scratch: Path, launch: str) -> tuple[str | None, bool]:
    """Return this node's name if it does not see the store, and whether the launch has trained."""
    if blind := _node_without(scratch):
        return blind, False
    record = read_record(scratch)
    return None, record.launch == launch and bool(record.token)


def _node_without(folder: Path) -> str | None:
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return socket.gethostname()
    return None


def agree_on_halvings(job: TrainJob, comm: Comm, launch: str, notes: list[str]) -> int:
    """Return how often the rows of a pass are halved, now that all workers have looked around.

    Args:
        job: What is trained.
        comm: The line to the other workers.
        launch: Name of this launch.
        notes: Where a person is told of a kill.

    Raises:
        ResourceError: Workers were killed again and again, with passes of one row.
        StoreError: The history cannot be read or written.
    """
    told = comm.gather(killed_since_last_start(job.scratch, launch))
    before, is_launchers_word, is_lost = comm.broadcast(_before(job.scratch, launch, comm))
    if not is_lost:  # another process of the container: one that measures snapshots, perhaps
        told = [who and "machine" for who in told]
    most = job.training.micro_batch.bit_length() - 1
    is_own, is_halved = "container" in told, any(told) and before < most
    num_killed: int = before + (is_own or is_halved)
    if num_killed >= most + _MOST_KILLED and (is_own or is_launchers_word):
        raise ResourceError(
            "Workers were killed for their memory, though passes have a single row.",
            why="It came back after going on from the last snapshot.",
            fix=SMALLER,
        )
    if comm.rank == 0 and any(told):
        num_rows = job.training.micro_batch >> num_killed if is_halved else 0
        incident = _incident(told, num_rows).model_copy(update={"launch": launch})
        notes.append(note(job.scratch, incident).sentence())
    return min(num_killed, most)


def _before(scratch: Path, launch: str, comm: Comm) -> tuple[int, bool, bool]:
    """Return what is known of the workers before these.

    How often were workers killed, does the launcher say so of the last launch, and may one of the
    last workers be lost without a word of its own? Not if there were more or fewer of them, or if
    one has said why all start again; that it lost the others says nothing of those.
    """
    last = f"{int(launch) - 1:04d}"
    record = read_record(scratch)
    has_trained = record.launch == launch and bool(record.token)
    since = {past.kind for past in history(scratch) if past.unix_time > record.claimed_s}
    is_lost = not has_trained or (
        record.num_workers[-1] == comm.world_size and since <= _SAYS_NOTHING
    )
    killed = count(scratch, "out_of_memory")
    return killed, ended_with(scratch, "out_of_memory", last), is_lost


def _incident(told: list[Counted | None], num_rows: int) -> Incident:
    """Return what to write down.

    Args:
        told: By each worker.
        num_rows: Of a pass from now on, at most; 0: it cannot have fewer.
    """
    is_own = "container" in told
    rank = told.index("container" if is_own else "machine")
    remedy = f"Passes have at most {num_rows} row{'s' if num_rows > 1 else ''}."
    return Incident(
        kind="out_of_memory" if is_own or num_rows else "killed_nearby",
        what=f"The kernel killed worker {rank} or its neighbour for memory."
        if is_own
        else f"The kernel killed a process for memory where worker {rank} runs, maybe another's.",
        remedy=remedy if num_rows else "Passes have one row already; going on as it is.",
    )
