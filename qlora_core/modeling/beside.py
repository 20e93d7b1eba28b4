"""Copies to a GPU that run beside what it computes, instead of in its queue.

What is queued on one CUDA stream runs in turn: the next block, copied from the host on the stream
that computes, would hold up the kernels of this one. So copies have a stream of their own, which is
tied to the computing one twice:

    computing   block 0 |--------- block 1 ---------|-- block 2
                        |                           |
    copying             '-> block 2 comes ----------'

It begins after all that was queued for computing by then, as that may still use the memory that is
filled here: the allocator has taken it back in the order of the computing stream. And what computes
with it waits for its end (`wait`).

There is no `record_stream`: memory that was filled here is given back after `wait`, so the order
of the computing stream covers the copy, too. It would keep the memory from coming back until the
*host* sees the copy end, and a host that runs ahead would take a third block meanwhile.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@contextmanager
def beside(device: torch.device) -> Iterator[torch.cuda.Stream | None]:
    """Queue what is inside beside a GPU's computing, after what it was given to compute so far.

    Yields the stream, to which also belongs what is allocated inside. On a CPU, where nothing is
    queued, there is none.
    """
    if device.type != "cuda":
        yield None
        return
    copying = _copying_stream(device)
    copying.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(copying):
        yield copying


@dataclass
class Copying:
    """A copy under way, and what it fills."""

    whole: Tensor
    done: torch.cuda.Event | None
    """None: it is."""

    def wait(self) -> None:
        """Let what is queued from now on find the copy done; the host goes on at once."""
        if self.done is not None:
            torch.cuda.current_stream(self.whole.device).wait_event(self.done)
            self.done = None

    def __del__(self) -> None:  # of a pass that failed: the memory goes to whoever computes next
        self.wait()


def copy_beside(whole: Tensor, part: Tensor) -> Copying:
    """Begin to fill ``whole`` with ``part``, of the same shape; from pinned memory on a GPU."""
    with beside(whole.device) as copying:
        whole.copy_(part, non_blocking=True)
        return Copying(whole, None if copying is None else copying.record_event())


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
