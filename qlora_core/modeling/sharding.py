"""A frozen base that lies in parts on all workers, whole nowhere.

Data parallelism gives every worker the whole base. Here each holds an equal part of every block's
packed 4-bit weights and their scales. A block is put together (an all-gather of its bytes) shortly
before it computes, forward and backward, and let go of afterwards; the next one comes while it
computes. So a worker holds ``1 / W`` of the base and two blocks. What travels is 4-bit: about half
a byte a weight, once forward and once backward; recomputing a layer in the backward pass asks for
nothing more, as its block is there then.

Why not PyTorch's FSDP2? What is left of it for frozen weights is the all-gather: the adapter is
small, whole on every worker, and its gradients are summed as always. And bitsandbytes' parameter,
which carries its scales, does not survive being sharded by it (docs/adr/0007).

How a block comes and goes without anybody noticing: all its packed weights are views of one buffer.
Letting go shrinks the buffer's *storage* to nothing, and coming back grows and fills it. What
autograd has saved are views of the same storage, so it is whole again when the backward pass
reaches the block. (After Zhao et al. 2023, arXiv:2304.11277, section 4.3, who free storages alike.)

Every worker takes part in every gather, so all walk the same **route**: each block forth and, if
the pass goes back, each block back. A worker that has nothing to compute, or has run out of memory
halfway, walks the rest of the route without computing (`end_pass`): no stand-in rows, and nobody
waits for ever.

Dims: S bytes of a worker's part of a block, W workers.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from qlora_core.errors import ModelError
from qlora_core.modeling.beside import copy_beside

ALIGNMENT = 16
"""Bytes; each tensor of a block begins at a multiple, as float32 scales lie among packed bytes."""


class Waitable(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Return when it is done; on a GPU, when what is queued from now on will find it done."""


class Gatherer(Protocol):
    """What sharding asks of the line between workers."""

    @property
    def rank(self) -> int:
        """Number of this worker, from 0."""

    @property
    def world_size(self) -> int:
        """Number of workers."""

    def gather_parts(self, whole: Tensor, part: Tensor) -> Waitable:
        """Begin to fill ``whole`` (W x S bytes) with every worker's ``part`` (S bytes), by rank.

        Args:
            whole: On the device that computes.
            part: There, or in the host's memory.
        """


class KeepsAll:
    """One worker who keeps all parts: nothing has to be gathered."""

    rank = 0
    world_size = 1

    def gather_parts(self, whole: Tensor, part: Tensor) -> Waitable:
        """Copy ``part``, which is all there is."""
        return copy_beside(whole, part)


@dataclass
class _Block:
    """One block's packed weights: a part of them for good, all of them for a while."""

    module: nn.Module
    part_S: Tensor
    """Ours, uint8; in the host's memory if the base is offloaded."""
    whole: Tensor
    """(W x S,) uint8, of which the layers' weights are views; its storage comes and goes."""
    _coming: Waitable | None = field(default=None, init=False)

    def begin(self, comm: Gatherer) -> None:
        """Let the block come, without waiting for it."""
        self.whole.untyped_storage().resize_(self.whole.nbytes)
        # through .data, whose writes autograd does not take for a change of what it has saved
        self._coming = comm.gather_parts(self.whole.data, self.part_S)

    def arrive(self) -> None:
        """Wait until it is here."""
        if self._coming is not None:
            self._coming.wait()
            self._coming = None

    def go(self) -> None:
        """Let go of it; one that is still coming is waited for first, as it is being written."""
        self.arrive()
        self.whole.untyped_storage().resize_(0)


class ShardedBase:
    """Lets a model's blocks come and go.

    Args:
        comm: The line to the other workers.
        is_offloaded: This worker's parts lie in the host's memory, and go to the GPU when needed.
    """

    def __init__(self, comm: Gatherer, *, is_offloaded: bool = False) -> None:
        self._comm, self.is_offloaded = comm, is_offloaded
        self._blocks: list[_Block] = []
        self._route: list[int] = []
        self._at = -1  # place on the route of the block that is here
        self._num_begun = 0
        self._is_stray = True
        self.num_gathered_bytes = 0
        """That all workers' parts had together, in all gathers so far."""

    @property
    def part_bytes(self) -> int:
        """Bytes of the base that this worker keeps."""
        return sum(block.part_S.nbytes for block in self._blocks)

    @property
    def present_bytes(self) -> int:
        """Bytes of the blocks that are here, or on their way, at this moment."""
        return sum(block.whole.untyped_storage().nbytes() for block in self._blocks)

    def take(self, module: nn.Module) -> None:
        """Keep our part of the next block, which is whole on this worker until now.

        Args:
            module: Holds 4-bit layers; blocks are taken in the order in which they compute.
        """
        self._blocks.append(_divided(module, self._comm, self.is_offloaded))
        place = len(self._blocks) - 1

        def before(*_: Any) -> None:
            if place == 0 and self._is_stray and not self._is_here(0):
                self._open(goes_back=False)
            self._come(place, len(self._blocks))

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._call_back(place, output)
            if self._is_stray and place == len(self._blocks) - 1:
                self.end_pass()

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def begin_pass(self, *, goes_back: bool) -> None:
        """Begin a pass that all workers make; without one, a forward pass begins and ends itself.

        Args:
            goes_back: There may be a backward pass; all workers say the same.
        """
        self._open(goes_back=goes_back)
        self._is_stray = False

    def end_pass(self) -> None:
        """Walk the rest of the route, whatever was computed, and let go of all blocks."""
        while self._at < len(self._route) - 1:
            self._walk_on()
        if self._at >= 0:
            self._blocks[self._route[self._at]].go()
        self._forget_route()

    @contextmanager
    def at_hand(self, module: nn.Module) -> Iterator[None]:
        """Have the block that ``module`` is a part of here, outside of a pass; all workers ask."""
        holding = [block for block in self._blocks if _is_in(module, block.module)]
        for block in holding:
            self._begin(block)
            block.arrive()
        try:
            yield
        finally:
            for block in holding:
                block.go()

    def _open(self, *, goes_back: bool) -> None:
        for block in self._blocks:  # a pass before may have failed on all workers alike
            block.go()
        forth = range(len(self._blocks))
        self._forget_route()
        self._route = [*forth, *(reversed(forth[:-1]) if goes_back else ())]

    def _forget_route(self) -> None:
        self._route, self._at, self._num_begun, self._is_stray = [], -1, 0, True

    def _is_here(self, place: int) -> bool:
        return self._at >= 0 and self._route[self._at] == place

    def _come(self, place: int, end: int) -> None:
        """Have a block here: it is, when the pass turns round or a layer is recomputed.

        Args:
            place: Of the block.
            end: Of the part of the route that is walked now: forth, or to its end.
        """
        if self._is_here(place):
            return
        following = self._route[self._at + 1 : end][:1]
        if following != [place]:
            raise ModelError(
                f"Block {place} of the model computes when "
                + (f"block {following[0]} was to." if following else "no block was to."),
                why="A sharded base is put together block by block, each once forward and once "
                "backward, in the order in which the model lists them.",
                fix="Set cluster.strategy=ddp.",
            )
        self._walk_on()

    def _walk_on(self) -> None:
        """Go on to the next block: have it here, let go of the last, let the one after it come."""
        left, following = self._at, self._at + 1
        self._begin_up_to(following)
        self._blocks[self._route[following]].arrive()
        self._at = following  # only now: what fails above is tried again by `end_pass`
        if left >= 0:
            self._blocks[self._route[left]].go()
        self._begin_up_to(following + 1)

    def _begin_up_to(self, last: int) -> None:
        for place in self._route[self._num_begun : last + 1]:
            self._begin(self._blocks[place])
            self._num_begun += 1

    def _begin(self, block: _Block) -> None:
        block.begin(self._comm)
        self.num_gathered_bytes += block.whole.nbytes

    def _call_back(self, place: int, output: Any) -> None:
        """Have the block here as soon as its output's gradient is known, before it is used."""
        outputs = output if isinstance(output, tuple) else (output,)
        for tensor in outputs:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: self._come(place, len(self._route)))  # type: ignore[no-untyped-call]
                return


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the model's repeated blocks: of its longest list, those that hold 4-bit layers.

    Raises:
        ModelError: There are none.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    longest = max(lists, key=_num_packed, default=nn.ModuleList())
    found = [block for block in longest if _packed(block)]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no list of blocks with 4-bit layers, so its base cannot "
            "be divided among workers.",
            fix="Set cluster.strategy=ddp; or quantization.method=nf4, if it is another.",
        )
    return found


def _num_packed(module: nn.Module) -> int:
    return len(_packed(module))


def _packed(module: nn.Module) -> list[Any]:
    return [layer for layer in module.modules() if isinstance(layer, Linear4bit)]


def _is_in(module: nn.Module, block: nn.Module) -> bool:
    return any(part is module for part in block.modules())


def _divided(module: nn.Module, comm: Gatherer, is_offloaded: bool) -> _Block:
    """Put a block's packed weights and scales into one buffer; keep our part of it."""
    layers = _packed(module)
    tensors = [t for layer in layers for t in (layer.weight.data, layer.weight.quant_state.absmax)]
    sizes = [aligned(tensor.nbytes) for tensor in tensors]
    part_bytes = aligned(math.ceil(sum(sizes) / comm.world_size))
    device = tensors[0].device
    whole = torch.zeros(part_bytes * comm.world_size, dtype=torch.uint8, device=device)
    views = []
    for tensor, place in zip(tensors, torch.split(whole[: sum(sizes)], sizes), strict=True):
        view = place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        views.append(view.copy_(tensor))
    for layer, weight, absmax in zip(layers, views[0::2], views[1::2], strict=True):
        layer.weight.data, layer.weight.quant_state.absmax = weight, absmax
    own = whole[comm.rank * part_bytes : (comm.rank + 1) * part_bytes]
    part_S = own.clone()
    if is_offloaded and own.is_cuda:
        part_S = torch.empty(own.shape, dtype=own.dtype, pin_memory=True).copy_(own)
    block = _Block(module, part_S, whole)
    block.go()
    return block


def aligned(size: int) -> int:
    """Return ``size`` bytes rounded up to where the next tensor may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT
