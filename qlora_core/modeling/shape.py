"""A model's sizes, counted without loading or even allocating a weight.

A transformers config is enough: the model is built on the `meta` device, which costs no memory, and
its layers are counted. So plans for 8B, 70B or 405B are made on a laptop.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from qlora_core.artifacts import Frozen
from qlora_core.config import AdapterConfig, QuantizationConfig
from qlora_core.errors import ModelError, QLoraError
from qlora_core.modeling.loading import quiet
from qlora_core.modeling.lora import linear_layers, target_endings
from qlora_core.modeling.quantization import layers_to_quantize


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


_LLAMA_31 = {
    "8b": (4096, 32, 14336, 32),
    "70b": (8192, 80, 28672, 64),
    "405b": (16384, 126, 53248, 128),
}
"""Hidden, layers, intermediate and heads of Llama 3.1, from the config.json that Meta publishes."""
PUBLISHED = tuple(_LLAMA_31)
"""Sizes that can be planned without a model at hand."""


def published_config(size: str) -> LlamaConfig:
    """Return the configuration of Llama 3.1 in one of the `PUBLISHED` sizes."""
    hidden, num_layers, intermediate, num_heads = _LLAMA_31[size]
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=num_layers,
        intermediate_size=intermediate,
        num_attention_heads=num_heads,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
    )


def shape_of(
    config: Any,
    quantization: QuantizationConfig,
    adapter: AdapterConfig,
    *,
    trusts_code: bool = False,
) -> Shape:
    """Count a model's layers without loading or even allocating a weight.

    Args:
        config: A transformers configuration of a causal language model.
        quantization: Says which layers are quantised.
        adapter: Says which layers get an adapter.
        trusts_code: The recipe lets code that the model brings be run.

    Raises:
        ConfigError: Targets or skipped modules match nothing.
        ModelError: The model's own code cannot be built without weights.
    """
    with _strangers_failures_told(trusts_code):
        with torch.device("meta"), quiet():
            # said either way: left open, transformers asks about code on stdin, and waits
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusts_code)
        return shape_of_model(model, quantization, adapter)


@contextmanager
def _strangers_failures_told(trusts_code: bool) -> Iterator[None]:
    """Turn what a stranger's code raises, which is anything, into a ModelError."""
    try:
        yield
    except QLoraError:
        raise
    except Exception as error:
        if not trusts_code:
            raise
        raise ModelError(
            "The model's sizes cannot be counted, as its own code does not build it without "
            "weights.",
            why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            fix="Run the recipe without a plan: workers load such a model without counting it.",
        ) from error


def shape_of_model(
    model: PreTrainedModel, quantization: QuantizationConfig, adapter: AdapterConfig
) -> Shape:
    """Count the layers of a model that is neither quantised nor adapted yet, as `shape_of` does."""
    config: Any = model.config
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


def _out_in(layer: Any) -> tuple[int, int]:
    if hasattr(layer, "in_features"):
        return layer.out_features, layer.in_features
    num_in, num_out = layer.weight.shape  # GPT-2's linear layer, which stores (I, O)
    return num_out, num_in
