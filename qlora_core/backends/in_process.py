"""Train in this very process, alone: for notebooks and tests."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from qlora_core.config import SnapshotConfig
from qlora_core.ports import StepMetrics, TrainJob
from qlora_core.training.attempt import next_launch
from qlora_core.training.comm import Alone
from qlora_core.training.worker import run_worker


@dataclass(frozen=True)
class InProcessLauncher:
    """One worker, here; on the GPU if there is one."""

    snapshots: SnapshotConfig

    def awake(self) -> AbstractContextManager[None]:
        """Do nothing: all that is needed is here."""
        return nullcontext()

    def train(self, job: TrainJob, on_step: Callable[[StepMetrics], None]) -> None:
        """Run ``job`` to its end, calling ``on_step`` once for each step, in order."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        launch = next_launch(job.scratch)
        run_worker(job, Alone(), self.snapshots, launch, device, on_step)
