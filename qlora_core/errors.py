"""Every error this project raises on purpose: what happened, why, and what to change.

::

    QLoraError                    exit code 1
    |- UserError                  exit code 2: a person can mend it, so nothing retries it
    |  |- ConfigError             the recipe; carries *all* its problems at once
    |  |- DataError               the rows
    |  |- ModelError              the model, its tokenizer or its chat template
    |  |- StoreError              the place where artefacts are kept: no room, no permission
    |  |- ResourceError           asked for more memory, devices or workers than there are
    |  '- ClusterError            nodes of the cluster; carries *all* their problems at once
    |- ArtifactError              an artefact is damaged, or is not what the caller took it for
    |- TrainingError              training cannot go on
    |  '- NotFiniteError          the loss or a gradient is NaN or infinite
    '- LaunchError                workers or servers were lost: worth another try
       |- CollectiveError         a message between workers failed
       |- KilledError             a process was killed for the memory it took
       |- DeviceError             a GPU has failed
       |- WorkersLostError        workers were lost again and again
       |- LaunchLostError         a loss that Ray does not get over by itself
       |- HeadLostError           nobody answers where the cluster's head has been
       '- NoRoomError             others use the places or the memory that workers need

Errors cross process borders (Ray workers, the training driver, Prefect), so each is rebuilt from
its plain fields by pickle and by `to_json`/`from_json`, and none keeps an exception object inside.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self


class QLoraError(Exception):
    """Something went wrong that this project understands.

    Args:
        what: What happened, one sentence, naming the offending value.
        why: Why that is a problem, where it is not plain.
        fix: What to change, with a value that would do.
    """

    exit_code: ClassVar[int] = 1
    is_transient: ClassVar[bool] = False

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return "\n".join(part for part in (self.what, self.why, self.fix) if part)

    def __reduce__(self) -> tuple[Any, ...]:
        return (from_json, (self.to_json(),))

    def to_json(self) -> dict[str, str]:
        """Return the plain fields from which `from_json` builds an equal error."""
        return {"type": type(self).__name__, "what": self.what, "why": self.why, "fix": self.fix}


class UserError(QLoraError):
    """A person can mend this by changing what they gave; trying again unchanged cannot help."""

    exit_code = 2

    @classmethod
    def of(cls, problems: list[str], source: str) -> Self:
        """Return one error that lists every problem found in ``source``."""
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        return cls(f"{source}: {count}\n" + "\n".join(f"  - {problem}" for problem in problems))


class ConfigError(UserError):
    """The recipe has problems, all of them listed: field path, what was given, what would do."""


class DataError(UserError):
    """The rows cannot be trained on."""


class ModelError(UserError):
    """The model, its tokenizer or its chat template cannot be used."""


class StoreError(UserError):
    """The store cannot be read or written."""


class StoreAwayError(StoreError):
    """The store cannot be read or written just now: full, read-only, or its disk is out of reach.

    Somebody may be mending it, so training waits for it a few times; what it fails at with any
    other `StoreError` (a folder that is not ours, say) stays as it is until a person changes it.
    """


class ResourceError(UserError):
    """More was asked for than the machine or the cluster has."""


class ClusterError(UserError):
    """Nodes of the cluster cannot do this run: which, what was found there, what was wanted."""


class ArtifactError(QLoraError):
    """An artefact is damaged, or is not what the caller took it for."""


class TrainingError(QLoraError):
    """Training cannot go on."""


class NotFiniteError(TrainingError):
    """The loss or a gradient is NaN or infinite."""


class LaunchError(QLoraError):
    """Workers or servers were lost or never came; the same call may succeed later."""

    is_transient = True


class CollectiveError(LaunchError):
    """A message between workers failed, or took too long."""


class KilledError(LaunchError):
    """A process was killed for the memory it took."""


class DeviceError(LaunchError):
    """A GPU has failed; its process cannot use it any more, another one may."""


class WorkersLostError(LaunchError):
    """Workers were lost again and again, each time after new ones had been started."""


class LaunchLostError(LaunchError):
    """A worker, a node or Ray Train's controller was lost where Ray replaces none."""


class HeadLostError(LaunchError):
    """Nobody answers where the cluster's head has been."""


class NoRoomError(LaunchError):
    """Others use the places or the memory that workers need, for a long time."""


_PASSING = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.ENOENT,  # a mount that was dropped: what was made there is gone
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
)
"""What a disk or a network may get over without anybody changing the recipe."""


def from_json(fields: dict[str, str]) -> QLoraError:
    """Rebuild an error from `QLoraError.to_json`; an unknown type becomes a plain QLoraError."""
    known = {cls.__name__: cls for cls in _tree(QLoraError)}
    cls = known.get(fields["type"], QLoraError)
    return cls(fields["what"], why=fields["why"], fix=fields["fix"])


def storage_error(error: OSError, path: object, doing: str = "write") -> StoreError:
    """Say in our words what the operating system said of ``path``: full, read-only, forbidden."""
    reasons = {
        errno.ENOSPC: ("the disk is full", "Free some space, or name a store on another disk"),
        errno.EDQUOT: ("your disk quota is used up", "Free some space, or name another store"),
        errno.EROFS: ("the file system is read-only", "Name a store that can be written"),
        errno.EACCES: ("permission denied", "Name a store that you may write"),
        errno.EPERM: ("permission denied", "Name a store that you may write"),
        errno.ENOTDIR: ("a file is in the way", "Name a folder, not a file"),
        errno.EEXIST: ("a file is in the way", "Name a folder, not a file"),
        errno.ENOENT: (
            "there is no such file or folder",
            "Name a store that is there or can be made, as /data/qloraflow",
        ),
        errno.EIO: ("the disk, or the network to it, has failed", "Look at the disk or its mount"),
        errno.ESTALE: ("its network file system has lost track of it", "Look at the mount"),
        errno.ETIMEDOUT: ("its network file system does not answer", "Look at the mount"),
        errno.ENOTCONN: ("what its file system talks to is gone", "Look at the mount"),
    }
    why, fix = reasons.get(error.errno or 0, (str(error), "Check the path"))
    kind = StoreAwayError if error.errno in _PASSING else StoreError
    return kind(
        f"cannot {doing} {path}: {why}.",
        fix=f"{fix} (workspace.store, or QLORAFLOW_HOME); earlier artefacts are intact.",
    )


@contextmanager
def storing(path: object, doing: str = "write") -> Iterator[None]:
    """Turn what using the store at or below ``path`` fails with into a StoreError.

    Args:
        path: What is written or read.
        doing: `write`, or `read` for what the store must have.

    Raises:
        StoreError: The disk is full, say.
    """
    try:
        yield
    except Exception as error:
        found = _as_os_error(error)
        if found is None:
            raise
        raise storage_error(found, path, doing) from error


@contextmanager
def hiccups_told(path: object) -> Iterator[None]:
    """Turn a failure of the disk or network below ``path``, whatever it was taken for, into ours.

    For inputs: their readers say of a file that is missing or damaged what it means, and take one
    that could not be read just now for the same. Only the latter is worth another try.

    Raises:
        StoreError: The file system could not be read.
    """
    try:
        yield
    except (StoreError, LaunchError):
        raise
    except Exception as error:
        behind: BaseException | None = error
        while behind is not None:
            found = _as_os_error(behind)
            if found is not None and found.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT):
                raise storage_error(found, path, "read") from error
            behind = behind.__cause__ or behind.__context__
        raise


def _as_os_error(error: BaseException) -> OSError | None:
    """Return what the operating system said; safetensors has its number in a text of its own."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def _tree(root: type[QLoraError]) -> list[type[QLoraError]]:
    return [root] + [leaf for child in root.__subclasses__() for leaf in _tree(child)]
