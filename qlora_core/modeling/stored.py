"""How many bytes a base takes where it is stored: whole on a device, in parts, or with its host.

What a 4-bit weight costs (Dettmers et al. 2023, arXiv:2305.14314, sec. 3): 4 bits, one absmax for
each block of 64, in float32 (0.5 bits more) or, with double quantisation, in 8 bits with a float32
for each 256 of them: 4 + 8/64 + 32/(64 * 256) = 4.127 bits, and 1 KB of tables per layer.

Source: Dettmers et al. 2022, arXiv:2208.07339 (int8: a byte a weight, a scale for each row).
"""

import math

from qlora_core.artifacts import Frozen
from qlora_core.config import QuantizationConfig
from qlora_core.modeling.shape import LinearGroup, Shape
from qlora_core.modeling.sharding import aligned

PACKED = ("nf4", "fp4")
"""Methods whose weights can be divided; others are floating point, or have scales of their own."""
FLOAT = 4
"""Bytes of a float32."""
_BLOCK, _NESTED_BLOCK = 64, 256
_CODE_4BIT, _CODE_NESTED = 16 * FLOAT, 256 * FLOAT


def quantized_bytes(num_out: int, num_in: int, quantization: QuantizationConfig) -> tuple[int, int]:
    """Return (weight, constants) bytes of one quantised (O, I) layer, as bitsandbytes holds it."""
    size = num_out * num_in
    if quantization.method == "int8":
        return size, FLOAT * num_out
    packed, scales = math.ceil(size / 2), _scale_bytes(size, quantization)
    if not quantization.double:
        return packed, scales + _CODE_4BIT
    nested = FLOAT * math.ceil(scales / _NESTED_BLOCK)
    offset = FLOAT
    return packed, scales + nested + _CODE_NESTED + offset + _CODE_4BIT


def _scale_bytes(size: int, quantization: QuantizationConfig) -> int:
    """Return bytes of the scales of a 4-bit weight: one for each block, 8 bits or 32 each."""
    return math.ceil(size / _BLOCK) * (1 if quantization.double else FLOAT)


class Parts(Frozen):
    """A 4-bit base that is divided among workers, in bytes on each of them."""

    kept: int
    """A part of all blocks, weights and scales."""
    gathered: int
    """The most that is put together at a time."""
    sent: int
    """A part with the host that goes to the GPU before it is gathered; none where one worker keeps
    all, whose blocks are copied to their place."""
    whole: int
    """Scales and tables that every worker keeps."""
    pinned: int
    """What is kept, in the memory of a GPU's host: torch rounds each block up to a power of two
    where the GPU copies from it by itself."""


def parts_of(shape: Shape, quantization: QuantizationConfig, num_workers: int) -> Parts:
    """Return what each worker holds of a sharded 4-bit base, its blocks being alike.

    Args:
        shape: The model's.
        quantization: In 4 bits.
        num_workers: Who divide it.
    """
    quantized = quantized_groups(shape, quantization)
    block, whole = 0.0, 0
    for group in quantized:
        packed, constants = quantized_bytes(group.num_out, group.num_in, quantization)
        scales = _scale_bytes(group.num_out * group.num_in, quantization)
        block += group.count / shape.num_layers * (aligned(packed) + aligned(scales))
        whole += group.count * (constants - scales)
    part = aligned(math.ceil(block / num_workers))
    num_here = min(2, shape.num_layers)
    return Parts(
        kept=shape.num_layers * part,
        gathered=num_here * num_workers * part,
        sent=part if num_workers > 1 else 0,
        whole=whole,
        pinned=shape.num_layers * (1 << max(0, part - 1).bit_length()),
    )


class Stored(Frozen):
    """What a device keeps of a base for good, and of one in parts for a while, in bytes.

    The fields are those of `MemoryEstimate`.
    """

    weights: int
    constants: int
    unquantized: int
    gathered: int


def stored_of(
    shape: Shape,
    quantization: QuantizationConfig,
    compute_bytes: int,
    *,
    num_shards: int = 0,
    is_offloaded: bool = False,
) -> Stored:
    """Return what the base takes of one device.

    Args:
        shape: The model's.
        quantization: How it is stored.
        compute_bytes: Of one number in the compute dtype.
        num_shards: Workers that each keep a part of it; 0: it is whole.
        is_offloaded: The parts lie in the memory of a GPU's host.
    """
    quantized = quantized_groups(shape, quantization)
    stored = [(g.count, *quantized_bytes(g.num_out, g.num_in, quantization)) for g in quantized]
    weights = sum(count * weight for count, weight, _ in stored)
    constants, gathered = sum(count * constants for count, _, constants in stored), 0
    if num_shards and quantized:
        parts = parts_of(shape, quantization, num_shards)
        weights = 0 if is_offloaded else parts.kept
        constants = parts.whole
        gathered = parts.gathered + (parts.sent if is_offloaded else 0)
    left = shape.num_parameters - sum(group.num_weights for group in quantized)
    return Stored(
        weights=weights,
        constants=constants,
        unquantized=compute_bytes * left,
        gathered=gathered,
    )


def quantized_groups(shape: Shape, quantization: QuantizationConfig) -> list[LinearGroup]:
    """Return the layers that are stored in fewer bits."""
    is_plain = quantization.method == "none"
    return [] if is_plain else [group for group in shape.linears if group.is_quantized]
