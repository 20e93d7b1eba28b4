"""Lets a model compute with fewer and larger functions for a while, whatever its architecture.

Modules are recognised by what they are made of and then *tried*: a replacement must give what the
module gave, on random input, or the module stays as it is. So a norm that adds one to its weight, a
block with another activation or a rotary embedding that interleaves costs speed at worst, and it is
counted (`Fused`).

- Adapted linear layers on one input (`q_proj`, `k_proj`, `v_proj` below one parent): `products`.
- Gated feed-forward blocks (`gate_proj`, `up_proj`, `down_proj` and an activation): `gated`.
- RMS norms (a weight and an epsilon), rotary embeddings (`apply_rotary_pos_emb` beside the model's
  code): `elementwise`, or on a GPU a kernel that was tried before (`kernels`).

Layers with one input are found at run time by the input itself: the first layer called computes for
all, the others find their part. Should a model call them with different inputs, each computes
alone; the numbers are the same.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qlora_core.modeling.elementwise import SILU, rms_norm, rotate
from qlora_core.modeling.gated import Gated, find_activation
from qlora_core.modeling.kernels import NO_KERNELS, GateKernel, Kernels, RotateBoth
from qlora_core.modeling.products import (
    Product,
    compute_dtype,
    dense_weight,
    fits,
    multiply,
    num_weights,
)

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_ROTARY = "apply_rotary_pos_emb"
_NUM_TRIED = 3
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}

_Theirs = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Fused:
    """What was taken over."""

    base_layers: frozenset[nn.Module]
    """Frozen layers whose products are computed with their adapters."""
    spare_bytes: int
    """Left of the budget."""
    num_left: int = 0
    """Adapted layers that PEFT goes on computing."""
    num_gated: int = 0
    num_norms: int = 0
    num_rotary: int = 0
    """Places in the model's code that turn queries and keys."""
    forget: Callable[[], None] = lambda: None
    """Lets go of what a pass that failed halfway has computed for later layers."""

    @property
    def slow_parts(self) -> tuple[str, ...]:
        """What the model's own code goes on computing, none of it being like what is known."""
        parts = {
            "gated blocks": self.num_gated,
            "norms": self.num_norms,
            "rotary embeddings": self.num_rotary,
        }
        return tuple(name for name, number in parts.items() if not number)


AtHand = Callable[[nn.Module], AbstractContextManager[None]]


def always_here(_: nn.Module) -> AbstractContextManager[None]:
    """Fetch nothing: all weights are in memory."""
    return nullcontext()


@contextmanager
def fused(
    model: nn.Module,
    budget_bytes: int,
    kernels: Kernels = NO_KERNELS,
    at_hand: AtHand = always_here,
) -> Iterator[Fused]:
    """Compute ``model`` by fused functions inside the block.

    Args:
        model: Carries one adapter; everything else is frozen.
        budget_bytes: For dequantised weights; what does not fit is dequantised in every pass.
        kernels: What to use where it fits; torch does the rest.
        at_hand: Returns a block within which a module's weights are here, to try it.
    """
    with ExitStack() as undo:
        products: dict[Any, Product] = {}
        shared: list[_Shared] = []
        for layers in _groups(model):
            bases = [layer.get_base_layer() for layer in layers]
            if any(isinstance(base, Linear4bit) for base in bases):
                size_bytes = num_weights(layers) * compute_dtype(bases[0]).itemsize
                keeps = size_bytes <= budget_bytes
                budget_bytes -= size_bytes if keeps else 0
                product = Product(layers, dense_weight(layers) if keeps else None)
            else:
                product = Product(layers, _joined(bases, undo))
            products |= dict.fromkeys(layers, product)
            shared.append(_Shared(product))
            for place, layer in enumerate(layers):
                _replace(undo, layer, shared[-1].forward_of(place))

        def forget() -> None:
            for handed_out in shared:
                handed_out.forget()

        yield Fused(
            base_layers=frozenset(layer.get_base_layer() for layer in products),
            spare_bytes=budget_bytes,
            num_left=sum(isinstance(m, LoraLayer) for m in model.modules()) - len(products),
            num_gated=_fuse_gated(model, products, kernels.silu_gate, undo, at_hand),
            num_norms=_fuse_norms(model, undo),
            num_rotary=_fuse_rotary(model, kernels.rotate_both, undo),
            forget=forget,
        )


def _joined(bases: list[Any], undo: ExitStack) -> Tensor:
    """Let whole weights be parts of one tensor, so that having them together is no copy."""
    if len(bases) == 1:
        weight: Tensor = bases[0].weight.detach()
        return weight
    together_OI = torch.cat([base.weight.detach() for base in bases])
    parts = torch.split(together_OI, [base.out_features for base in bases])
    for base, part_OI in zip(bases, parts, strict=True):
        base.weight.data = part_OI
        undo.callback(_take_out, base)
    return together_OI


def _take_out(base: Any) -> None:
    base.weight.data = base.weight.data.clone()


def _replace(undo: ExitStack, module: nn.Module, forward: Callable[..., Tensor]) -> None:
    module.forward = forward
    undo.callback(delattr, module, "forward")  # the instance's, which hides the class's


def _groups(model: nn.Module) -> list[list[Any]]:
    """Return the layers that can be fused, those that read the same input together."""
    groups: list[list[Any]] = []
    for parent in model.modules():
        fit: dict[str, Any] = {name: m for name, m in parent.named_children() if fits(m)}
        for siblings in _SIBLINGS:
            together = [fit.pop(name) for name in siblings if name in fit]
            dtypes = {compute_dtype(layer.get_base_layer()) for layer in together}
            groups += [together] if len(dtypes) == 1 else [[layer] for layer in together]
        groups += [[layer] for layer in fit.values()]
    return groups


class _Found(threading.local):
    """What the first layer of a group computed for the others; each thread has its own."""

    def __init__(self) -> None:
        self.input: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}


@dataclass
class _Shared:
    """One product, handed out layer by layer."""

    product: Product
    _found: _Found = field(default_factory=_Found)

    def forget(self) -> None:
        self._found = _Found()

    def forward_of(self, place: int) -> Callable[..., Tensor]:
        def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
            found = self._found
            if x is not found.input or place not in found.outputs:
                found.input, found.outputs = x, dict(enumerate(multiply(self.product, x)))
            output = found.outputs.pop(place)
            if not found.outputs:
                found.input = None
            return output

        return forward


def _fuse_gated(
    model: nn.Module,
    products: dict[Any, Product],
    kernel: GateKernel | None,
    undo: ExitStack,
    at_hand: AtHand,
) -> int:
    num_fused = 0
    for parent in model.modules():
        parts = dict(parent.named_children())
        gate, up, down = (parts.get(name) for name in ("gate_proj", "up_proj", "down_proj"))
        activation = find_activation(parts["act_fn"]) if "act_fn" in parts else None
        if gate not in products or up not in products or down not in products or not activation:
            continue
        if products[gate] is products[up] and products[gate].layers[0] is gate:
            block = Gated(products[gate], activation, products[down])
            blocks = [block]
            if kernel is not None and activation is SILU:
                blocks.insert(0, replace(block, kernel=kernel))
            with at_hand(parent):
                same = (_replace_if_same(undo, parent, b, gate.in_features) for b in blocks)
                num_fused += any(same)
    return num_fused


def _fuse_norms(model: nn.Module, undo: ExitStack) -> int:
    num_fused = 0
    for module in model.modules():
        num_fused += any(
            _replace_if_same(undo, module, norm, len(norm.weight_H)) for norm in _norms(module)
        )
    return num_fused


@dataclass(frozen=True)
class _Norm:
    weight_H: Tensor
    eps: float

    @property
    def dtype(self) -> torch.dtype:
        return self.weight_H.dtype

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight_H, self.eps)


def _norms(module: nn.Module) -> Iterator[_Norm]:
    """Yield what ``module`` may be, by what it is made of."""
    weight: Any = getattr(module, "weight", None)
    eps: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    is_norm = isinstance(weight, Tensor) and weight.dim() == 1 and isinstance(eps, float)
    is_ours = is_norm and (weight.dtype == torch.float32 or weight.is_cuda)
    if is_ours and not weight.requires_grad:
        yield _Norm(weight.detach(), eps)
        if weight.dtype == torch.float32:  # in 16 bits the sum would be rounded once more
            yield _Norm(1 + weight.detach(), eps)  # Gemma stores what is missing to one


@torch.no_grad()
def _replace_if_same(
    undo: ExitStack, module: nn.Module, forward: _Norm | Gated, num_in: int
) -> bool:
    """Let ``forward`` compute for ``module`` if it does the same to a (B, T, I) input.

    The input's mean is one: at a mean of zero a LayerNorm does what an RMSNorm does.
    """
    x = 1 + torch.randn(1, _NUM_TRIED, num_in, generator=torch.Generator().manual_seed(0))
    x = x.to(next(module.parameters()).device, forward.dtype)
    try:
        expected = module(x)
        error = (forward(x) - expected).float().norm() / expected.float().norm()
        same = bool(error <= _TOLERANCE[forward.dtype])
    except Exception:  # whatever it objects to, it goes on as it was
        same = False
    if same:
        _replace(undo, module, forward)
    return same


def _fuse_rotary(model: nn.Module, kernel: RotateBoth | None, undo: ExitStack) -> int:
    places = {type(module).__module__ for module in model.modules()}
    sources = [sys.modules[name] for name in sorted(places)]
    fit = [source for source in sources if _rotates_halves(source)]
    for source in fit:
        theirs = getattr(source, _ROTARY)
        undo.callback(setattr, source, _ROTARY, theirs)
        setattr(source, _ROTARY, _whole_heads_by_us(theirs, kernel))
    return len(fit)


def _whole_heads_by_us(theirs: _Theirs, kernel: RotateBoth | None) -> _Theirs:
    """Return what leaves to ``theirs`` the models that turn a part of each head."""

    def rotate_both(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        is_whole = cos.shape[-1] == q.shape[-1] and cos.shape == sin.shape
        is_one_dtype = q.dtype == k.dtype == cos.dtype == sin.dtype  # OLMo's angles are float32
        if others or more or not is_whole or not is_one_dtype:
            return theirs(q, k, cos, sin, *others, **more)
        if kernel is not None and _suits_kernel(q, k, cos):
            return kernel(q, k, cos, sin)
        return _rotate_both(q, k, cos, sin)

    return rotate_both


def _suits_kernel(q: Tensor, k: Tensor, cos: Tensor) -> bool:
    is_usual = q.dim() == k.dim() == 4 and len(cos) in (1, len(q)) and q.shape[2:] == cos.shape[1:]
    return is_usual and q.shape[2:] == k.shape[2:]


def _rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return rotate(q, cos, sin), rotate(k, cos, sin)


@torch.no_grad()
def _rotates_halves(source: ModuleType) -> bool:
    """Say whether the model's own function does what `_rotate_both` does."""
    theirs = getattr(source, _ROTARY, None)
    if theirs is None:
        return False
    generator = torch.Generator().manual_seed(0)
    q, k, angles = (
        torch.randn(shape, generator=generator) for shape in ((1, 4, 3, 8), (1, 2, 3, 8), (1, 3, 4))
    )
    angles = torch.cat([angles, angles], -1)
    given = (q, k, angles.cos(), angles.sin())
    try:
        pairs = zip(theirs(*given), _rotate_both(*given), strict=True)
        return all(torch.allclose(found, ours, rtol=1e-5, atol=1e-6) for found, ours in pairs)
    except Exception:  # other arguments, other results: not ours to replace
        return False
