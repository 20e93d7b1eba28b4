"""Which rows make which optimizer step, and how a step is shared out.

Two decisions, kept apart so that the cluster cannot change the result:

1. `Plan` says *what* a step holds: a pure function of seed, number of rows and global batch. The
   shuffled epochs follow each other as one stream, cut every ``global_batch`` rows. An epoch's
   ragged end is thus *carried over* into the next epoch's first step: every step but the very last
   has the same size, so no row weighs more than another and the learning rate fits every step. The
   last step may be smaller; its loss is divided by its own supervised tokens.
2. `deal` says *who* does it: the only place where lengths, world size and micro-batch matter.

Load and padding: workers wait for each other once a step, so the slowest counts. Row by row, the
longest first, a step goes to whoever has the fewest tokens so far (Graham 1969, "Bounds on
multiprocessing timing anomalies", SIAM J. Appl. Math. 17), but to all equally many rows, as passes
cost something too. What a worker has got is cut into chunks of neighbours in length, so one that is
padded pads little. With fewer rows than workers some get none: they contribute zero gradients.

The resume position is the step number alone, whatever the number of workers was before.
Shuffling sorts raw bits of Philox, whose stream is fixed for ever; `Generator.permutation` may
change between numpy versions. Dims: N rows of the dataset, G rows of a step.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from qlora_core.config import TrainingConfig

Indices = NDArray[np.int64]

_HELDOUT_SEED = 0  # of our own choice: runs with other seeds measure the same held-out rows
_MOST_DEALT = 2000  # steps, to find the largest micro-batch: tenths of a second
_NOTHING: Indices = np.array([], np.int64)


@dataclass(frozen=True)
class Plan:
    """The content of every optimizer step."""

    seed: int
    num_rows: int
    global_batch: int
    num_stream_rows: int
    """Rows of the whole training, repeated epochs included."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return math.ceil(self.num_stream_rows / self.global_batch)

    def rows(self, step: int) -> Indices:
        """Return the (G,) rows of ``step``; steps count from 1.

        Raises:
            IndexError: There is no such step.
        """
        if not 1 <= step <= self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        start = (step - 1) * self.global_batch
        end = min(start + self.global_batch, self.num_stream_rows)
        epochs = range(start // self.num_rows, (end - 1) // self.num_rows + 1)
        stream = np.concatenate([_shuffled(self.seed, epoch, self.num_rows) for epoch in epochs])
        first = start - epochs[0] * self.num_rows
        return stream[first : first + end - start]

    def all_rows(self) -> Indices:
        """Return the (steps, G) rows of all steps, -1 where the last step has fewer."""
        num_epochs = math.ceil(self.num_stream_rows / self.num_rows)
        stream = np.full(self.num_steps * self.global_batch, -1, np.int64)
        epochs = [_shuffled(self.seed, epoch, self.num_rows) for epoch in range(num_epochs)]
        stream[: self.num_stream_rows] = np.concatenate(epochs)[: self.num_stream_rows]
        return stream.reshape(self.num_steps, self.global_batch)

    def epoch(self, step: int) -> float:
        """Return how many passes over the rows are done after ``step``."""
        return min(step * self.global_batch, self.num_stream_rows) / self.num_rows


def make_plan(
    *, seed: int, num_rows: int, global_batch: int, epochs: float, max_steps: int | None = None
) -> Plan:
    """Plan ``epochs`` passes (fractions count) of at most ``max_steps`` steps.

    Raises:
        ValueError: There are no rows.
    """
    if num_rows < 1:
        raise ValueError("there are no training rows, so no step can be planned")
    num_stream_rows = max(1, round(epochs * num_rows))
    if max_steps is not None:
        num_stream_rows = min(num_stream_rows, max_steps * global_batch)
    return Plan(seed, num_rows, global_batch, num_stream_rows)


def plan_training(training: TrainingConfig, seed: int, num_rows: int) -> Plan:
    """Plan what a recipe says of a dataset of ``num_rows`` training rows."""
    return make_plan(
        seed=seed,
        num_rows=num_rows,
        global_batch=training.global_batch,
        epochs=training.epochs,
        max_steps=training.max_steps,
    )


def heldout_rows(num_rows: int, at_most: int) -> Indices:
    """Return the held-out rows to measure on the way: the same for every run on this dataset."""
    return np.sort(_shuffled(_HELDOUT_SEED, 0, num_rows)[:at_most])


def deal(
    rows: Indices, lengths: Indices, *, world_size: int, micro_batch: int
) -> list[list[Indices]]:
    """Share out a step: one list of micro-batches for each worker.

    Args:
        rows: (G,) rows of the step; the result does not depend on their order.
        lengths: (N,) tokens of every row of the dataset.
        world_size: Number of workers.
        micro_batch: Rows of one forward pass, at most.
    """
    longest_first = rows[np.lexsort((rows, -lengths[rows]))]
    return [
        np.array_split(own, math.ceil(len(own) / micro_batch)) if len(own) else []
        for own in _dealt(longest_first, lengths, world_size)
    ]


def _dealt(longest_first: Indices, lengths: Indices, world_size: int) -> list[Indices]:
    """Return each worker's rows, the longest first: about equally many tokens, rows within 1."""
    if world_size == 1:
        return [longest_first]
    num_all, num_more = divmod(len(longest_first), world_size)
    owned: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for row in longest_first.tolist():
        open_to = [w for w in range(world_size) if len(owned[w]) < num_all + (num_more > 0)]
        worker = min(open_to, key=lambda w: (loads[w], w))
        num_more -= len(owned[worker]) == num_all
        owned[worker].append(row)
        loads[worker] += int(lengths[row])
    return [np.array(own, np.int64) for own in owned]


def largest_chunk(plan: Plan, lengths: Indices, *, world_size: int, micro_batch: int) -> Indices:
    """Return the rows of the micro-batch that holds most tokens, of all that `deal` will make.

    It is a worker's first chunk of a step. Steps are dealt, beginning with those of the longest
    rows, until no other can hold more; for one worker that is the first. Should it take thousands
    of steps, the largest of those is taken.

    Args:
        plan: Says which rows a step has.
        lengths: (N,) tokens of every row of the dataset.
        world_size: Number of workers.
        micro_batch: Rows of one forward pass, at most.
    """
    fewest, most_own = plan.global_batch // world_size, -(-plan.global_batch // world_size)
    num_first = max(
        math.ceil(num_own / math.ceil(num_own / micro_batch))
        for num_own in (fewest, most_own)
        if num_own
    )
    rows = plan.all_rows()
    sizes = np.where(rows < 0, 0, lengths[rows])
    most = np.partition(sizes, -num_first, axis=1)[:, -num_first:].sum(1)  # that a chunk can hold
    largest, num_tokens = _NOTHING, -1
    # the last step may be smaller, and is cut otherwise
    for step in [plan.num_steps, *(np.argsort(-most, kind="stable") + 1)[:_MOST_DEALT].tolist()]:
        if num_tokens >= most[step - 1] and step != plan.num_steps:
            break
        shared = deal(plan.rows(step), lengths, world_size=world_size, micro_batch=micro_batch)
        for chunk in (chunk for share in shared for chunk in share):
            if int(lengths[chunk].sum()) > num_tokens:
                largest, num_tokens = chunk, int(lengths[chunk].sum())
    return largest


@lru_cache(maxsize=2)  # a step touches the end of one epoch and the start of the next
def _shuffled(seed: int, epoch: int, num_rows: int) -> Indices:
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(num_rows)
    order: Indices = np.argsort(bits, kind="stable")
    order.setflags(write=False)
    return order
