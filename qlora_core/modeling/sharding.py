"""A frozen base that lies in parts on all workers, whole nowhere.

Data parallelism gives every worker the whole base. Here each holds an equal part of every block's
packed 4-bit weights, and a block is put together (an all-gather of its bytes) shortly before it
computes, forward and backward, and let go of afterwards; the next one comes while it computes. So a
worker holds ``1 / world_size`` of the base and two blocks. What travels is 4-bit: half a byte for each
weight, twice per pass (three times where layers are recomputed).

Why not PyTorch's FSDP2? It shards parameters as floating-point tensors and reduces their gradients.
The base has none: it is frozen, and packed. All that is left of FSDP is the all-gather; the adapter is
small, whole on every worker, and its gradients are summed as always.

How a block comes and goes without anybody noticing: all its packed weights are views of one buffer.
Letting go shrinks the buffer's *storage* to nothing, and coming back grows and fills it. Tensors that
autograd has saved are views of the same storage, so they are whole again when the backward pass
reaches the block. (After Zhao et al. 2023, arXiv:2304.11277, section 4.3, who free storages alike.)

All workers must run the same passes in the same order, since every one of them takes part in each
gather: the loop sees to it.

Dims: S bytes of a worker's part of a block, W workers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from qlora_core.errors import ModelError


class Waitable(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Return when it is done."""


class Gatherer(Protocol):
    """What sharding asks of the line between workers."""

    rank: int
    world_size: int

    def gather_parts(self, whole: Tensor, part: Tensor) -> Waitable:
        """Begin to fill ``whole`` (W x S bytes) with every worker's ``part`` (S bytes), by rank."""


@dataclass
class _Block:
    """One block's packed weights: a part of them for good, all of them for a while."""

    part: Tensor
    """(S,) uint8, ours."""
    whole: Tensor
    """(W x S,) uint8, of which the layers' weights are views; its storage comes and goes."""
    _coming: Waitable | None = field(default=None, init=False)
    _is_here: bool = field(default=True, init=False)

    def begin(self, comm: Gatherer) -> None:
        """Let the block come, without waiting for it."""
        if self._is_here or self._coming is not None:
            return
        self.whole.untyped_storage().resize_(self.whole.nbytes)
        # through .data, whose writes autograd does not take for a change of what it has saved
        self._coming = comm.gather_parts(self.whole.data, self.part)

    def come(self, comm: Gatherer) -> None:
        """Have the block here."""
        self.begin(comm)
        if self._coming is not None:
            self._coming.wait()
            self._coming, self._is_here = None, True

    def go(self) -> None:
        """Let go of it."""
        if self._coming is not None:  # it was expected in vain: the others send all the same
            self._coming.wait()
            self._coming = None
        self.whole.untyped_storage().resize_(0)
        self._is_here = False


class ShardedBase:
    """Lets a model's blocks come and go.

    Args:
        model: Its repeated blocks hold 4-bit layers, whole on this worker.
        comm: The line to the other workers.

    Raises:
        ModelError: The model has no list of blocks with 4-bit layers in it.
    """

    def __init__(self, model: nn.Module, comm: Gatherer) -> None:
        self._comm = comm
        modules = blocks_of(model)
        self._blocks = [_sharded(module, comm) for module in modules]
        for place, module in enumerate(modules):
            self._watch(place, module)
        self.release()

    @property
    def part_bytes(self) -> int:
        """Bytes of the base that this worker keeps."""
        return sum(block.part.nbytes for block in self._blocks)

    def release(self) -> None:
        """Let go of all blocks: at the end of a pass, whether it came to its end or not."""
        for block in self._blocks:
            block.go()

    def _watch(self, place: int, module: nn.Module) -> None:
        last = len(self._blocks) - 1

        def before_forward(*_: Any) -> None:
            self._blocks[place].come(self._comm)
            if not self._is_going_back and place < last:
                self._blocks[place + 1].begin(self._comm)

        def after_forward(*_: Any) -> None:
            if not self._is_going_back:
                self._blocks[place].go()

        def before_backward(*_: Any) -> None:
            self._is_going_back = True
            self._blocks[place].come(self._comm)
            if place < last:
                self._blocks[place + 1].go()
            if place > 0:
                self._blocks[place - 1].begin(self._comm)

        module.register_forward_pre_hook(before_forward)
        module.register_forward_hook(after_forward, always_call=True)
        module.register_full_backward_pre_hook(before_backward)

    _is_going_back = False

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Compute one forward pass, and perhaps its backward pass, inside the block."""
        self._is_going_back = False
        try:
            yield
        finally:
            self._is_going_back = False
            self.release()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the model's repeated blocks: of its longest list, those that hold 4-bit layers.

    Raises:
        ModelError: There are none.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    longest: Sequence[nn.Module] = max(lists, key=_num_packed, default=[])
    found = [block for block in longest if _packed(block)]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no list of blocks with 4-bit layers, so its base cannot be "
            "divided among workers.",
            fix="Set cluster.strategy=ddp, or quantization.method=nf4.",
        )
    return found


def _num_packed(module: nn.Module) -> int:
    return len(_packed(module))


def _packed(module: nn.Module) -> list[Any]:
    layers = [layer for layer in module.modules() if isinstance(layer, Linear4bit)]
    return [layer for layer in layers if getattr(layer.weight, "quant_state", None) is not None]


def _sharded(module: nn.Module, comm: Gatherer) -> _Block:
    """Put a block's packed weights into one buffer; keep our part of it."""
    weights = [layer.weight for layer in _packed(module)]
    sizes = [weight.data.nbytes for weight in weights]
    part_bytes = -(-sum(sizes) // comm.world_size)
    whole = torch.zeros(
        part_bytes * comm.world_size, dtype=torch.uint8, device=weights[0].device
    )
    start = 0
    for weight, size in zip(weights, sizes, strict=True):
        place = whole[start : start + size]
        place.copy_(weight.data.reshape(-1).view(torch.uint8))
        weight.data = place.view(weight.data.dtype).view(weight.data.shape)
        start += size
    own = slice(comm.rank * part_bytes, (comm.rank + 1) * part_bytes)
    return _Block(part=whole[own].clone(), whole=whole)
