"""Memory that training used, and whether activations will fit.

On a CPU the peak is the kernel's own high-water mark of resident memory (`VmHWM`), which counts
from the start of this program; `ru_maxrss` also remembers the parent's from before it.
"""

import resource
import sys
from pathlib import Path
from typing import Any

import torch

_BYTES_PER_ACTIVATION = 4
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


def activations_fit(config: Any, num_tokens: int, device: torch.device) -> bool:
    """Say whether a GPU has room for the activations of ``num_tokens`` without recomputing them.

    Args:
        config: The model's transformers configuration.
        num_tokens: Of the largest micro-batch, padding included.
        device: The GPU, with the model already on it.
    """
    return spare_bytes(config, num_tokens, device) > 0


def spare_bytes(config: Any, num_tokens: int, device: torch.device) -> int:
    """Return what a GPU has left beside the activations of ``num_tokens``; negative if too little.

    Args:
        config: The model's transformers configuration.
        num_tokens: Of the largest micro-batch, padding included.
        device: The GPU, with the model already on it.

    Counted for each layer: the inputs of its products, norms and attention (about 10 hidden
    states) and of its feed-forward block (about 4 intermediate ones).
    """
    text = config.get_text_config()
    hidden = text.hidden_size
    intermediate = getattr(text, "intermediate_size", None) or 4 * hidden
    per_token = (10 * hidden + 4 * intermediate) * text.num_hidden_layers * _BYTES_PER_ACTIVATION
    free, _ = torch.cuda.mem_get_info(device)
    return int(_SHARE_OF_FREE_MEMORY * free - num_tokens * per_token)
