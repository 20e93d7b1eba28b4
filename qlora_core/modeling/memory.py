"""How many bytes training needs on a device, by component, known before any weight is loaded.

A model's shape is enough (`modeling.shape`), so 8B and 70B plans work anywhere. Weights, constants,
adapter, gradients and optimizer are exact; activations are a model of what autograd keeps
(`modeling.activations`), and the rest is what our functions hold for a moment. The sum is the peak
that a worker then measures, as it measures it: resident memory on a CPU, with what Python and its
libraries take; allocated memory on a GPU, without what CUDA takes itself.

Dims: H hidden, F intermediate, R rank, n tokens of a micro-batch, k supervised ones among them, V
vocabulary.
Source: Rajbhandari et al. 2020, arXiv:1910.02054, sec. 3.1 (16 bytes per parameter of full
fine-tuning); Dettmers et al. 2022, arXiv:2110.02861 (8-bit moments).
"""

import math
from collections.abc import Sequence
from typing import Literal

from qlora_core.artifacts import Frozen
from qlora_core.config import AdapterConfig, QuantizationConfig, TrainingConfig
from qlora_core.modeling.activations import (
    adapted_layer_bytes,
    attention_bytes,
    full_layer_bytes,
    fused_layer_bytes,
)
from qlora_core.modeling.dtypes import DtypeName, torch_dtype
from qlora_core.modeling.head import CHUNK_BYTES
from qlora_core.modeling.shape import LinearGroup, Shape
from qlora_core.modeling.stored import FLOAT, PACKED, quantized_groups, stored_of

Strategy = Literal["qlora", "lora", "full"]
Recompute = Literal["nothing", "layers", "layers, inputs offloaded"]

USABLE = 0.9
"""Of a device: the rest goes to fragmentation, and to others."""
_OPTIMIZER_BLOCK, _SMALLEST_8BIT = 256, 4096
_LOGIT_COPIES = 3  # float32: log-probabilities, their gradient, and one of the two on the way


class Workload(Frozen):
    """What one forward and backward pass sees, and how it is computed."""

    num_tokens: int
    """Of the largest micro-batch, padding included."""
    num_supervised: int
    """Of these; logits are computed for them alone."""
    num_pairs: int = 0
    """Of query and key whose attention weights are kept, as in float32 on a CPU."""
    recompute: Recompute = "nothing"
    """What the backward pass computes again instead of keeping it."""
    compute_dtype: DtypeName
    num_lanes: int = 1
    """Parts of a micro-batch that are computed at the same time."""
    is_fused: bool = True
    """By our own functions (`modeling.fusing`), where the adapter allows it."""
    chunk_bytes: int = CHUNK_BYTES
    """Of float32 logits, in each lane (see `modeling.head`)."""
    num_shards: int = 0
    """Workers that each keep a part of the base (see `modeling.sharding`); 0: it is whole."""
    offloads_base: bool = False
    """The parts lie in the memory of a GPU's host."""
    dense_budget_bytes: int = 0
    """Room for dequantised weights that are kept while training (see `modeling.dense`)."""
    runtime_bytes: int = 0
    """What the process takes before it loads a model."""

    @property
    def compute_bytes(self) -> int:
        """Bytes of one number in the compute dtype."""
        return torch_dtype(self.compute_dtype).itemsize


class MemoryEstimate(Frozen):
    """Bytes on one device at the peak of a training step, by component."""

    strategy: Strategy
    weights: int
    """Frozen weights as stored, or this worker's part of them with their scales; for full
    fine-tuning the trained ones."""
    constants: int
    """Scales and tables of the quantisation; of a sharded base what is whole everywhere."""
    unquantized: int
    """Embeddings, norms, biases and skipped layers, in the compute dtype."""
    adapter: int
    """LoRA weights, float32."""
    gradients: int
    optimizer: int
    """AdamW's moments, and float32 master weights of full fine-tuning in 16 bits."""
    activations: int
    """Kept for the backward pass (approximate)."""
    logits: int
    """Logits and loss at supervised positions (approximate); with recomputed layers what they take
    beyond `workspace`, as they are gone before it is needed."""
    workspace: int
    """The largest layer's weight, dequantised for its product, and its gradients (approximate)."""
    gathered: int = 0
    """Two blocks of a sharded base: the one that computes, and the one that comes; if it is
    offloaded, also our part of the latter, on its way to the other workers."""
    dense: int = 0
    """4-bit weights kept dequantised, as far as memory allows."""
    runtime: int = 0
    """Python and its libraries, on a CPU."""
    paged: int = 0
    """Part of `optimizer` that can leave the GPU for the host (paged optimizers)."""

    @property
    def total(self) -> int:
        """Sum of all components [bytes]."""
        return sum(size for _, size in self.components())

    def components(self) -> tuple[tuple[str, int], ...]:
        """Return (name, bytes) of each component, in the order of the fields."""
        skipped = {"strategy", "paged"}
        return tuple((n, getattr(self, n)) for n in type(self).model_fields if n not in skipped)


def estimate_qlora(
    shape: Shape,
    quantization: QuantizationConfig,
    adapter: AdapterConfig,
    training: TrainingConfig,
    work: Workload,
) -> MemoryEstimate:
    """Return what the recipe needs: quantised base, float32 adapter."""
    return _with_adapter("qlora", shape, quantization, adapter, training, work)


def estimate_lora(
    shape: Shape, adapter: AdapterConfig, training: TrainingConfig, work: Workload
) -> MemoryEstimate:
    """Return what the same adapter on an unquantised base needs: 16 bits, float32 on a CPU."""
    plain = QuantizationConfig(method="none")
    return _with_adapter("lora", shape, plain, adapter, training, work)


def estimate_full(shape: Shape, work: Workload) -> MemoryEstimate:
    """Return what full fine-tuning with AdamW needs: 16 bytes per parameter, and activations.

    In 16 bits: weight 2, gradient 2, master weight 4, moments 8. In float32: weight 4, gradient 4,
    moments 8.
    """
    num = shape.num_parameters
    master = 0 if work.compute_bytes == FLOAT else FLOAT * num
    return MemoryEstimate(
        strategy="full",
        weights=work.compute_bytes * num,
        constants=0,
        unquantized=0,
        adapter=0,
        gradients=work.compute_bytes * num,
        optimizer=2 * FLOAT * num + master,
        activations=_kept(shape, work, full_layer_bytes(shape, work.compute_bytes)),
        logits=_logits_bytes(shape, work),
        workspace=_input_gradient_bytes(shape, work),
        runtime=work.runtime_bytes,
    )


def optimizer_bytes(sizes: list[int], optimizer: str) -> int:
    """Return the bytes of AdamW's moments for trained tensors of these sizes.

    In 8 bits each block of 256 has a float32 scale; tensors below 4096 numbers stay in 32 bits.
    """
    if optimizer == "adamw":
        return 2 * FLOAT * sum(sizes)
    return sum(
        2 * FLOAT * size
        if size < _SMALLEST_8BIT
        else 2 * (size + FLOAT * math.ceil(size / _OPTIMIZER_BLOCK))
        for size in sizes
    )


def _with_adapter(
    strategy: Strategy,
    shape: Shape,
    quantization: QuantizationConfig,
    adapter: AdapterConfig,
    training: TrainingConfig,
    work: Workload,
) -> MemoryEstimate:
    quantized = quantized_groups(shape, quantization)
    shards, is_offloaded = work.num_shards, work.offloads_base
    stored = stored_of(
        shape, quantization, work.compute_bytes, num_shards=shards, is_offloaded=is_offloaded
    )
    sizes = adapter_sizes(shape, adapter)
    moments = optimizer_bytes(sizes, training.optimizer)
    is_fused = work.is_fused and _can_be_fused(quantization, adapter)
    dense = 0
    if quantization.method in PACKED:
        unpacked = work.compute_bytes * sum(group.num_weights for group in quantized)
        dense = min(unpacked, work.dense_budget_bytes)
    logits = _chunk_bytes(shape, work) if is_fused else _logits_bytes(shape, work)
    block = (_block_bytes if is_fused else _input_gradient_bytes)(shape, work)
    if work.recompute != "nothing":  # the loss lets go before a layer is computed again
        block = round(block * _share_redone(work))
        logits = max(0, logits - block)
    return MemoryEstimate(
        strategy=strategy,
        **dict(stored),
        adapter=FLOAT * sum(sizes),
        gradients=FLOAT * sum(sizes),
        optimizer=moments,
        activations=_activation_bytes(shape, adapter, work, is_fused=is_fused),
        logits=logits,
        workspace=_weight_bytes(shape, work, quantized, dense) + block,
        dense=dense,
        runtime=work.runtime_bytes,
        paged=moments if training.optimizer.startswith("paged") else 0,
    )


def _can_be_fused(quantization: QuantizationConfig, adapter: AdapterConfig) -> bool:
    return quantization.method != "int8" and not adapter.dropout and not adapter.dora


def adapter_sizes(shape: Shape, adapter: AdapterConfig) -> list[int]:
    """Return the sizes of all trained tensors: A, B and DoRA's magnitude of each layer."""
    sizes = []
    for group in shape.linears:
        if group.has_adapter:
            layer = [adapter.rank * group.num_in, adapter.rank * group.num_out]
            sizes += (layer + ([group.num_out] if adapter.dora else [])) * group.count
    return sizes


def _activation_bytes(
    shape: Shape, adapter: AdapterConfig, work: Workload, *, is_fused: bool
) -> int:
    if not is_fused:
        return _kept(shape, work, adapted_layer_bytes(shape, adapter, work.compute_bytes))
    weights = attention_bytes(shape, work.num_pairs)
    if work.recompute != "nothing":
        weights //= shape.num_layers
    return weights + _kept(shape, work, fused_layer_bytes(shape, adapter, work.compute_bytes))


def _kept(shape: Shape, work: Workload, layer_bytes: float) -> int:
    """Return bytes for all layers: with checkpointing each keeps its input, and one is redone.

    Inputs that lie with the host come back one by one: two of them are on the device.
    """
    if work.recompute == "nothing":
        return round(work.num_tokens * shape.num_layers * layer_bytes)
    num_inputs = shape.num_layers if work.recompute == "layers" else min(2, shape.num_layers)
    inputs = num_inputs * shape.hidden * work.compute_bytes
    return round(work.num_tokens * (inputs + layer_bytes * _share_redone(work)))


def _share_redone(work: Workload) -> float:
    """Return which share of a redone layer counts: lanes are seldom at their widest all at once.

    Exact for one lane; for two it lies between what both need together and half of that, and was
    measured to be nearer to half (`python -m benchmarks.memory`).
    """
    return (1 + 1 / work.num_lanes) / 2


def _logits_bytes(shape: Shape, work: Workload) -> int:
    """Return bytes for (k, V) logits, in the compute dtype and as the loss uses them in float32."""
    stored = work.compute_bytes if work.compute_bytes != FLOAT else 0
    return work.num_supervised * shape.vocabulary * (stored + FLOAT * _LOGIT_COPIES)


def _chunk_bytes(shape: Shape, work: Workload) -> int:
    """Return bytes of `modeling.head`: a chunk of logits in each lane, hidden states, gradients.

    In 16 bits a chunk exists in both widths, and its gradient in the narrower one.
    """
    widths = FLOAT if work.compute_bytes == FLOAT else FLOAT + 2 * work.compute_bytes
    chunk = min(work.num_lanes * work.chunk_bytes // FLOAT, work.num_supervised * shape.vocabulary)
    states = 2 * work.num_supervised * shape.hidden * work.compute_bytes
    return chunk * widths + states


def _weight_bytes(
    shape: Shape, work: Workload, quantized: Sequence[LinearGroup], dense: int
) -> int:
    """Return bytes of the largest weight that is dequantised in a pass: gate and up together."""
    if not quantized or dense >= work.compute_bytes * sum(g.num_weights for g in quantized):
        return 0
    largest = max(g.num_out * g.num_in for g in quantized)
    if work.is_fused:
        largest = max(largest, 2 * shape.hidden * shape.intermediate)
    return work.compute_bytes * largest


def _block_bytes(shape: Shape, work: Workload) -> int:
    """Return bytes alive at once in our gated block's backward pass: five of F, two of H."""
    numbers = work.num_tokens * (5 * shape.intermediate + 2 * shape.hidden)
    return numbers * work.compute_bytes


def _input_gradient_bytes(shape: Shape, work: Workload) -> int:
    """Return bytes of the gradients alive at once in the gated block: two of F, two of H."""
    return 2 * work.num_tokens * (shape.intermediate + shape.hidden) * work.compute_bytes
