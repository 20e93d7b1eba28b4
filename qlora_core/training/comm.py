"""How workers talk: sums of tensors, and a word from rank 0. Nothing else is needed.

The loop adds up gradients itself, so the model is never wrapped (no `.module`, no buckets, no
search for unused parameters), and one worker or eight run the same code.
"""

import json
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from qlora_core.errors import LaunchError


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


class Alone:
    """A single worker: nobody to talk to."""

    rank = 0
    world_size = 1
    local_size = 1

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Leave ``tensor`` as it is."""

    def broadcast(self, value: Any) -> Any:
        """Return ``value``."""
        return value


class TorchComm:
    """The default process group of torch.distributed (gloo or nccl), already initialised.

    Args:
        device: Where the group's collectives work: this worker's GPU with nccl, else the CPU.
        local_size: Number of workers on this machine.

    A collective that fails means that another worker is gone, so it raises `LaunchError`, which
    the launcher answers with a new group of workers.
    """

    def __init__(self, device: torch.device, local_size: int) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.local_size = local_size
        self._device = device

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Replace ``tensor`` on every worker by the sum over all workers."""
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            raise LaunchError(
                f"worker {self.rank} lost the others: {error}",
                why="A worker or its node died, or did not answer in time.",
            ) from error

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's ``value`` on every worker: its JSON, as a sum with zeros."""
        text = json.dumps(value).encode() if self.rank == 0 else b""
        size = torch.tensor([len(text)], device=self._device)
        self.all_reduce_sum(size)
        letters = torch.zeros(int(size), dtype=torch.int32, device=self._device)
        if self.rank == 0:
            letters += torch.tensor(list(text), dtype=torch.int32, device=self._device)
        self.all_reduce_sum(letters)
        return json.loads(bytes(letters.tolist()))
