"""Memory that training used, and whether activations will fit.

On a CPU the peak is the kernel's own high-water mark of resident memory (`VmHWM`), which counts
from the start of this program; `ru_maxrss` also remembers the parent's from before it.
"""

import resource
import sys
from pathlib import Path
from typing import Any

import torch

_SHARE_OF_FREE_MEMORY = 0.7  # the rest: logits, the optimizer, fragmentation


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process used so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def activations_fit(config: Any, num_tokens: int, device: torch.device, *, is_fused: bool) -> bool:
    """Say whether a GPU has room for the activations of ``num_tokens`` without recomputing them.

    Args:
        config: The model's transformers configuration.
        num_tokens: Of the largest micro-batch, padding included.
        device: The GPU, with the model already on it.
        is_fused: See `bytes_per_token`.
    """
    return spare_bytes(config, num_tokens, device, is_fused=is_fused) > 0


def spare_bytes(config: Any, num_tokens: int, device: torch.device, *, is_fused: bool) -> int:
    """Return what a GPU has left beside the activations of ``num_tokens``; negative if too little.

    Args:
        config: The model's transformers configuration.
        num_tokens: Of the largest micro-batch, padding included.
        device: The GPU, with the model already on it.
        is_fused: See `bytes_per_token`.
    """
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    usable = _SHARE_OF_FREE_MEMORY * (free + cached)
    return int(usable - num_tokens * bytes_per_token(config, is_fused=is_fused))


def bytes_per_token(config: Any, *, is_fused: bool) -> int:
    """Return what a token of a micro-batch leaves for the backward pass, all layers together.

    Counted for each layer: the inputs of its norms, of attention and of its products (about 11
    hidden states), and of its feed-forward block gate and up.

    Args:
        config: The model's transformers configuration.
        is_fused: Adapters are computed by `qlora_core.modeling.fusing`, in the model's dtype. PEFT
            keeps copies in float32, and of the feed-forward block the activation and the product.
    """
    text = config.get_text_config()
    hidden, dtype = text.hidden_size, getattr(config, "dtype", None)
    intermediate = getattr(text, "intermediate_size", None) or 4 * hidden
    if is_fused and isinstance(dtype, torch.dtype):
        numbers, size = 11 * hidden + 2 * intermediate, dtype.itemsize
    else:
        numbers, size = 10 * hidden + 4 * intermediate, torch.float32.itemsize
    return int(numbers * text.num_hidden_layers * size)
