"""How workers talk: sums of tensors, a word from rank 0, and parts of a sharded base.

The loop adds up gradients itself, so the model is never wrapped (no `.module`, no buckets, no
search for unused parameters), and one worker or eight run the same code.
"""

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from qlora_core.errors import CollectiveError
from qlora_core.modeling.beside import beside
from qlora_core.modeling.sharding import KeepsAll, Waitable

# torch 2.13 gave it this name and warns of the other
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Comm(Protocol):
    """One worker's line to the others. All workers make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """Number of this worker, from 0."""

    @property
    def world_size(self) -> int:
        """Number of workers."""

    @property
    def local_size(self) -> int:
        """Number of workers on this machine."""

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Replace ``tensor`` on every worker by the sum over all workers."""

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's ``value`` on every worker; it must be plain data (JSON)."""

    def gather(self, value: Any) -> list[Any]:
        """Return every worker's ``value`` (plain data) by rank, on every worker."""

    def gather_parts(self, whole: Tensor, part: Tensor) -> Waitable:
        """Begin to fill ``whole`` (W x S bytes) with every worker's ``part`` (S bytes), by rank.

        Neither may be touched before what is returned has been waited for. A part in the host's
        memory goes to the device first.
        """


class Alone(KeepsAll):
    """A single worker: nobody to talk to."""

    local_size = 1

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Leave ``tensor`` as it is."""

    def broadcast(self, value: Any) -> Any:
        """Return ``value``."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """Return ``value`` alone."""
        return [value]


class TorchComm:
    """The default process group of torch.distributed (gloo or nccl), already initialised.

    Args:
        device: Where the group's collectives work: this worker's GPU with nccl, else the CPU.
        local_size: Number of workers on this machine.

    A collective that fails means that another worker is gone, so it raises `CollectiveError`, which
    the launcher answers with a new group of workers.
    """

    def __init__(self, device: torch.device, local_size: int) -> None:
        with _losses_told(int(os.environ.get("RANK", "0"))):
            self.rank = dist.get_rank()
            self.world_size = dist.get_world_size()
        self.local_size = local_size
        self._device = device

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Replace ``tensor`` on every worker by the sum over all workers."""
        with _losses_told(self.rank):
            dist.all_reduce(tensor)

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's ``value`` on every worker."""
        return self.gather(value if self.rank == 0 else None)[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every worker's ``value`` by rank: JSON, added up with zeros where others' is."""
        text = json.dumps(value).encode()
        sizes = self._placed(self.rank, [len(text)], self.world_size)
        ends = list(itertools.accumulate(sizes))
        starts = [0, *ends[:-1]]
        letters = bytes(self._placed(starts[self.rank], list(text), ends[-1]))
        return [json.loads(letters[a:b]) for a, b in zip(starts, ends, strict=True)]

    def gather_parts(self, whole: Tensor, part: Tensor) -> Waitable:
        """Begin to fill ``whole`` with every worker's ``part``, by rank.

        nccl has a stream of its own, which begins after the one it is called on: the copying one,
        as a part that lies with the host has to come first.
        """
        with beside(whole.device):
            sent = part.to(whole.device, non_blocking=True)  # may find no memory, which is no loss
            with _losses_told(self.rank):
                work = _gather_into(whole, sent, async_op=True)
        assert work is not None  # noqa: S101  # as it is asynchronous
        return _Underway(work, self.rank, sent)

    def _placed(self, start: int, numbers: list[int], size: int) -> list[int]:
        """Return (size,) numbers, each from the one worker that puts it there."""
        everybodys = torch.zeros(size, dtype=torch.int32, device=self._device)
        own = torch.tensor(numbers, dtype=torch.int32, device=self._device)
        everybodys[start : start + len(numbers)] = own
        self.all_reduce_sum(everybodys)
        placed: list[int] = everybodys.tolist()
        return placed


@dataclass(frozen=True)
class _Underway:
    """A collective of torch's; with nccl, waiting holds up the GPU's queue and not the host."""

    work: dist.Work
    rank: int
    sent: Tensor
    """Has to stay until then; whoever takes its memory on the copying stream waits for this one."""

    def wait(self) -> None:
        """Return when it is done."""
        with _losses_told(self.rank):
            self.work.wait()


@contextmanager
def _losses_told(rank: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Ray ends the group under a thread that computes, too; what follows is any error of torch's
        is_whole = dist.is_initialized()
        if not isinstance(error, RuntimeError) and is_whole:
            raise
        told = str(error) if is_whole else "Ray has ended their group while this one computed"
        raise CollectiveError(
            f"worker {rank} lost the others: {told}",
            why="A worker or its node died, did not answer in time, or Ray starts all anew.",
        ) from error
