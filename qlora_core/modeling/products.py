"""The products of a step, with the adapter inside: fewer, larger, and nothing kept twice.

PEFT computes a layer as three products and four passes over memory: base, clone, A, B, scale, add,
each leaving a tensor for the backward pass. Here a layer, adapter and all, is one function with a
backward pass written by hand:

    forward     y = x W'  +  s (x A') B'                     B A added in place
    backward    u = x A'                                     kept, R wide
                dx = g W  +  (s g B) A                       added in place
                dA = (s g B)' x        dB = s g' u

Layers that read the same input (query, key and value; gate and up) are one such function with their
weights stacked: one product where there were three. They are found by name below one parent, and at
run time by the input itself: the first layer called computes for all, the others find their part.
Should a model call them with different inputs, each computes alone; the numbers are the same.

Frozen weights are dequantised once and kept while a budget of bytes lasts, then in every pass.

Dims: N tokens, I in features, O out features (of all stacked layers together), R adapter rank.
Source: Hu et al. 2021, arXiv:2106.09685, eq. 3; the gradients follow by the chain rule.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

_ADAPTER = "default"  # PEFT's name of a model's first adapter
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Fused:
    """What `fused_products` took over."""

    base_layers: frozenset[nn.Module]
    spare_bytes: int
    """Left of the budget."""


@contextmanager
def fused_products(model: nn.Module, budget_bytes: int) -> Iterator[Fused]:
    """Compute the adapted layers of ``model`` by this module inside the block.

    Left to PEFT: dropout, DoRA, LLM.int8() and layers that do not compute in float32.

    Args:
        model: Carries one adapter.
        budget_bytes: For dequantised weights; what does not fit is dequantised in every pass.
    """
    with ExitStack() as undo:
        base_layers: list[nn.Module] = []
        for layers in _groups(model):
            size_bytes = sum(_num_weights(layer) * 4 for layer in layers)
            keeps = size_bytes <= budget_bytes
            budget_bytes -= size_bytes if keeps else 0
            product = _Product(layers, _kept(layers) if keeps else None)
            for place, layer in enumerate(layers):
                layer.forward = product.forward_of(place)
                undo.callback(delattr, layer, "forward")  # the instance's, which hides the class's
            base_layers += [layer.get_base_layer() for layer in layers]
        yield Fused(frozenset(base_layers), budget_bytes)


def _groups(model: nn.Module) -> list[list[Any]]:
    """Return the layers that can be fused, those that read the same input together."""
    groups = []
    for parent in model.modules():
        fit = {name: m for name, m in parent.named_children() if _fits(m)}
        for siblings in _SIBLINGS:
            together = [fit.pop(name) for name in siblings if name in fit]
            if together:
                groups.append(together)
        groups += [[layer] for layer in fit.values()]
    return groups


def _fits(module: nn.Module) -> bool:
    if not isinstance(module, LoraLayer) or list(module.lora_A) != [_ADAPTER]:
        return False
    is_plain = _ADAPTER not in module.lora_variant and not module.merged
    dropout = module.lora_dropout[_ADAPTER]
    return is_plain and isinstance(dropout, nn.Identity) and _is_float32(module.get_base_layer())


def _is_float32(base: nn.Module) -> bool:
    if isinstance(base, Linear4bit):
        dtype = base.compute_dtype or base.weight.quant_state.dtype
    else:
        dtype = base.weight.dtype if type(base) is nn.Linear else None
    return bool(dtype == torch.float32)


def _num_weights(layer: Any) -> int:
    return int(layer.in_features * layer.out_features)


def _weight(layer: Any) -> Tensor:
    """Return the (O, I) frozen weight of one layer."""
    base = layer.get_base_layer()
    weight_OI: Tensor = base.weight.detach()
    if isinstance(base, Linear4bit):
        weight_OI = dequantize_4bit(base.weight.data, base.weight.quant_state).float()
    return weight_OI


def _kept(layers: Sequence[Any]) -> Tensor:
    return _stacked([_weight(layer) for layer in layers])


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


class _Found(threading.local):
    """What the first layer of a group computed for the others; each thread has its own."""

    def __init__(self) -> None:
        self.input: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}


@dataclass
class _Product:
    """The layers of one group and their stacked weight."""

    layers: Sequence[Any]
    kept_OI: Tensor | None
    _found: _Found = field(default_factory=_Found)

    def weight(self) -> Tensor:
        return _kept(self.layers) if self.kept_OI is None else self.kept_OI

    def forward_of(self, place: int) -> Callable[..., Tensor]:
        def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
            found = self._found
            if x is not found.input or place not in found.outputs:
                found.input, found.outputs = x, dict(enumerate(self._compute(x)))
            output = found.outputs.pop(place)
            if not found.outputs:
                found.input = None
            return output

        return forward

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        pairs = [(layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]) for layer in self.layers]
        adapters = [half.weight for pair in pairs for half in pair]
        scales = [layer.scaling[_ADAPTER] for layer in self.layers]
        outputs: tuple[Tensor, ...] = _Fused.apply(  # type: ignore[no-untyped-call]
            x, self, self._bias(), scales, *adapters
        )
        return outputs

    def _bias(self) -> Tensor | None:
        biases = [layer.get_base_layer().bias for layer in self.layers]
        if all(bias is None for bias in biases):
            return None
        like = self.layers[0].lora_A[_ADAPTER].weight
        parts = [
            like.new_zeros(layer.out_features) if bias is None else bias.detach().float()
            for layer, bias in zip(self.layers, biases, strict=True)
        ]
        return _stacked(parts)


class _Fused(torch.autograd.Function):
    """Frozen product and adapters of one group; the header has the formulas."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        product: _Product,
        bias_O: Tensor | None,
        scales: list[float],
        *adapters: Tensor,
    ) -> tuple[Tensor, ...]:
        """``adapters`` are A (R, I) and B (O, R) of each layer in turn."""
        a_all, b_all = adapters[0::2], adapters[1::2]
        x_NI = x.reshape(-1, x.shape[-1])
        weight_OI = product.weight()
        y_NO = x_NI @ weight_OI.T if bias_O is None else torch.addmm(bias_O, x_NI, weight_OI.T)
        u_NR = x_NI @ _stacked(a_all).T
        outputs = torch.split(y_NO, [b.shape[0] for b in b_all], 1)
        parts = torch.split(u_NR, [a.shape[0] for a in a_all], 1)
        for y, u, b, scale in zip(outputs, parts, b_all, scales, strict=True):
            y.addmm_(u, b.T, alpha=scale)
        ctx.save_for_backward(x_NI, u_NR, *adapters)
        ctx.product, ctx.scales, ctx.shape = product, scales, x.shape
        return tuple(y.view(*x.shape[:-1], -1) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of every A and B."""
        x_NI, u_NR, *adapters = ctx.saved_tensors
        a_all, b_all = adapters[0::2], adapters[1::2]
        g_all = [g.reshape(-1, g.shape[-1]) for g in gradients]
        parts = torch.split(u_NR, [a.shape[0] for a in a_all], 1)
        gu_NR = u_NR.new_empty(u_NR.shape)
        gb_all = []
        pieces = torch.split(gu_NR, [a.shape[0] for a in a_all], 1)
        for g, u, b, gu, scale in zip(g_all, parts, b_all, pieces, ctx.scales, strict=True):
            torch.mm(g, b, out=gu).mul_(scale)
            gb_all.append((g.T @ u).mul_(scale))
        ga_all = torch.split(gu_NR.T @ x_NI, [a.shape[0] for a in a_all])
        gx = None
        if ctx.needs_input_grad[0]:
            g_NO = g_all[0] if len(g_all) == 1 else torch.cat(g_all, 1)
            gx = (g_NO @ ctx.product.weight()).addmm_(gu_NR, _stacked(a_all)).view(ctx.shape)
        interleaved = [g for pair in zip(ga_all, gb_all, strict=True) for g in pair]
        return gx, None, None, None, *interleaved
