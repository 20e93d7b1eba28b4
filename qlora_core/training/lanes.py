"""A micro-batch on several cores: each thread computes some of its rows, alone.

The usual way gives every operation to all cores. A small model's operations are so short (a norm
over a hundred tokens takes microseconds) that cores spend much of a step waiting for each other at
the end of each one; waiting actively is fast on idle cores and ruinous on shared ones. Here cores
meet once a micro-batch instead: each takes rows of about as many tokens through forward and
backward pass, as workers of a cluster do, but with one copy of the weights. torch holds no
interpreter lock while it computes.

The parts' gradients are added in the order of the lanes, whoever finishes first, so the same rows
on the same number of lanes give the same bits. What draws is not for lanes: `modeling.dropout`
knows the rows of one pass at a time, and other draws are from one stream that threads would share
out by chance.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from qlora_core.data.prepared import Rows
from qlora_core.training.batching import Indices

Result = TypeVar("Result")


@dataclass(frozen=True)
class Lanes:
    """Threads that compute parts of a micro-batch at the same time; one lane is this thread."""

    num_lanes: int = 1
    _pool: ThreadPoolExecutor | None = None

    def map(
        self, compute: Callable[[Indices], Result], chunk: Indices, rows: Rows
    ) -> Iterator[Result]:
        """Yield what ``compute`` returns for each part of ``chunk``, in the order of the lanes."""
        if self._pool is None:
            return iter([compute(chunk)])
        parts = share(chunk, rows.lengths, self.num_lanes)
        under_way = [self._pool.submit(compute, part) for part in parts]
        wait(under_way)  # one that fails must not be tried again beside one that still computes
        return (part.result() for part in under_way)


@contextmanager
def open_lanes(num_lanes: int) -> Iterator[Lanes]:
    """Open ``num_lanes`` lanes that share this thread's cores evenly."""
    if num_lanes == 1:
        yield Lanes()
        return
    before = torch.get_num_threads()
    threads = max(1, before // num_lanes)
    try:
        with ThreadPoolExecutor(num_lanes, "lane", torch.set_num_threads, (threads,)) as pool:
            yield Lanes(num_lanes, pool)
    finally:
        torch.set_num_threads(before)  # a lane's number is also what later threads start with


def share(chunk: Indices, lengths: Indices, num_lanes: int) -> list[Indices]:
    """Share out rows by length, the longest to whoever has fewest tokens; nobody gets none."""
    parts: list[list[int]] = [[] for _ in range(min(num_lanes, len(chunk)))]
    loads = [0] * len(parts)
    for row in chunk[np.lexsort((chunk, -lengths[chunk]))]:
        emptiest = loads.index(min(loads))
        parts[emptiest].append(int(row))
        loads[emptiest] += int(lengths[row])
    return [np.array(part) for part in parts]
