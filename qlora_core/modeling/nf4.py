"""NF4 and double quantisation, to read: the oracle that bitsandbytes is tested against.

A block of B = 64 weights is divided by its largest magnitude, and each quotient is replaced by the
nearest of 16 levels: 4 bits per weight and one float32 scale per block. Trained weights are close
to normal, so the levels are quantiles of a normal distribution: each is used about equally often.
The negative side has 7 quantiles and the positive one 8, because zero must be a level of its own.

Double quantisation stores the scales in 8 bits too: their mean is taken off, then blocks of 256 of
them are divided by *their* largest magnitude and replaced by the nearest of 256 levels that are
spaced finely near zero (a dynamic exponent). That costs 8/64 + 32/(64*256) = 0.127 bits per weight
instead of 32/64 = 0.5.

Nothing here is fast, and nothing else in the project calls it.

Dims: N weights, K = N / 64 blocks.
Source: Dettmers et al. 2023, arXiv:2305.14314, sec. 3 and appendix E (levels); Dettmers et al.
2021, arXiv:2110.02861, sec. 2.1 (the dynamic 8-bit levels).
"""

from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

BLOCK = 64
SCALE_BLOCK = 256


@dataclass(frozen=True)
class Blocks:
    """Block-wise quantised numbers."""

    codes_N: Tensor
    """Index of each number's level, integers."""
    scales_K: Tensor
    """Largest magnitude of each block, float32."""


@dataclass(frozen=True)
class DoubleBlocks:
    """NF4 weights whose scales are quantised as well."""

    codes_N: Tensor
    scales: Blocks
    mean: Tensor
    """Mean of the scales, taken off before they were quantised."""


def nf4_levels() -> Tensor:
    """Return the 16 levels in [-1, 1], ascending, float32.

    The outermost quantile is the mean of 1 - 1/32 and 1 - 1/30, half a step from the tail on
    either side of 16 and 15 levels; all are then divided by it, so that the ends are -1 and 1.
    """
    tail = (1 - 1 / 32 + 1 - 1 / 30) / 2
    positive = [_normal_quantile(tail + (0.5 - tail) * i / 8) for i in range(8)]
    negative = [-_normal_quantile(tail + (0.5 - tail) * i / 7) for i in range(7)]
    levels = torch.tensor(sorted([*negative, 0.0, *positive]), dtype=torch.float64)
    return (levels / levels.max()).float()


def dynamic_levels() -> Tensor:
    """Return the 256 levels of the signed dynamic 8-bit type, ascending, float32.

    Of 7 bits, i + 1 say the decade 10^(i - 6), and the rest divides it into 2^i parts: few levels
    near zero where they are dense anyway, 64 in the top decade. 0 and 1 complete them.
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float64)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        levels += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(levels), dtype=torch.float64).float()


def quantize_blocks(values: Tensor, levels: Tensor, block: int) -> Blocks:
    """Divide each block by its largest magnitude and take the nearest levels.

    Args:
        values: Any shape, read in memory order; its size need not be a multiple of ``block``.
        levels: Ascending, within [-1, 1].
        block: Numbers per scale.
    """
    flat_N = values.reshape(-1).float()
    pieces = torch.split(flat_N, block)
    scales_K = torch.stack([piece.abs().max() for piece in pieces])
    unit_N = torch.cat([p / s.clamp(min=1e-38) for p, s in zip(pieces, scales_K, strict=True)])
    distances = (unit_N[:, None].double() - levels.double()).abs()
    return Blocks(distances.argmin(dim=1), scales_K)


def dequantize_blocks(blocks: Blocks, levels: Tensor, block: int) -> Tensor:
    """Return level times scale for each number, (N,) float32."""
    size = blocks.codes_N.numel()
    return levels[blocks.codes_N] * blocks.scales_K.repeat_interleave(block)[:size]


def quantize_nf4(weight: Tensor) -> Blocks:
    """Return the NF4 codes of ``weight`` with float32 scales."""
    return quantize_blocks(weight, nf4_levels(), BLOCK)


def dequantize_nf4(blocks: Blocks, shape: torch.Size) -> Tensor:
    """Return the weights that the codes stand for, float32."""
    return dequantize_blocks(blocks, nf4_levels(), BLOCK).reshape(shape)


def quantize_nf4_double(weight: Tensor) -> DoubleBlocks:
    """Return the NF4 codes of ``weight`` with 8-bit scales."""
    single = quantize_nf4(weight)
    mean = single.scales_K.mean()
    scales = quantize_blocks(single.scales_K - mean, dynamic_levels(), SCALE_BLOCK)
    return DoubleBlocks(single.codes_N, scales, mean)


def dequantize_nf4_double(blocks: DoubleBlocks, shape: torch.Size) -> Tensor:
    """Return the weights that the codes stand for, float32."""
    scales_K = dequantize_blocks(blocks.scales, dynamic_levels(), SCALE_BLOCK) + blocks.mean
    return dequantize_nf4(Blocks(blocks.codes_N, scales_K), shape)


def _normal_quantile(probability: float) -> float:
    return NormalDist().inv_cdf(probability)
