"""Counts and times what a system trains, from inside its process, the same way for all of them.

A hook on the model sees every forward pass: how many tokens go in, how many of them are padding
(the workload's padding token occurs in no row), how many are supervised. The clocks run from the
end of the last warm-up step to the end of the last step. CPU seconds are those of all threads of
the process: on a shared machine they are stable, where wall time is not.
"""

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.record import versions
from benchmarks.training.workload import IGNORED

MARK = "MEASURED "
"""The line of a system's output that begins with it is its measurement."""


@dataclass
class Count:
    """What went through the model in one optimizer step."""

    num_tokens: int = 0
    """Without padding."""
    num_supervised: int = 0
    num_processed: int = 0
    """With padding; without what is computed for several rows at once."""
    checksum: int = 0
    """Sum of the tokens' numbers: tells steps on the same rows from others."""


@dataclass(frozen=True)
class Measurement:
    """What a system reports: sums are over the measured steps, warm-up excluded."""

    system: str
    num_tokens: int
    num_supervised: int
    num_processed: int
    wall_s: float
    cpu_s: float
    peak_memory_bytes: int
    losses: list[float]
    """Of every step, warm-up included: mean over its supervised tokens [nats]."""
    checksums: list[int]
    """Of every step, warm-up included."""
    versions: dict[str, str]
    notes: list[str] = field(default_factory=list)


@dataclass
class Gauge:
    """Watches one system.

    Args:
        system: Its name.
        pad_id: The padding token.
        num_warmup: Steps before the clocks start.
        num_steps: Steps measured.
    """

    system: str
    pad_id: int
    num_warmup: int
    num_steps: int
    notes: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    _counts: list[Count] = field(default_factory=list)
    _current: Count = field(default_factory=Count)
    _start: tuple[float, float] = (0.0, 0.0)
    _seconds: tuple[float, float] = (0.0, 0.0)

    @property
    def num_all_steps(self) -> int:
        """Steps to train, warm-up included."""
        return self.num_warmup + self.num_steps

    def attach(self, model: Any) -> None:
        """Count what goes into every later training pass of ``model``."""

        def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training:
                ids_BT = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
                self.count(ids_BT, kwargs.get("labels"))

        model.register_forward_pre_hook(look, with_kwargs=True)

    def count(self, ids_BT: Any, labels_BT: Any) -> None:
        """Count one forward pass."""
        is_real_BT = ids_BT != self.pad_id
        now = self._current
        now.num_processed += ids_BT.numel()
        now.num_tokens += int(is_real_BT.sum())
        now.checksum += int((ids_BT * is_real_BT).sum())
        if labels_BT is not None:
            now.num_supervised += int((labels_BT[..., 1:] != IGNORED).sum())

    def step_done(self, count: Count | None = None) -> bool:
        """End an optimizer step; return whether it was the last one.

        Args:
            count: What was in it, where no hook has counted.
        """
        self._counts.append(count or self._current)
        self._current = Count()
        _wait_for_gpu()
        now = time.monotonic(), time.process_time()
        if len(self._counts) == self.num_warmup:
            self._start = now
        if len(self._counts) == self.num_all_steps:
            self._seconds = now[0] - self._start[0], now[1] - self._start[1]
            return True
        return False

    def measurement(self) -> Measurement:
        """Return what was measured.

        Raises:
            RuntimeError: There were fewer steps than wanted.
        """
        if len(self._counts) < self.num_all_steps:
            raise RuntimeError(f"{len(self._counts)} of {self.num_all_steps} steps were trained")
        measured = self._counts[self.num_warmup : self.num_all_steps]
        return Measurement(
            system=self.system,
            num_tokens=sum(count.num_tokens for count in measured),
            num_supervised=sum(count.num_supervised for count in measured),
            num_processed=sum(count.num_processed for count in measured),
            wall_s=self._seconds[0],
            cpu_s=self._seconds[1],
            peak_memory_bytes=peak_memory_bytes(),
            losses=self.losses[: self.num_all_steps],
            checksums=[count.checksum for count in self._counts[: self.num_all_steps]],
            versions=versions(),
            notes=self.notes,
        )

    def report(self) -> None:
        """Print the measurement, for the runner to find."""
        print(MARK + json.dumps(asdict(self.measurement())), flush=True)


def _wait_for_gpu() -> None:
    """Let a GPU end what it was given: its work runs behind the calls, and clocks must not."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """Return the most memory this process used: allocated on a GPU, else resident.

    As `qlora_core.training.memory` does, and again on purpose: what peers' environments import must
    need nothing of qlora_core's.
    """
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
