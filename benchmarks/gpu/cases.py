"""The shapes that are measured, and what one process is told to measure.

Sizes are those of the published models' configurations; weights are random, so nothing needs to be
fetched. Speed and memory do not depend on what the weights are.
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

_LLAMA_2 = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}


def _llama_3(factor: float) -> dict[str, Any]:
    """Return what all of Llama 3.1 and 3.2 have in common."""
    return {
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": factor,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _LLAMA_2 | {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    },
    "1b": _llama_3(32.0) | {  # Llama-3.2-1B
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "7b": _LLAMA_2 | {  # Llama-2-7B
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "tie_word_embeddings": False,
    },
    "8b": _llama_3(8.0) | {  # Llama-3.1-8B
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Of `LlamaConfig`, by name."""

RANK, ALPHA, SEED = 16, 32, 0
LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class Case:
    """What a system trains."""

    shape: str
    device: str
    dtype: str
    row_length: int
    """Tokens of a row; all rows are full, as after packing."""
    global_batch: int
    """Rows of an optimizer step."""
    micro_batch: int
    """Rows of a forward pass to begin with; halved until they fit."""
    num_warmup: int
    num_steps: int
    saves_memory: bool = False
    """As on a small GPU: recomputed activations, paged 8-bit moments, no dequantised weights."""

    @property
    def name(self) -> str:
        """Shape, rows of a step and their length."""
        return f"{self.shape} {self.global_batch} x {self.row_length}"

    def halved(self) -> "Case":
        """Return the same work in smaller passes."""
        return replace(self, micro_batch=self.micro_batch // 2)

    def to_text(self) -> str:
        """Return what `from_text` reads."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(text: str) -> "Case":
        """Return the case that `to_text` wrote."""
        return Case(**json.loads(text))
