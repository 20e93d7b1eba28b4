"""Workers as threads of this process, adding up in rank order."""

import json
import threading
from collections.abc import Callable
from typing import Any

import torch


class Meeting:
    """Where the threads of one run meet."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size, timeout=60)
        self.brought: list[Any] = [None] * world_size


class Arrived:
    def wait(self) -> None:
        pass


class ThreadComm:
    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.world_size, self._meeting = rank, meeting.world_size, meeting
        self.local_size = meeting.world_size

    def all_reduce_sum(self, tensor: torch.Tensor) -> None:
        everything = self._exchange(tensor.detach().clone())
        with torch.no_grad():
            tensor.copy_(sum(everything[1:], everything[0]))

    def broadcast(self, value: Any) -> Any:
        return json.loads(self._exchange(json.dumps(value))[0])

    def gather(self, value: Any) -> list[Any]:
        return [json.loads(text) for text in self._exchange(json.dumps(value))]

    def gather_parts(self, whole: torch.Tensor, part: torch.Tensor) -> "Arrived":
        whole.copy_(torch.cat(self._exchange(part)))
        return Arrived()

    def _exchange(self, value: Any) -> list[Any]:
        self._meeting.brought[self.rank] = value
        self._meeting.barrier.wait()
        everything = list(self._meeting.brought)
        self._meeting.barrier.wait()
        return everything


def run_on_threads(world_size: int, work: Callable[[ThreadComm], None]) -> None:
    """Run ``work`` on every rank; raise what the first failing one raised."""
    meeting, failures = Meeting(world_size), []

    def on_rank(rank: int) -> None:
        try:
            work(ThreadComm(rank, meeting))
        except BaseException as error:
            failures.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=on_rank, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
