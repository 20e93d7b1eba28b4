"""Keep a 4-bit model's weights dequantised for a while: memory for speed.

A 4-bit layer dequantises its weight in every forward pass, and again in every backward pass. That
is lost in the noise when a pass holds thousands of tokens, but a decoding step holds one token per
row, and a small micro-batch on a CPU a hundred; both spend much of their time there. For the length
of a `with` block the weights are dequantised once, as far as a budget of bytes reaches.

Where bitsandbytes' own layer dequantises and then multiplies, that changes no bit of what comes
out. So it does on a CPU, and wherever gradients flow through the layer. Without gradients a GPU
multiplies few tokens (always up to 4, by its size up to 1,536) by a kernel that reads the 4 bits as
it goes and adds up in another order: dequantised weights give other roundings there. So a model
that is asked on a GPU keeps none (`asking_budget`): how many fit depends on who else is there, and
a report must not.
Source: bitsandbytes 0.50, `backends/cuda/ops.py` (gemm_4bit), `autograd/_functions.py`.
Dims: O out features, I in features, B batch, T positions.
"""

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

BUDGET_BYTES = 2_000_000_000


def asking_budget(device: torch.device) -> int:
    """Return how many bytes of weights to keep while a model is asked, whatever memory is free."""
    return BUDGET_BYTES if device.type == "cpu" else 0


@contextmanager
def dense_weights(
    model: nn.Module, budget_bytes: int, skip: Container[nn.Module] = ()
) -> Iterator[int]:
    """Give 4-bit layers of ``model`` dequantised weights inside the block; yield how many.

    Layers are taken in order until the budget is used up; the others, and those to ``skip``, go on
    as before.
    """
    replaced: list[Linear4bit] = []
    try:
        for layer in (m for m in model.modules() if isinstance(m, Linear4bit) and m not in skip):
            size_bytes = layer.weight.quant_state.shape.numel() * _dtype(layer).itemsize
            if size_bytes > budget_bytes:
                break
            layer.forward = _dense_forward(layer)
            replaced.append(layer)
            budget_bytes -= size_bytes
        yield len(replaced)
    finally:
        for layer in replaced:
            del layer.forward  # the instance's, which hid the class's


def _dtype(layer: Linear4bit) -> torch.dtype:
    dtype: torch.dtype = layer.compute_dtype or layer.weight.quant_state.dtype
    return dtype


def _dense_forward(layer: Linear4bit) -> Callable[[Tensor], Tensor]:
    dtype = _dtype(layer)
    weight_OI = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
    bias_O = None if layer.bias is None else layer.bias.to(dtype)

    def forward(x_BTI: Tensor) -> Tensor:
        return F.linear(x_BTI.to(dtype), weight_OI, bias_O).to(x_BTI.dtype)

    return forward
