from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch
from torch.testing import assert_close

from qlora_core.modeling.nf4 import (
    dequantize_nf4,
    dequantize_nf4_double,
    dynamic_levels,
    nf4_levels,
    quantize_nf4,
    quantize_nf4_double,
)

# Dettmers et al. 2023, appendix E
PAPER_LEVELS = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


def weights(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1)


def test_levels_are_those_of_the_paper():
    assert_close(nf4_levels(), torch.tensor(PAPER_LEVELS), rtol=0, atol=5e-7)


def test_dynamic_levels_are_those_of_bitsandbytes():
    assert_close(dynamic_levels(), bnb.create_dynamic_map(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("shape", [(64, 64), (3, 192), (7, 30)], ids=str)
def test_codes_and_weights_are_those_of_bitsandbytes(shape):
    weight = weights(0, *shape)

    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    ours = quantize_nf4(weight)

    assert torch.equal(ours.codes_N, unpacked(packed)[: weight.numel()])
    assert torch.equal(ours.scales_K, state.absmax)
    theirs = bnb.dequantize_4bit(packed, state)
    assert_close(dequantize_nf4(ours, weight.shape), theirs, rtol=1e-6, atol=1e-9)


def test_double_quantised_weights_are_those_of_bitsandbytes():
    weight = weights(1, 256, 192)  # 768 blocks: three blocks of scales

    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = quantize_nf4_double(weight)

    assert torch.equal(ours.codes_N, unpacked(packed))
    theirs = bnb.dequantize_4bit(packed, state)
    with_their_codes = replace(ours, scales=replace(ours.scales, codes_N=state.absmax.long()))
    again = dequantize_nf4_double(with_their_codes, weight.shape)
    assert_close(again, theirs, rtol=1e-6, atol=1e-9)


def test_scales_are_rounded_to_the_nearest_level_like_bitsandbytes_does():
    weight = weights(1, 256, 192)

    _, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = quantize_nf4_double(weight)

    exact_K = quantize_nf4(weight).scales_K - ours.mean
    unit_K = exact_K / ours.scales.scales_K.repeat_interleave(256)
    nearest_K = (unit_K - dynamic_levels()[ours.scales.codes_N]).abs()
    theirs_K = (unit_K - dynamic_levels()[state.absmax.long()]).abs()
    assert torch.equal(ours.scales.scales_K, state.state2.absmax)
    assert (theirs_K - nearest_K).max() < 3e-5  # they find it by a table: ties may fall either way
    assert (ours.scales.codes_N == state.absmax.long()).float().mean() > 0.98


def test_quantising_again_changes_nothing():
    weight = weights(2, 64, 64)
    once = dequantize_nf4(quantize_nf4(weight), weight.shape)

    twice = dequantize_nf4(quantize_nf4(once), weight.shape)

    assert torch.equal(once, twice)


def test_a_block_of_zeros_stays_zero():
    weight = torch.zeros(2, 64)

    assert torch.equal(dequantize_nf4(quantize_nf4(weight), weight.shape), weight)
