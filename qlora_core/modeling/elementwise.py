"""What is not a product: norms, rotary positions and gated activations, in few passes over memory.

None of these multiplies much; what they cost is reading and writing. autograd records every step of
them (transformers' RMSNorm is seven), keeps a tensor for most, and passes over all of them again.
Each is one function here, that keeps only what cannot be computed from what is kept anyway.

    RMSNorm   y = x w / rms(x)      dx = (g w - x (g w . x) / (H rms^2)) / rms
    rotary    y = x cos + rot(x) sin, rot(x1, x2) = (-x2, x1)      dx = g cos - rot(g sin)
    gate      h = act(gate) up      d up = dh act(gate)      d gate = dh up act'(gate)

Dims: N tokens, H hidden size, F intermediate size, D head size, T positions.
Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4; Su et al. 2021, arXiv:2104.09864, eq. 34;
Shazeer 2020, arXiv:2002.05202, eq. 5.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Return ``x`` (..., H) divided by its root mean square, times a frozen weight.

    On a CPU in float32; GPUs have a kernel of torch's for it.
    """
    if x.device.type == "cuda":
        return F.rms_norm(x, weight_H.shape, weight_H, eps)
    output: Tensor = _RmsNorm.apply(x, weight_H, eps)  # type: ignore[no-untyped-call]
    return output


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        size = x.shape[-1]
        squares_N1 = torch.linalg.vecdot(x, x)[..., None]
        inverse_N1 = squares_N1.div_(size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_H, inverse_N1)
        y: Tensor = (x * inverse_N1).mul_(weight_H)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        x, weight_H, inverse_N1 = ctx.saved_tensors
        dx = g * weight_H
        along_N1 = torch.linalg.vecdot(dx, x)[..., None]
        along_N1.mul_(inverse_N1).mul_(inverse_N1).div_(-x.shape[-1])
        return dx.addcmul_(x, along_N1).mul_(inverse_N1), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x`` (..., T, D) with its positions in it.

    Args:
        x: Queries or keys.
        cos: (..., T, D), the second half of D a copy of the first.
        sin: The same of the sine.
    """
    output: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return output


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(g, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    y = x * cos
    half = x.shape[-1] // 2
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return y


@dataclass(frozen=True)
class Activation:
    """An activation, and its gradient written into a tensor that is there already."""

    apply: Callable[[Tensor], Tensor]
    differentiate: Callable[[Tensor, Tensor, Tensor], None]
    """Takes the gradient of the output, the input, and where the input's gradient goes."""


def _silu_gradient(g: Tensor, x: Tensor, out: Tensor) -> None:
    torch.ops.aten.silu_backward.grad_input(g, x, grad_input=out)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_gradient(approximate: str) -> Callable[[Tensor, Tensor, Tensor], None]:
    def differentiate(g: Tensor, x: Tensor, out: Tensor) -> None:
        torch.ops.aten.gelu_backward.grad_input(g, x, approximate=approximate, grad_input=out)

    return differentiate


SILU = Activation(F.silu, _silu_gradient)
ACTIVATIONS = (
    SILU,
    Activation(_gelu_tanh, _gelu_gradient("tanh")),
    Activation(F.gelu, _gelu_gradient("none")),
)
