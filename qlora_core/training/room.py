"""What fits: rows of a pass, what to recompute, what to keep dequantised. Decided, then corrected.

Before training, `find_room` predicts the peak of the largest micro-batch there will be, and takes
the first way that fits into the memory there is:

    keep everything | fewer rows in a pass | recompute layers | their inputs to a GPU's host, too

A GPU gets no fewer than 2,048 tokens in a pass for the sake of keeping everything: below that it
idles for longer than recomputing takes. What the recipe fixes is not changed. What is left over
keeps weights dequantised. Should a pass run out of memory all the same, `Room.shrink` halves it on
the way. Neither changes the result: a step has the same rows, and its gradients are the same sums,
in another order. Another order gives other last bits, so a training that goes on from a snapshot
makes its passes as it did then (`Passes`), where they still fit.

`qlora plan` and the worker call the same function, so what a plan says is what a worker does, if it
finds the memory that the plan counted on: a plan knows what a machine has, a worker what is free.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pydantic import Field

from qlora_core.artifacts import Frozen, Incident
from qlora_core.config import AdapterConfig, QuantizationConfig, TrainingConfig
from qlora_core.data.prepared import Rows
from qlora_core.errors import ResourceError
from qlora_core.modeling.activations import num_pairs_of
from qlora_core.modeling.attention import KEPT_KEYS
from qlora_core.modeling.dense import BUDGET_BYTES
from qlora_core.modeling.dtypes import DtypeName
from qlora_core.modeling.head import CHUNK_BYTES, GPU_CHUNK_BYTES
from qlora_core.modeling.memory import USABLE, MemoryEstimate, Recompute, Workload, estimate_qlora
from qlora_core.modeling.shape import Shape
from qlora_core.training.batching import Indices, Plan, largest_chunk
from qlora_core.training.collation import common_prefix

RUNTIME_BYTES = 950_000_000
"""Resident memory of a worker on a CPU without a model: Python, torch, transformers, Ray."""

_WORTH_RECOMPUTING = 2048  # tokens
SMALLER = (
    "Try training.checkpointing=on (or offload, on a GPU), a lower dataset.max_length, a lower "
    "adapter.rank, or quantization.keep_dequantized=off."
)
_FIXED: dict[str, Recompute] = {
    "off": "nothing",
    "on": "layers",
    "offload": "layers, inputs offloaded",
}


class Passes(Frozen):
    """In what order a worker adds up: what the memory it finds decides of a result's last bits."""

    num_rows: int = Field(gt=0)
    """Of a pass, at most."""
    recompute: Recompute


@dataclass(frozen=True)
class Demand:
    """All that the peak of a training depends on.

    Args:
        shape: The model's.
        quantization: How its base is stored.
        adapter: What is trained.
        training: Batch sizes, optimizer, and what the recipe says of checkpointing.
        device: What it is trained on.
        compute_dtype: Of products.
        world_size: Workers, wherever they are.
        num_lanes: Threads that share a micro-batch.
        rows: The training rows and their plan; none: all rows are as long as `max_length`.
        max_length: Tokens of the longest row, where rows are not known.
        is_packed: Rows lie end to end.
        shares_prefix: What all rows of a lane begin with is computed once.
        is_sharded: The base lies in parts on all workers.
        offloads_base: Those lie in the memory of the GPUs' hosts.
        num_halvings: How often a pass has turned out to be too large before.
        before: How passes were made when the snapshot was taken that training goes on from.
    """

    shape: Shape
    quantization: QuantizationConfig
    adapter: AdapterConfig
    training: TrainingConfig
    device: Literal["cpu", "cuda"]
    compute_dtype: DtypeName
    world_size: int = 1
    num_lanes: int = 1
    rows: tuple[Rows, Plan] | None = None
    max_length: int = 0
    is_packed: bool = True
    shares_prefix: bool = False
    is_sharded: bool = False
    offloads_base: bool = False
    num_halvings: int = 0
    before: Passes | None = None

    @property
    def most_rows(self) -> int:
        """Rows of a pass, at most."""
        most = max(1, self.training.micro_batch >> self.num_halvings)
        return most if self.before is None else min(most, self.before.num_rows)

    def workload(self, num_rows: int, recompute: Recompute) -> Workload:
        """Return the largest pass of at most ``num_rows`` rows."""
        chunk, kept = self._largest(num_rows), self.quantization.keep_dequantized
        keeps_dense = isinstance(kept, int) and not self.is_sharded
        keeps_pairs = self.device == "cpu" and self.compute_dtype == "float32" and self.is_packed
        pairs = [num_pairs_of(length) for length in chunk.lengths if length <= KEPT_KEYS]
        return Workload(
            num_tokens=chunk.num_tokens,
            num_supervised=chunk.num_supervised,
            num_pairs=sum(pairs) if keeps_pairs else 0,
            recompute=recompute,
            compute_dtype=self.compute_dtype,
            num_lanes=min(self.num_lanes, len(chunk.lengths)),
            chunk_bytes=GPU_CHUNK_BYTES if self.device == "cuda" else CHUNK_BYTES,
            num_shards=self.world_size if self.is_sharded else 0,
            offloads_base=self.offloads_base and self.device == "cuda",
            dense_budget_bytes=int(kept) if keeps_dense else 0,
            runtime_bytes=RUNTIME_BYTES if self.device == "cpu" else 0,
        )

    def estimate(self, work: Workload) -> MemoryEstimate:
        """Return what such a pass needs."""
        return estimate_qlora(self.shape, self.quantization, self.adapter, self.training, work)

    @cached_property
    def _rows_of_largest(self) -> Indices:
        assert self.rows is not None, "asked for only when there are rows"  # noqa: S101
        rows, plan = self.rows
        return largest_chunk(
            plan, rows.lengths, world_size=self.world_size, micro_batch=self.training.micro_batch
        )

    def _largest(self, num_rows: int) -> "_Chunk":
        if self.rows is None:
            num_tokens = num_rows * self.max_length
            return _Chunk((self.max_length,) * num_rows, num_tokens, max(1, num_tokens))
        rows, chunk = self.rows[0], self._rows_of_largest[:num_rows]
        lengths = tuple(int(length) for length in rows.lengths[chunk])
        num_tokens = sum(lengths) if self.is_packed else len(lengths) * max(lengths)
        if self.is_packed and self.shares_prefix:
            num_saved = len(lengths) - min(self.num_lanes, len(lengths))
            num_tokens -= num_saved * common_prefix(rows, chunk)
        return _Chunk(lengths, num_tokens, max(1, int(rows.num_supervised[chunk].sum())))


@dataclass(frozen=True)
class _Chunk:
    lengths: tuple[int, ...]
    num_tokens: int
    num_supervised: int


@dataclass
class Room:
    """How a worker computes a micro-batch; it only ever shrinks."""

    num_rows: int
    """Of a pass, at most."""
    recompute: Recompute
    workload: Workload
    estimate: MemoryEstimate
    fits: bool
    """As far as can be told; if not, nothing smaller is left."""
    is_as_before: bool = False
    """As when the snapshot was taken that training goes on from."""

    @property
    def passes(self) -> Passes:
        """What a snapshot keeps of it."""
        return Passes(num_rows=self.num_rows, recompute=self.recompute)

    @property
    def offloads(self) -> bool:
        """Whether layers' inputs go to the host."""
        return self.recompute == "layers, inputs offloaded"

    def num_passes(self, num_rows: int) -> int:
        """Return into how many passes so many rows are cut."""
        return math.ceil(num_rows / self.num_rows)

    def notes(self, training: TrainingConfig) -> list[str]:
        """Return what is not as the recipe asks, or may go wrong."""
        found = []
        is_chosen = self.num_rows < training.micro_batch or self.recompute != "nothing"
        if self.is_as_before and is_chosen:
            found.append(
                f"Passes have at most {self.num_rows} rows"
                + ("" if self.recompute == "nothing" else " and compute layers again")
                + ", as before the interruption: so sums are added up in the same order."
            )
            return found
        if self.num_rows < training.micro_batch:
            found.append(
                f"A pass of training.micro_batch={training.micro_batch} rows would not fit; passes "
                f"have at most {self.num_rows}. The rows of a step stay the same, and so does the "
                "result."
            )
        if training.checkpointing == "offload" and not self.offloads:
            found.append("training.checkpointing=offload ran as on: a CPU has no host beside it.")
        if self.recompute != "nothing" and training.checkpointing == "auto":
            found.append(
                "training.checkpointing=auto: the backward pass computes layers again "
                + ("and fetches their inputs from the host, " if self.offloads else "")
                + "as the activations would not fit otherwise."
            )
        if not self.fits:
            found.append(
                f"Memory may be too little: about {self.estimate.total / 1e9:.2f} GB are needed "
                f"for the smallest pass there is. {SMALLER}"
            )
        return found

    def shrink(self, num_rows: int, why: str) -> Incident:
        """Halve a pass of ``num_rows`` that ran out of memory; return what to write down.

        Raises:
            ResourceError: It was a single row.
        """
        if num_rows == 1:
            raise ResourceError(
                "The device ran out of memory on a single row.",
                why=why,
                fix=SMALLER,
            )
        self.num_rows = min(self.num_rows, math.ceil(num_rows / 2))
        return Incident(
            kind="halved",
            what=f"A pass of {num_rows} rows ran out of memory.",
            remedy=f"From there on passes have at most {self.num_rows} rows. The rows of a step "
            "stay the same, and so does the result.",
        )


def find_room(demand: Demand, memory_bytes: int) -> Room:
    """Return the first way to compute a micro-batch that fits, else the smallest.

    Args:
        demand: What is to be computed.
        memory_bytes: That one worker may use, what it uses already included.
    """
    usable = int(USABLE * memory_bytes)
    for num_rows, recompute in _ways(demand):
        work = demand.workload(num_rows, recompute)
        need = demand.estimate(work).total
        if need <= usable:
            break
    if demand.quantization.keep_dequantized == "auto" and not demand.is_sharded:
        work = work.model_copy(update={"dense_budget_bytes": _spare(demand, usable - need)})
    fits, estimate = need <= usable, demand.estimate(work)
    is_as_before = fits and demand.before == Passes(num_rows=num_rows, recompute=recompute)
    return Room(num_rows, recompute, work, estimate, fits, is_as_before)


def _ways(demand: Demand) -> Iterator[tuple[int, Recompute]]:
    most, wanted = demand.most_rows, demand.training.checkpointing
    if wanted != "auto":
        has_host = demand.device == "cuda"
        way = "layers" if wanted == "offload" and not has_host else _FIXED[wanted]
        yield from ((num_rows, way) for num_rows in _halves(most))
        return
    if demand.before is not None and demand.before.num_rows == most:
        yield most, demand.before.recompute
    for num_rows in _halves(most):
        is_small = demand.workload(num_rows, "nothing").num_tokens < _WORTH_RECOMPUTING
        if demand.device == "cpu" or num_rows == most or not is_small:
            yield num_rows, "nothing"
    yield from ((num_rows, "layers") for num_rows in _halves(most))
    if demand.device == "cuda":
        yield 1, "layers, inputs offloaded"


def _halves(most: int) -> Iterator[int]:
    while most > 1:
        yield most
        most = math.ceil(most / 2)
    yield 1


def _spare(demand: Demand, spare: int) -> int:
    """Return how much of what is left may keep weights: a CPU's memory has other users."""
    return max(0, min(BUDGET_BYTES, spare // 2) if demand.device == "cpu" else spare)
