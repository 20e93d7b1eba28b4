"""How many bytes training needs on a device, by component, known before any weight is loaded.

A transformers config is enough: the model is built on the `meta` device, which costs no memory, and
its layers are counted. So 8B and 70B plans work anywhere, and weights, constants, adapter,
gradients and optimizer are exact. Activations and logits are a model of what autograd keeps, term
by term as in Korthikanti et al., for a gated Transformer (Llama's kind) with memory-efficient
attention; tests hold it against what autograd really keeps. Not counted: what the allocator wastes
by fragmentation, and the 0.3 to 0.8 GB that CUDA or the Python libraries take themselves.

What a 4-bit weight costs (Dettmers et al. 2023, arXiv:2305.14314, sec. 3): 4 bits, one absmax for
each block of 64, in float32 (0.5 bits more) or, with double quantisation, in 8 bits with a float32
for each 256 of them: 4 + 8/64 + 32/(64 * 256) = 4.127 bits, and 1 KB of tables per layer.

Dims: H hidden, F intermediate, A attention width (heads * head size), C key/value width, R rank,
n tokens of a micro-batch, k supervised ones among them, V vocabulary.
Source: Korthikanti et al. 2022, arXiv:2205.05198, sec. 4.1; Rajbhandari et al. 2020,
arXiv:1910.02054, sec. 3.1 (16 bytes per parameter of full fine-tuning); Dettmers et al. 2022,
arXiv:2110.02861 (8-bit moments).
"""

import math
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

from qlora_core.artifacts import Frozen
from qlora_core.config import AdapterConfig, QuantizationConfig, TrainingConfig
from qlora_core.modeling.dtypes import torch_dtype
from qlora_core.modeling.loading import quiet
from qlora_core.modeling.lora import linear_layers, target_endings
from qlora_core.modeling.quantization import layers_to_quantize

Strategy = Literal["qlora", "lora", "full"]

FLOAT = 4
_BLOCK, _NESTED_BLOCK = 64, 256
_CODE_4BIT, _CODE_NESTED = 16 * FLOAT, 256 * FLOAT
_OPTIMIZER_BLOCK, _SMALLEST_8BIT = 256, 4096
_LOGIT_COPIES = 3  # float32: log-probabilities, their gradient, and one of the two on the way


class LinearGroup(Frozen):
    """Linear layers of one size that are treated alike; never the output head."""

    num_out: int
    num_in: int
    count: int
    is_quantized: bool
    has_adapter: bool

    @property
    def num_weights(self) -> int:
        """Weights of all layers of the group, without biases."""
        return self.count * self.num_out * self.num_in


class Shape(Frozen):
    """A model's sizes, and which of its layers are quantised and adapted."""

    architecture: str
    num_parameters: int
    """Tied ones once."""
    num_layers: int
    hidden: int
    intermediate: int
    attention_width: int
    """Heads times head size."""
    kv_width: int
    """Key/value heads times head size."""
    num_heads: int
    vocabulary: int
    tied: bool
    linears: tuple[LinearGroup, ...]


class Workload(Frozen):
    """What one forward and backward pass sees."""

    num_tokens: int
    """Of the largest micro-batch, padding included."""
    num_supervised: int
    """Of these; logits are computed for them alone."""
    checkpointing: bool
    compute_dtype: Literal["float32", "bfloat16", "float16"]
    dense_budget_bytes: int = 0
    """Room for dequantised weights that are kept while training (see `modeling.dense`)."""

    @property
    def compute_bytes(self) -> int:
        """Bytes of one number in the compute dtype."""
        return torch_dtype(self.compute_dtype).itemsize


class MemoryEstimate(Frozen):
    """Bytes on one device at the peak of a training step, by component."""

    strategy: Strategy
    weights: int
    """Frozen weights as stored; for full fine-tuning the trained ones."""
    constants: int
    """Scales and tables of the quantisation."""
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
    """Logits and loss at supervised positions (approximate)."""
    workspace: int
    """The largest layer's weight, dequantised for its product, and its input gradients."""
    dense: int = 0
    """4-bit weights kept dequantised, on a CPU (as far as the memory free at the start allows)."""
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


def shape_of(config: Any, quantization: QuantizationConfig, adapter: AdapterConfig) -> Shape:
    """Count a model's layers without loading or even allocating a weight.

    Args:
        config: A transformers configuration of a causal language model.
        quantization: Says which layers are quantised.
        adapter: Says which layers get an adapter.

    Raises:
        ConfigError: Targets or skipped modules match nothing.
    """
    with torch.device("meta"), quiet():
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    quantized, _ = layers_to_quantize(model, quantization)
    endings = tuple(target_endings(model, adapter))
    counts: dict[tuple[int, int, bool, bool], int] = {}
    for name, layer in linear_layers(model).items():
        num_out, num_in = _out_in(layer)
        has_adapter = name in endings or name.endswith(tuple(f".{e}" for e in endings))
        kind = (num_out, num_in, name in quantized, has_adapter)
        counts[kind] = counts.get(kind, 0) + 1
    num_heads = text.num_attention_heads
    num_kv_heads = getattr(text, "num_key_value_heads", None) or num_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // num_heads
    return Shape(
        architecture=type(model).__name__,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        attention_width=num_heads * head_size,
        kv_width=num_kv_heads * head_size,
        num_heads=num_heads,
        vocabulary=text.vocab_size,
        tied=bool(text.tie_word_embeddings),
        linears=tuple(
            LinearGroup(num_out=o, num_in=i, is_quantized=q, has_adapter=a, count=count)
            for (o, i, q, a), count in counts.items()
        ),
    )


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
        activations=_kept(shape, work, _full_layer_bytes(shape, work)),
        logits=_logits_bytes(shape, work),
        workspace=_input_gradient_bytes(shape, work),
    )


def quantized_bytes(num_out: int, num_in: int, quantization: QuantizationConfig) -> tuple[int, int]:
    """Return (weight, constants) bytes of one quantised (O, I) layer, as bitsandbytes holds it."""
    size = num_out * num_in
    if quantization.method == "int8":
        return size, FLOAT * num_out
    num_blocks = math.ceil(size / _BLOCK)
    packed = math.ceil(size / 2)
    if not quantization.double:
        return packed, FLOAT * num_blocks + _CODE_4BIT
    nested = FLOAT * math.ceil(num_blocks / _NESTED_BLOCK)
    offset = FLOAT
    return packed, num_blocks + nested + _CODE_NESTED + offset + _CODE_4BIT


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
    is_plain = quantization.method == "none"
    quantized = [] if is_plain else [group for group in shape.linears if group.is_quantized]
    stored = [(g.count, *quantized_bytes(g.num_out, g.num_in, quantization)) for g in quantized]
    left = shape.num_parameters - sum(group.num_weights for group in quantized)
    sizes = _adapter_sizes(shape, adapter)
    moments = optimizer_bytes(sizes, training.optimizer)
    is_4bit = quantization.method in ("nf4", "fp4")
    unpacked = work.compute_bytes * sum(group.num_weights for group in quantized) * is_4bit
    largest = max((g.num_out * g.num_in for g in quantized), default=0)
    return MemoryEstimate(
        strategy=strategy,
        weights=sum(count * weight for count, weight, _ in stored),
        constants=sum(count * constants for count, _, constants in stored),
        unquantized=work.compute_bytes * left,
        adapter=FLOAT * sum(sizes),
        gradients=FLOAT * sum(sizes),
        optimizer=moments,
        activations=_kept(shape, work, _adapted_layer_bytes(shape, adapter, work)),
        logits=_logits_bytes(shape, work),
        workspace=work.compute_bytes * largest + _input_gradient_bytes(shape, work),
        dense=min(unpacked, work.dense_budget_bytes),
        paged=moments if training.optimizer.startswith("paged") else 0,
    )


def _adapter_sizes(shape: Shape, adapter: AdapterConfig) -> list[int]:
    """Return the sizes of all trained tensors: A, B and DoRA's magnitude of each layer."""
    sizes = []
    for group in shape.linears:
        if group.has_adapter:
            layer = [adapter.rank * group.num_in, adapter.rank * group.num_out]
            sizes += (layer + ([group.num_out] if adapter.dora else [])) * group.count
    return sizes


def _adapted_layer_bytes(shape: Shape, adapter: AdapterConfig, work: Workload) -> float:
    """Return what autograd keeps of one layer and token, with a frozen base.

    Frozen products keep nothing. Norms keep their input in float32 (2 H); attention its queries,
    keys, values and output (2 A + 2 C) and a sum per head; the gated block gate, its activation and
    up (3 F). Adapters keep their inputs in float32: in float32 those of q, k and v are one tensor,
    and so are those of gate and up; in 16 bits each makes its own copy, as with dropout.
    """
    inputs = sum(g.count * g.num_in for g in shape.linears if g.has_adapter) / shape.num_layers
    num_adapted = sum(g.count for g in shape.linears if g.has_adapter) / shape.num_layers
    is_shared = work.compute_bytes == FLOAT and not adapter.dropout
    copies = min(inputs, 2 * shape.hidden + shape.intermediate) if is_shared else inputs
    mask = FLOAT if work.compute_bytes == FLOAT else 1  # a CPU keeps dropout's mask in float32
    masks = mask * inputs if adapter.dropout else 0
    return (
        FLOAT * (2 * shape.hidden + copies + adapter.rank * num_adapted + shape.num_heads + 2)
        + masks
        + work.compute_bytes * (_attention(shape) + 3 * shape.intermediate)
    )


def _full_layer_bytes(shape: Shape, work: Workload) -> float:
    """Return what autograd keeps of one layer and token when all weights are trained.

    As with a frozen base, and: normalised states for the gradients of norms (2 H), inputs of
    products (2 H and F; the output projection's input is attention's output).
    """
    in_float32 = FLOAT * (2 * shape.hidden + shape.num_heads + 2)
    kept = 4 * shape.hidden + _attention(shape) + 4 * shape.intermediate
    return in_float32 + work.compute_bytes * kept


def _attention(shape: Shape) -> int:
    return 2 * shape.attention_width + 2 * shape.kv_width


def _kept(shape: Shape, work: Workload, layer_bytes: float) -> int:
    """Return bytes for all layers: with checkpointing each keeps its input, and one is redone."""
    if not work.checkpointing:
        return round(work.num_tokens * shape.num_layers * layer_bytes)
    inputs = shape.num_layers * shape.hidden * work.compute_bytes
    return round(work.num_tokens * (inputs + layer_bytes))


def _logits_bytes(shape: Shape, work: Workload) -> int:
    """Return bytes for (k, V) logits, in the compute dtype and as the loss uses them in float32."""
    stored = work.compute_bytes if work.compute_bytes != FLOAT else 0
    return work.num_supervised * shape.vocabulary * (stored + FLOAT * _LOGIT_COPIES)


def _input_gradient_bytes(shape: Shape, work: Workload) -> int:
    """Return bytes of the gradients alive at once in the gated block: two of F, two of H."""
    return 2 * work.num_tokens * (shape.intermediate + shape.hidden) * work.compute_bytes


def _out_in(layer: Any) -> tuple[int, int]:
    if hasattr(layer, "in_features"):
        return layer.out_features, layer.in_features
    num_in, num_out = layer.weight.shape  # GPT-2's linear layer, which stores (I, O)
    return num_out, num_in
