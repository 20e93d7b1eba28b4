"""What a training step spends on journal, tracking and snapshots, in a worker of a real run.

    python -m benchmarks.pipeline.paperwork --workload FOLDER --steps 6

Rank 0's desk is timed step by step, with its files on a real disk, and what is told goes into the
journal that MLflow is fed from. A snapshot is due every minute, far more seldom than a step: one is
written at the end, and its seconds are divided over that minute.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.pipeline.preparers.order import MARK
from qlora_core.backends.journal import Journal, MetricsRecord
from qlora_core.config import AdapterConfig, QuantizationConfig, SnapshotConfig, TrainingConfig
from qlora_core.ports import StepMetrics, TrainJob
from qlora_core.stages.train import tracked_metrics
from qlora_core.training.attempt import next_launch
from qlora_core.training.comm import Alone
from qlora_core.training.desk import Desk
from qlora_core.training.snapshot import SnapshotWriter
from qlora_core.training.worker import run_worker


class Stopwatch:
    """Adds up the seconds of calls."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``call``, timed."""

        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.seconds.append(time.perf_counter() - started)

        return timed


def measure(workload: Path, num_steps: int) -> dict[str, Any]:
    """Train ``num_steps`` steps; return the seconds of each, and of the desk's part."""
    record, tell, save = Stopwatch(), Stopwatch(), Stopwatch()
    for owner, name, watch in (
        (Desk, "record", record), (Desk, "tell", tell), (SnapshotWriter, "save", save)
    ):  # fmt: skip
        setattr(owner, name, watch.around(getattr(owner, name)))
    snapshots, steps = SnapshotConfig(), []
    with tempfile.TemporaryDirectory(dir=workload) as folder:
        journal = Journal(Path(folder) / "journal")

        def on_step(metrics: StepMetrics) -> None:
            steps.append(metrics.seconds)
            journal.append(MetricsRecord(values=tracked_metrics(metrics), step=metrics.step))

        job = _job(workload, num_steps, Path(folder))
        launch = next_launch(job.scratch)
        run_worker(job, Alone(), snapshots, launch, torch.device("cpu"), on_step)
    # the desk's first word comes before the first step, and the last record holds the snapshot
    desk = [a + b for a, b in zip(record.seconds, tell.seconds[1:], strict=True)]
    desk[-1] -= save.seconds[-1]
    return {
        "step_s": steps,
        "desk_s": desk,
        "snapshot_s": save.seconds[-1],
        "snapshot_every_s": snapshots.every_s,
    }


def _job(workload: Path, num_steps: int, folder: Path) -> TrainJob:
    training = TrainingConfig(max_steps=num_steps, epochs=1000, global_batch=8, micro_batch=8)
    return TrainJob(
        base=workload / "base",
        data=workload / "data",
        out=folder / "out",
        scratch=folder / "scratch",
        quantization=QuantizationConfig(),
        adapter=AdapterConfig(rank=16, alpha=32),
        training=training,
        seed=0,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6)
    given = parser.parse_args()
    print(MARK + json.dumps(measure(given.workload, given.steps)), flush=True)
