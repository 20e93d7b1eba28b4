"""Passes that are tried before training, and failures that all workers learn of.

What a model allows is not known but tried (`training.objective`), so passes may fail here, and a
base in parts makes that a matter of all workers: each block is put together by all of them, and
who gave up a pass in which the others went on would let them wait for ever. So they meet before
every pass and once at the end, and tell whether something has failed. Who fails walks the rest of
the pass's route without computing, then goes to the next meeting, wherever the others have got to
by then; and there all stop. So all make the same number of passes, and come to the same verdict:
all rows are packed, or nobody's.

A worker whose base is whole tries alone: it meets nobody but itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from qlora_core.errors import CollectiveError, ResourceError
from qlora_core.modeling.sharding import ShardedBase
from qlora_core.training.comm import Alone, Comm
from qlora_core.training.memory import is_out_of_memory
from qlora_core.training.room import SMALLER

R = TypeVar("R")


class FailedTryError(Exception):
    """What was tried does not work, here or on another worker.

    It says so in words and holds no other exception: that would hold what the pass had computed.
    """

    def __init__(self, why: str, *, lacks_memory: bool = False) -> None:
        super().__init__(why)
        self.why, self.lacks_memory = why, lacks_memory

    @classmethod
    def of(cls, error: Exception) -> "FailedTryError":
        """Return what to tell of ``error``."""
        if isinstance(error, FailedTryError):
            return error
        lacks_memory = isinstance(error, RuntimeError) and is_out_of_memory(error)
        return cls(f"{type(error).__name__}: {error}"[:500], lacks_memory=lacks_memory)


@dataclass
class Trial:
    """One worker's part in passes that are tried.

    Args:
        comm: The line to the workers who try the same.
        base: In parts on all of them; none: it is whole, and nobody else waits.
    """

    comm: Comm = field(default_factory=Alone)
    base: ShardedBase | None = None
    _verdict: FailedTryError | None = field(default=None, init=False)

    def run(self, compute: Callable[[], R]) -> R:
        """Return what ``compute`` returns, which makes one forward pass.

        Raises:
            FailedTryError: It failed, or something has failed on another worker.
            CollectiveError: The others are gone.
            ResourceError: There is no room for a block.
        """
        self._meet(None)
        if self.base is not None:
            self.base.begin_pass(goes_back=False)
        try:
            found = compute()
        except CollectiveError:
            raise
        except Exception as error:  # whatever an architecture objects to
            failure = FailedTryError.of(error)
        else:
            self._end_pass()
            return found
        self._end_pass()  # only now: the error held what the pass had computed
        raise failure

    def conclude(self, failure: FailedTryError | None) -> FailedTryError | None:
        """Return the verdict of all workers: why it does not work, or none if it does everywhere.

        Args:
            failure: What this worker has found.
        """
        if self._verdict is None:
            try:
                self._meet(failure)
            except FailedTryError as verdict:
                return verdict
        return self._verdict

    def _end_pass(self) -> None:
        """Walk to the end with the others.

        Raises:
            ResourceError: Not even that goes, and there is no other place to meet them.
        """
        if self.base is None:
            return
        try:
            self.base.end_pass()
        except RuntimeError as error:
            raise ResourceError(
                f"Worker {self.comm.rank} has no room for blocks of the base.",
                why=str(error).partition("\n")[0][:300],
                fix=SMALLER,
            ) from error

    def _meet(self, failure: FailedTryError | None) -> None:
        """Tell all how it goes here.

        Raises:
            FailedTryError: It does not go somewhere.
        """
        told = self.comm.gather(failure and [failure.lacks_memory, failure.why])
        failed = [(*entry, rank) for rank, entry in enumerate(told) if entry]
        if not failed:
            return
        lacks_memory, why, rank = min(failed)  # less may help only if memory is all that lacks
        where = "" if len(failed) == len(told) else f"on worker {rank}, "
        self._verdict = FailedTryError(where + why, lacks_memory=lacks_memory)
        raise self._verdict
