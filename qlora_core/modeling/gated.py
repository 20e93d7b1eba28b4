"""A gated feed-forward block, adapters and all, as one function.

    y = [gate, up] = x [Wg, Wu]'        h = act(gate) up        out = h Wd'        (plus adapters)

Kept for the backward pass are x and y, not h, which costs one pass over memory to make again and
would be a quarter of a layer's activations. The gradients of gate and up are written side by side
where the product's backward pass wants them. Between the products torch computes, or on a GPU a
kernel (`qlora_core.modeling.kernels`).

Dims: N tokens, I hidden size, F intermediate size, R adapter rank.
Source: Shazeer 2020, arXiv:2002.05202, eq. 5.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from qlora_core.modeling.elementwise import ACTIVATIONS, Activation
from qlora_core.modeling.kernels import GateKernel
from qlora_core.modeling.products import Product

_NUM_TRIED = 64
_NUM_INNER = 3  # tensors of gate's and up's adapters: A of both, and each B


@dataclass(frozen=True)
class Gated:
    """The parts of one block."""

    inner: Product
    """Gate and up."""
    activation: Activation
    down: Product
    kernel: GateKernel | None = None
    """Computes what lies between the products; none: torch does."""

    @property
    def dtype(self) -> torch.dtype:
        """What is multiplied."""
        return self.inner.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Return the (..., I) output for the (..., I) input ``x``."""
        adapters = (*self.inner.adapters(), *self.down.adapters())
        output: Tensor = _Gated.apply(x, self, *adapters)  # type: ignore[no-untyped-call]
        return output

    def multiplied(self, y_NO: Tensor) -> Tensor:
        """Return h (N, F), given gate and up side by side."""
        if self.kernel is not None:
            return self.kernel.multiply(y_NO)
        gate_NF, up_NF = y_NO.chunk(2, 1)
        return self.activation.apply(gate_NF).mul_(up_NF)

    def again(self, y_NO: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return h (N, F), and what `differentiated` may need of it."""
        if self.kernel is not None:
            return self.kernel.multiply(y_NO), None
        gate_NF, up_NF = y_NO.chunk(2, 1)
        active_NF = self.activation.apply(gate_NF)
        return active_NF * up_NF, active_NF

    def differentiated(self, dh_NF: Tensor, y_NO: Tensor, active_NF: Tensor | None) -> Tensor:
        """Return the (N, O) gradient of y; ``dh_NF`` is used up."""
        if active_NF is None:
            return cast(GateKernel, self.kernel).differentiate(y_NO, dh_NF)
        gate_NF, up_NF = y_NO.chunk(2, 1)
        dy_NO = torch.empty_like(y_NO)
        dgate_NF, dup_NF = dy_NO.chunk(2, 1)
        torch.mul(dh_NF, active_NF, out=dup_NF)
        self.activation.differentiate(dh_NF.mul_(up_NF), gate_NF, dgate_NF)
        return dy_NO


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Gated, *adapters: Tensor) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        inner, down = block.inner.rounded(adapters[:4]), block.down.rounded(adapters[4:])
        y_NO, u_NR = block.inner.forward(x_NI, inner)
        output_NI, down_u_NR = block.down.forward(block.multiplied(y_NO), down)
        ctx.save_for_backward(x_NI, y_NO, u_NR, down_u_NR, *inner, *down)
        ctx.block, ctx.shape = block, x.shape
        return output_NI.view(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, y_NO, u_NR, down_u_NR, *halves = ctx.saved_tensors
        block, inner, down = ctx.block, halves[:_NUM_INNER], halves[_NUM_INNER:]
        g_NI = g.reshape(-1, g.shape[-1]).to(y_NO.dtype)
        h_NF, active_NF = block.again(y_NO)
        down_parts, gu_NR = block.down.backward(g_NI, h_NF, down_u_NR, down)
        del h_NF
        dh_NF = block.down.input_gradient(g_NI, gu_NR, down)
        dy_NO = block.differentiated(dh_NF, y_NO, active_NF)
        parts, gu_NR = block.inner.backward(dy_NO, x_NI, u_NR, inner)
        dx = None
        if ctx.needs_input_grad[0]:
            dx_NI = block.inner.input_gradient(dy_NO, gu_NR, inner)
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
