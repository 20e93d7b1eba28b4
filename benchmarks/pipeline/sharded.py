"""A made-up model of several files, and what merging needs besides: adapter and held-out rows.

A random Llama of 0.8 billion weights in bfloat16, written tensor by tensor into files of 200 MB.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_core.config import AdapterConfig
from qlora_core.data.prepared import IGNORED, TokenRow, write_split
from qlora_core.modeling.loading import load_base
from qlora_core.modeling.lora import attach_adapter, save_adapter
from qlora_core.modeling.weights import ModelWeights, TensorInfo, write_checkpoint

SHARD_BYTES = 200_000_000
_RANK = 8
_NUM_ROWS, _LENGTH = 4, 24


@dataclasses.dataclass(frozen=True)
class Size:
    """Of the model; the vocabulary is SmolLM2's, whose tokenizer it gets."""

    num_layers: int = 48
    hidden: int = 1024
    intermediate: int = 4096
    vocabulary: int = 49_152

    def config(self) -> LlamaConfig:
        """Return transformers' configuration."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.num_layers,
            num_attention_heads=16,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            dtype="bfloat16",
        )


def write_model(folder: Path, size: Size, shard_bytes: int = SHARD_BYTES) -> int:
    """Write the model's weights and configuration; return how many files they fill."""
    config = size.config()
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        names = ModelWeights(LlamaForCausalLM(config)).infos()
    infos = {name: TensorInfo(info.shape, torch.bfloat16) for name, info in names.items()}
    source = torch.Generator().manual_seed(0)

    def made(name: str) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(infos[name].shape, dtype=torch.bfloat16)
        return (torch.randn(infos[name].shape, generator=source) * 0.02).to(torch.bfloat16)

    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    return write_checkpoint(folder, infos, made, max_shard_bytes=shard_bytes).num_shards


def write_adapter(base: Path, folder: Path) -> None:
    """Write an adapter that changes every linear layer of ``base`` a little."""
    adapted = attach_adapter(load_base(base), AdapterConfig(rank=_RANK), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    save_adapter(adapted, folder, "base", None)


def write_rows(folder: Path) -> None:
    """Write held-out rows of random tokens."""
    source = np.random.default_rng(0)
    rows = [source.integers(0, 40_000, _LENGTH).tolist() for _ in range(_NUM_ROWS)]
    half = _LENGTH // 2
    folder.mkdir(parents=True, exist_ok=True)
    write_split(folder, "heldout", [TokenRow(r, [IGNORED] * half + r[half:]) for r in rows])
