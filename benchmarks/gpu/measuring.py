"""What a process measures and reports: speed, memory, and how it was done."""

import importlib.metadata
import json
import sys
import time
from dataclasses import asdict, dataclass, field

import torch

from qlora_core.training.memory import peak_memory_bytes

MARK, TOO_LARGE = "MEASURED ", "TOO LARGE"
"""Beginnings of the lines by which a process reports."""
_PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "triton", "liger-kernel", "accelerate", "trl",
    "pydantic", "numpy",
)  # fmt: skip


@dataclass
class Measurement:
    """What one system did in one process."""

    system: str
    num_tokens: int
    """In the measured steps."""
    seconds: float
    peak_bytes: int
    """Most memory that tensors held while training (on a CPU: that the process ever had)."""
    peak_ever_bytes: int
    """The same from the start of the process, building the model included."""
    losses: list[float]
    """Of every step, warm-up included."""
    num_multiplied: int
    """Frozen weights that each token is multiplied by."""
    micro_batch: int
    recomputes: bool
    """Whether activations were recomputed."""
    notes: list[str] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """All rows are full, so every token is one."""
        return self.num_tokens / self.seconds

    @property
    def flops(self) -> float:
        """FLOP per second that were needed: 4 for each weight and token, 6 where recomputed."""
        return (6 if self.recomputes else 4) * self.num_multiplied * self.tokens_per_s

    def report(self) -> None:
        """Print the measurement for the runner."""
        print(MARK + json.dumps(asdict(self)), flush=True)


@dataclass
class Watch:
    """Times the steps between the end of the warm-up and the last one."""

    device: torch.device
    num_warmup: int
    num_steps: int
    num_done: int = 0
    peak_before: int = 0
    _start: float = 0.0
    seconds: float = 0.0

    def begin(self) -> None:
        """Call before the first step, when the model is there."""
        self.peak_before = peak_memory_bytes(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def step_done(self) -> bool:
        """End a step; return whether it was the last one."""
        self.num_done += 1
        if self.num_done == self.num_warmup:
            self._start = _now(self.device)
        if self.num_done < self.num_warmup + self.num_steps:
            return False
        self.seconds = _now(self.device) - self._start
        return True


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP per second of the best of several large products."""
    size, num_products, num_trials = (8192, 10, 5) if device.type == "cuda" else (512, 3, 3)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    torch.mm(left, right, out=out)
    best = 0.0
    for _ in range(num_trials):
        start = _now(device)
        for _ in range(num_products):
            torch.mm(left, right, out=out)
        best = max(best, 2.0 * size**3 * num_products / (_now(device) - start))
    return best


def versions() -> dict[str, str]:
    """Return the versions of the packages that matter, as far as they are installed."""
    found = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
