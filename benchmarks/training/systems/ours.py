"""Our own engine: `qlora_core.training.worker.run_worker`, as a worker of a real run calls it.

Nothing is left out: snapshots (none is due so soon), the journal and the look at the first rows are
part of it. It is stopped right after the last measured step, as held-out rows would come next.
"""

from pathlib import Path

import torch

from benchmarks.training.gauge import Count, Gauge
from benchmarks.training.systems.order import fulfil
from benchmarks.training.workload import Row, Workload
from qlora_core.config import (
    AdapterConfig,
    QuantizationConfig,
    SnapshotConfig,
    TrainingConfig,
)
from qlora_core.ports import StepMetrics, TrainJob
from qlora_core.training.attempt import next_launch
from qlora_core.training.comm import Alone
from qlora_core.training.worker import run_worker


class Enough(Exception):  # noqa: N818
    """All that is measured has been trained."""


def train(workload: Workload, gauge: Gauge, folder: Path) -> None:
    """Train ``gauge``'s steps."""
    job = _job(workload, gauge.num_all_steps + 1, folder)
    steps = workload.steps(gauge.num_all_steps)

    def on_step(metrics: StepMetrics) -> None:
        gauge.losses.append(metrics.loss)
        if gauge.step_done(_count(metrics, steps[metrics.step - 1])):
            raise Enough

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        run_worker(job, Alone(), SnapshotConfig(), next_launch(job.scratch), device, on_step)
    except Enough:
        gauge.notes += (job.scratch / "notes.txt").read_text("utf-8").splitlines()


def _job(workload: Workload, num_steps: int, folder: Path) -> TrainJob:
    settings = workload.settings
    return TrainJob(
        base=workload.folder / "base",
        data=workload.folder / "data",
        out=folder / "out",
        scratch=folder / "scratch",
        quantization=QuantizationConfig.model_validate({"compute_dtype": settings.compute_dtype}),
        adapter=AdapterConfig(rank=settings.rank, alpha=settings.alpha),
        training=TrainingConfig(
            max_steps=num_steps,
            epochs=1000,
            global_batch=settings.global_batch,
            micro_batch=settings.micro_batch,
            learning_rate=settings.learning_rate,
            max_grad_norm=settings.max_grad_norm,
            schedule="constant",
            warmup=0.0,
        ),
        seed=settings.seed,
    )


def _count(metrics: StepMetrics, rows: list[Row]) -> Count:
    return Count(
        num_tokens=metrics.num_tokens,
        num_supervised=metrics.num_supervised_tokens,
        num_processed=metrics.num_computed_tokens,
        checksum=sum(sum(row.input_ids) for row in rows),
    )


if __name__ == "__main__":
    fulfil(train)
