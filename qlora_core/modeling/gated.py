"""A gated feed-forward block, adapters and all, as one function.

    y = [gate, up] = x [Wg, Wu]'        h = act(gate) up        out = h Wd'        (plus adapters)

Kept for the backward pass are x and y, not h, which costs one pass over memory to make again and
would be a quarter of a layer's activations. The gradients of gate and up are written side by side
where the product's backward pass wants them.

Dims: N tokens, I hidden size, F intermediate size, R adapter rank.
Source: Shazeer 2020, arXiv:2002.05202, eq. 5.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_core.modeling.elementwise import ACTIVATIONS, Activation
from qlora_core.modeling.products import Product

_NUM_TRIED = 64


@dataclass(frozen=True)
class Gated:
    """The parts of one block."""

    inner: Product
    """Gate and up."""
    activation: Activation
    down: Product

    @property
    def dtype(self) -> torch.dtype:
        """What is multiplied."""
        return self.inner.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Return the (..., I) output for the (..., I) input ``x``."""
        adapters = (*self.inner.adapters(), *self.down.adapters())
        output: Tensor = _Gated.apply(x, self, *adapters)  # type: ignore[no-untyped-call]
        return output


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Gated, *adapters: Tensor) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        y_NO, u_NR = block.inner.forward(x_NI, adapters[:4])
        gate_NF, up_NF = y_NO.chunk(2, 1)
        h_NF = block.activation.apply(gate_NF).mul_(up_NF)
        output_NI, down_u_NR = block.down.forward(h_NF, adapters[4:])
        ctx.save_for_backward(x_NI, y_NO, u_NR, down_u_NR, *adapters)
        ctx.block, ctx.shape = block, x.shape
        return output_NI.view(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, y_NO, u_NR, down_u_NR, *adapters = ctx.saved_tensors
        block: Gated = ctx.block
        gate_NF, up_NF = y_NO.chunk(2, 1)
        active_NF = block.activation.apply(gate_NF)
        g_NI = g.reshape(-1, g.shape[-1]).to(y_NO.dtype)
        down_parts, gu_NR = block.down.backward(g_NI, active_NF * up_NF, down_u_NR, adapters[4:])
        dh_NF = block.down.input_gradient(g_NI, gu_NR, adapters[4:])
        dy_NO = torch.empty_like(y_NO)
        dgate_NF, dup_NF = dy_NO.chunk(2, 1)
        torch.mul(dh_NF, active_NF, out=dup_NF)
        block.activation.differentiate(dh_NF.mul_(up_NF), gate_NF, dgate_NF)
        parts, gu_NR = block.inner.backward(dy_NO, x_NI, u_NR, adapters[:4])
        dx = None
        if ctx.needs_input_grad[0]:
            dx_NI = block.inner.input_gradient(dy_NO, gu_NR, adapters[:4])
            dx = dx_NI.view(ctx.shape).to(x_NI.dtype)
        return dx, None, *parts, *down_parts


@torch.no_grad()
def find_activation(module: nn.Module) -> Activation | None:
    """Return what ``module`` computes, if it is an activation we know; found by trying."""
    x = torch.linspace(-6, 6, _NUM_TRIED)
    try:
        expected = module(x.clone())
    except Exception:  # whatever it is, it is not an activation of one tensor
        return None
    same = (a for a in ACTIVATIONS if torch.allclose(a.apply(x), expected, rtol=1e-6, atol=1e-7))
    return next(same, None)
