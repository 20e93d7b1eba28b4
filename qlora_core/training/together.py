"""Passes that all workers make together, as a sharded base asks for.

Each worker takes part in putting every block together, so all must make the same number of passes
over the model, whatever rows they have. How many is known to each without asking: a step is dealt
out by a pure function. A worker whose rows have run out walks along without computing
(`modeling.sharding`), and adds nothing.

No worker can halve its passes alone, either. One that runs out of memory walks along to the end of
the step; then all hear of it, make their passes smaller, and compute the step again from its start.
A step's gradients are the same sums, so this changes no result.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeVar

import numpy as np
import torch

from qlora_core.artifacts import Incident
from qlora_core.modeling.sharding import ShardedBase
from qlora_core.training.batching import Indices
from qlora_core.training.comm import Comm
from qlora_core.training.memory import is_out_of_memory
from qlora_core.training.room import Room

R = TypeVar("R")
_NONE: Indices = np.array([], np.int64)


def cut_alike(shares: list[list[Indices]], rank: int, num_rows: int) -> list[Indices]:
    """Return the passes of one worker, as many as all others make; some may be without rows.

    Args:
        shares: The micro-batches of every worker, from `deal`.
        rank: The worker.
        num_rows: Of a pass, at most.
    """
    passes = []
    for chunks in zip_longest(*shares, fillvalue=_NONE):
        most = max(len(chunk) for chunk in chunks)
        passes += np.array_split(chunks[rank], -(-most // num_rows))
    return passes


@dataclass
class Together:
    """One worker's part in passes that all make."""

    base: ShardedBase
    comm: Comm
    room: Room
    """Has the same number of rows on all workers."""
    device: torch.device
    met: Callable[[Incident], None]
    """Told on rank 0 that all have halved their passes."""
    forget: Callable[[], None]
    """Lets go of what a pass that ran out of memory has left in the model."""
    _num_failed_rows: int = 0
    _why: str = ""

    def passes(
        self, compute: Callable[[Indices], R], shares: list[list[Indices]], *, goes_back: bool
    ) -> Iterator[R]:
        """Yield what ``compute`` returns for each pass of this worker that has rows.

        Nothing more is computed after a pass that ran out of memory; ask `must_repeat` then.

        Args:
            compute: Runs the model forward, and backward if ``goes_back``.
            shares: The micro-batches of every worker.
            goes_back: There is a backward pass.
        """
        for rows in cut_alike(shares, self.comm.rank, self.room.num_rows):
            self.base.begin_pass(goes_back=goes_back)
            found = self._computed(compute, rows) if len(rows) and not self._why else []
            self.base.end_pass()
            yield from found

    def must_repeat(self) -> bool:
        """Say whether some worker ran out of memory; passes are smaller from now on, then.

        Raises:
            ResourceError: It did so on a single row.
        """
        failures = torch.tensor([float(bool(self._why))], device=self.device)
        self.comm.all_reduce_sum(failures)
        if not failures.item():
            return False
        failed = max(self.comm.gather([self._num_failed_rows, self._why]))
        self._num_failed_rows, self._why = 0, ""
        incident = self.room.shrink(*failed)
        if self.comm.rank == 0:
            self.met(incident)
        return True

    def _computed(self, compute: Callable[[Indices], R], rows: Indices) -> list[R]:
        try:
            return [compute(rows)]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._num_failed_rows, self._why = len(rows), str(error)[:300] or "out of memory"
        self.forget()  # only now: the error held what the pass had computed
        return []
