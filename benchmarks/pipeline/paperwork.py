"""What a training step spends on journal, tracking and snapshots, in a worker of a real run.

    python -m benchmarks.pipeline.paperwork --workload FOLDER --steps 6

Rank 0's desk is timed step by step, with its files on a real disk, and what is told goes into the
journal that MLflow is fed from. A snapshot is due every minute, more seldom than a step, and at the
end; they are timed apart, and their seconds divided over that minute.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
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
    """Notes what calls take: wall seconds, and CPU seconds of the thread that calls."""

    def __init__(self) -> None:
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []

    def around(
        self, call: Callable[..., Any], apart: "Stopwatch | None" = None
    ) -> Callable[..., Any]:
        """Return ``call``, timed; without what ``apart`` times inside of it."""

        def timed(*args: Any) -> Any:
            before = _now(apart)
            try:
                return call(*args)
            finally:
                after = _now(apart)
                self.wall_s.append(after[0] - before[0])
                self.cpu_s.append(after[1] - before[1])

        return timed


def _now(apart: Stopwatch | None) -> tuple[float, float]:
    """Return wall and CPU clock, both standing still while ``apart`` is timing."""
    wall, cpu = time.perf_counter(), time.thread_time()
    return (wall, cpu) if apart is None else (wall - sum(apart.wall_s), cpu - sum(apart.cpu_s))


def measure(workload: Path, num_steps: int) -> dict[str, Any]:
    """Train ``num_steps`` steps; return the seconds of each, and of the desk's part."""
    record, tell, save = Stopwatch(), Stopwatch(), Stopwatch()
    setattr(SnapshotWriter, "save", save.around(SnapshotWriter.save))  # noqa: B010  # see below
    setattr(Desk, "record", record.around(Desk.record, apart=save))  # noqa: B010
    setattr(Desk, "tell", tell.around(Desk.tell))  # noqa: B010  # mypy knows methods as constant
    snapshots, steps, used = SnapshotConfig(), [], []
    with tempfile.TemporaryDirectory(dir=workload) as folder:
        journal = Journal(Path(folder) / "journal")

        def on_step(metrics: StepMetrics) -> None:
            steps.append(metrics.seconds)
            used.append(time.process_time())
            journal.append(MetricsRecord(values=tracked_metrics(metrics), step=metrics.step))

        job = _job(workload, num_steps, Path(folder))
        launch = next_launch(job.scratch)
        run_worker(job, Alone(), snapshots, launch, torch.device("cpu"), on_step)
    each = slice(1, -1)  # its first word comes before the first step, its last after the last one
    return {
        "step_s": steps,
        "step_cpu_s": [after - before for before, after in pairwise(used)],
        "desk_s": [a + b for a, b in zip(record.wall_s, tell.wall_s[each], strict=True)],
        "desk_cpu_s": [a + b for a, b in zip(record.cpu_s, tell.cpu_s[each], strict=True)],
        "snapshot_s": sum(save.wall_s) / len(save.wall_s),
        "snapshot_cpu_s": sum(save.cpu_s) / len(save.cpu_s),
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
