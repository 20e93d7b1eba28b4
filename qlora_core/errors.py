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
       '- NoRoomError             the cluster had no places for workers for a long time

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


class NoRoomError(LaunchError):
    """The cluster had no places for workers for a long time."""


def from_json(fields: dict[str, str]) -> QLoraError:
    """Rebuild an error from `QLoraError.to_json`; an unknown type becomes a plain QLoraError."""
    known = {cls.__name__: cls for cls in _tree(QLoraError)}
    cls = known.get(fields["type"], QLoraError)
    return cls(fields["what"], why=fields["why"], fix=fields["fix"])


def storage_error(error: OSError, path: object) -> StoreError:
    """Say in our words what the operating system said of ``path``: full, read-only, forbidden."""
    reasons = {
        errno.ENOSPC: ("the disk is full", "Free some space, or name a store on another disk"),
        errno.EDQUOT: ("your disk quota is used up", "Free some space, or name another store"),
        errno.EROFS: ("the file system is read-only", "Name a store that can be written"),
        errno.EACCES: ("permission denied", "Name a store that you may write"),
        errno.EPERM: ("permission denied", "Name a store that you may write"),
        errno.ENOTDIR: ("a file is in the way", "Name a folder, not a file"),
        errno.EEXIST: ("a file is in the way", "Name a folder, not a file"),
        errno.ENOENT: ("such a folder cannot be made", "Name one that can, as /data/qloraflow"),
    }
    why, fix = reasons.get(error.errno or 0, (str(error), "Check the path"))
    return StoreError(
        f"cannot write {path}: {why}.",
        fix=f"{fix} (workspace.store, or QLORAFLOW_HOME); earlier artefacts are intact.",
    )


@contextmanager
def storing(path: object) -> Iterator[None]:
    """Turn what writing below ``path`` fails with into a StoreError.

    safetensors raises an error class of its own that has the operating system's number in its text.

    Raises:
        StoreError: The disk is full, say.
    """
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from error
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise storage_error(OSError(code, os.strerror(code)), path) from error


def _tree(root: type[QLoraError]) -> list[type[QLoraError]]:
    return [root] + [leaf for child in root.__subclasses__() for leaf in _tree(child)]
