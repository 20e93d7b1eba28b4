"""The products of a step, with the adapter inside: fewer, larger, and nothing kept twice.

PEFT computes a layer as three products and four passes over memory: base, clone, A, B, scale, add,
each leaving a tensor for the backward pass. Here a layer, adapter and all, is one function with a
backward pass written by hand:

    forward     y = x W'  +  s (x A') B'                     B A added in place
    backward    u = x A'                                     kept, R wide
                dx = g W  +  (s g B) A                       added in place
                dA = (s g B)' x        dB = s g' u

Layers that read the same input (query, key and value; gate and up) are one such function with their
weights stacked: one product where there were three.

Frozen weights are dequantised once and kept while a budget of bytes lasts, then in every pass.

In 16 bits the products take copies of A and B, rounded once for both passes, and the gradients go
back to the float32 masters: PEFT multiplies in float32 there, several times slower on a GPU, to add
to 16 bits.

Dims: N tokens, I in features, O out features (of all stacked layers together), R adapter rank (of
all of them together).
Source: Hu et al. 2021, arXiv:2106.09685, eq. 3; the gradients follow by the chain rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

ADAPTER = "default"  # PEFT's name of a model's first adapter
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Product:
    """PEFT's layers that read one input, multiplied together.

    Args:
        layers: Each carries one plain adapter on a frozen linear layer; see `fits`.
        kept_OI: Their dequantised weights; none: they are dequantised in every pass.
    """

    layers: Sequence[Any]
    kept_OI: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """What is multiplied."""
        return compute_dtype(self.layers[0].get_base_layer())

    @property
    def sizes(self) -> list[int]:
        """Out features of each layer; O is their sum."""
        return [layer.out_features for layer in self.layers]

    def adapters(self) -> list[Tensor]:
        """Return A (R, I) and B (O, R) of each layer in turn."""
        pairs = ((layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]) for layer in self.layers)
        return [half.weight for pair in pairs for half in pair]

    def rounded(self, adapters: Sequence[Tensor]) -> list[Tensor]:
        """Return what the products take of ``adapters``: A (R, I) of all layers, then each B."""
        return [half.to(self.dtype) for half in (_stacked(adapters[0::2]), *adapters[1::2])]

    def forward(self, x_NI: Tensor, halves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the (N, O) outputs side by side, and the (N, R) u = x A'.

        Args:
            x_NI: What all layers read.
            halves: From `rounded`.
        """
        x_NI, (a_RI, *b_all) = x_NI.to(self.dtype), halves
        weight_OI, bias_O = self._weight(), self._bias()
        y_NO = x_NI @ weight_OI.T if bias_O is None else torch.addmm(bias_O, x_NI, weight_OI.T)
        u_NR = x_NI @ a_RI.T
        for y, u, b, scale in zip(
            torch.split(y_NO, self.sizes, 1), self._by_rank(u_NR), b_all, self._scales, strict=True
        ):
            y.addmm_(u, b.T, alpha=scale)
        return y_NO, u_NR

    def backward(
        self, g_NO: Tensor, x_NI: Tensor, u_NR: Tensor, halves: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """Return the gradients of each A and B in turn, and (N, R) that of u.

        Args:
            g_NO: Gradient of the outputs.
            x_NI: What `forward` was given.
            u_NR: What it returned.
            halves: As in `forward`.
        """
        x_NI = x_NI.to(self.dtype)
        gu_NR = torch.empty_like(u_NR)
        db_all = []
        for g, u, gu, b, scale in zip(
            torch.split(g_NO, self.sizes, 1),
            self._by_rank(u_NR),
            self._by_rank(gu_NR),
            halves[1:],
            self._scales,
            strict=True,
        ):
            torch.mm(g, b, out=gu).mul_(scale)
            db_all.append((u.T @ g).float().mul_(scale).T)  # this way round nearly twice as fast
        da_all = torch.split((gu_NR.T @ x_NI).float(), self._ranks)
        return [part for pair in zip(da_all, db_all, strict=True) for part in pair], gu_NR

    def input_gradient(self, g_NO: Tensor, gu_NR: Tensor, halves: Sequence[Tensor]) -> Tensor:
        """Return (N, I) the gradient of x, given those of the outputs and of u."""
        return (g_NO @ self._weight()).addmm_(gu_NR, halves[0])

    @property
    def _scales(self) -> list[float]:
        return [layer.scaling[ADAPTER] for layer in self.layers]

    @property
    def _ranks(self) -> list[int]:
        return [layer.r[ADAPTER] for layer in self.layers]

    def _by_rank(self, u_NR: Tensor) -> Sequence[Tensor]:
        return torch.split(u_NR, self._ranks, 1)

    def _weight(self) -> Tensor:
        return dense_weight(self.layers) if self.kept_OI is None else self.kept_OI

    def _bias(self) -> Tensor | None:
        biases = [layer.get_base_layer().bias for layer in self.layers]
        if all(bias is None for bias in biases):
            return None
        like = self.layers[0].lora_A[ADAPTER].weight
        parts = [
            like.new_zeros(layer.out_features) if bias is None else bias.detach()
            for layer, bias in zip(self.layers, biases, strict=True)
        ]
        return _stacked([part.to(self.dtype) for part in parts])


def multiply(product: Product, x: Tensor) -> tuple[Tensor, ...]:
    """Return the (..., O) output of each layer for the (..., I) input ``x``."""
    outputs: tuple[Tensor, ...] = _Multiply.apply(  # type: ignore[no-untyped-call]
        x, product, *product.adapters()
    )
    return outputs


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Product, *adapters: Tensor) -> tuple[Tensor, ...]:
        x_NI = x.reshape(-1, x.shape[-1])
        halves = product.rounded(adapters)
        y_NO, u_NR = product.forward(x_NI, halves)
        ctx.save_for_backward(x_NI, u_NR, *halves)
        ctx.product, ctx.shape = product, x.shape
        outputs = torch.split(y_NO.to(x.dtype), product.sizes, 1)
        return tuple(y.view(*x.shape[:-1], -1) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, u_NR, *halves = ctx.saved_tensors
        parts = [g.reshape(-1, g.shape[-1]) for g in gradients]
        g_NO = (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(ctx.product.dtype)
        others, gu_NR = ctx.product.backward(g_NO, x_NI, u_NR, halves)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ctx.product.input_gradient(g_NO, gu_NR, halves).view(ctx.shape).to(x_NI.dtype)
        return dx, None, *others


def fits(module: nn.Module) -> bool:
    """Say whether ``module`` can be part of a `Product`.

    Left to PEFT are dropout, DoRA and LLM.int8().
    """
    if not isinstance(module, LoraLayer) or list(module.lora_A) != [ADAPTER]:
        return False
    is_plain = ADAPTER not in module.lora_variant and not module.merged
    dropout = module.lora_dropout[ADAPTER]
    return is_plain and isinstance(dropout, nn.Identity) and _is_plain(module.get_base_layer())


def num_weights(layers: Sequence[Any]) -> int:
    """Return how many frozen weights ``layers`` have together, without biases."""
    return sum(int(layer.in_features * layer.out_features) for layer in layers)


def dense_weight(layers: Sequence[Any]) -> Tensor:
    """Return the (O, I) frozen weights of ``layers``, one below the other, dequantised."""
    bases = [layer.get_base_layer() for layer in layers]
    if len(bases) > 1 and all(_unpacks_in_place(base) for base in bases):
        return _unpacked_in_place(bases)
    parts = []
    for base in bases:
        weight_OI = base.weight.detach()
        if isinstance(base, Linear4bit):
            weight_OI = dequantize_4bit(base.weight.data, base.weight.quant_state)
        parts.append(weight_OI.to(compute_dtype(base)))
    return _stacked(parts)


def _unpacks_in_place(base: Any) -> bool:
    """Say whether bitsandbytes can write the weight where we want it: its GPU kernel can."""
    if not isinstance(base, Linear4bit) or not base.weight.is_cuda:
        return False
    return bool(base.weight.quant_state.dtype == compute_dtype(base))


def _unpacked_in_place(bases: Sequence[Any]) -> Tensor:
    """Return the stacked weights without a copy of each."""
    num_out = [base.out_features for base in bases]
    stacked_OI = torch.empty(
        (sum(num_out), bases[0].in_features),
        dtype=compute_dtype(bases[0]),
        device=bases[0].weight.device,
    )
    for base, part_OI in zip(bases, torch.split(stacked_OI, num_out), strict=True):
        dequantize_4bit(base.weight.data, base.weight.quant_state, out=part_OI)
    return stacked_OI


def compute_dtype(base: Any) -> torch.dtype:
    """Return what a frozen linear layer multiplies in."""
    dtype: torch.dtype = base.weight.dtype
    if isinstance(base, Linear4bit):
        dtype = base.compute_dtype or base.weight.quant_state.dtype
    return dtype


def _is_plain(base: nn.Module) -> bool:
    is_linear = isinstance(base, Linear4bit) or type(base) is nn.Linear
    return is_linear and compute_dtype(base) in _DTYPES


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
