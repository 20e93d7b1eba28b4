"""What a process measures and reports: speed, memory, and how it was done."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from benchmarks.gpu.cases import Case
from benchmarks.gpu.processes import MARK
from qlora_core.training.memory import peak_memory_bytes


@dataclass(frozen=True)
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
    num_body: int
    """Frozen weights of the layers that each token is multiplied by."""
    num_head: int
    """Of the head."""
    micro_batch: int
    """Rows of a pass, at most, as it was trained in the end."""
    recomputes: bool
    """Whether activations were recomputed."""
    planned_bytes: int | None
    """The peak that was expected before the first step; none of systems that expect nothing."""
    is_fused: bool
    """Whether kernels for a GPU were used besides torch's."""
    notes: list[str]

    def report(self) -> None:
        """Print the measurement for the runner."""
        print(MARK + json.dumps(asdict(self)), flush=True)


@dataclass
class Watch:
    """Times the steps between the end of the warm-up and the last one, and says what was measured.

    Args:
        case: What is trained.
        sizes: Weights that a token is multiplied by, from `num_multiplied`.
    """

    case: Case
    sizes: tuple[int, int]
    num_done: int = 0
    peak_before: int = 0
    _start: float = 0.0
    seconds: float = 0.0

    @property
    def device(self) -> torch.device:
        """Where it is trained."""
        return torch.device(self.case.device)

    def begin(self) -> None:
        """Call before the first step, when the model is there."""
        self.peak_before = peak_memory_bytes(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def step_done(self) -> bool:
        """End a step; return whether it was the last one."""
        self.num_done += 1
        if self.num_done == self.case.num_warmup:
            self._start = _now(self.device)
        if self.num_done < self.case.num_warmup + self.case.num_steps:
            return False
        self.seconds = _now(self.device) - self._start
        return True

    def measurement(
        self,
        system: str,
        losses: list[float],
        *,
        micro_batch: int | None = None,
        recomputes: bool | None = None,
        planned_bytes: int | None = None,
        is_fused: bool = False,
        notes: Sequence[str] = (),
    ) -> Measurement:
        """Return what ``system`` did; what is not given is as the case says."""
        case, peak = self.case, peak_memory_bytes(self.device)
        num_body, num_head = self.sizes
        return Measurement(
            system=system,
            num_tokens=case.num_steps * case.global_batch * case.row_length,
            seconds=self.seconds,
            peak_bytes=peak,
            peak_ever_bytes=max(peak, self.peak_before),
            losses=losses,
            num_body=num_body,
            num_head=num_head,
            micro_batch=case.micro_batch if micro_batch is None else micro_batch,
            recomputes=case.saves_memory if recomputes is None else recomputes,
            planned_bytes=planned_bytes,
            is_fused=is_fused,
            notes=list(notes),
        )


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


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
