"""Our engine: the worker's own parts, on a model that was never a file."""

from pathlib import Path

import torch

from benchmarks.gpu.building import num_multiplied, random_model
from benchmarks.gpu.cases import ALPHA, LEARNING_RATE, RANK, SEED, Case
from benchmarks.gpu.measuring import Measurement, Watch
from benchmarks.gpu.rows import random_rows
from qlora_core.config import AdapterConfig, QuantizationConfig, TrainingConfig
from qlora_core.modeling.lora import attach_adapter
from qlora_core.ports import TrainJob
from qlora_core.training.comm import Alone
from qlora_core.training.loop import Position, train
from qlora_core.training.worker import assemble, fast_paths


def measure(case: Case) -> Measurement:
    """Train the steps of ``case``."""
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    base = random_model(case.shape, device, dtype, SEED)
    watch, losses = Watch(case, num_multiplied(base)), []
    job = job_of(case)
    model = attach_adapter(base, job.adapter, SEED)
    # held-out rows are measured after the last step, so more are planned than are measured
    num_rows = case.global_batch * (case.num_warmup + case.num_steps + 1)
    vocabulary = base.config.vocab_size
    rows = random_rows(num_rows, case.row_length, vocabulary, SEED)
    heldout = random_rows(1, case.row_length, vocabulary, SEED + 1)
    notes: list[str] = []
    run = assemble(job, model, (rows, heldout), Alone(), device, notes)
    watch.begin()
    with fast_paths(run) as fast:
        for metrics in train(fast, Position()):
            losses.append(metrics.loss)
            if watch.step_done():
                break
    return watch.measurement(
        "ours",
        losses,
        micro_batch=min(case.micro_batch, run.room.num_rows),  # passes that did not fit were halved
        recomputes=run.room.recompute != "nothing",
        planned_bytes=run.room.estimate.total,
        is_fused=bool(run.loss.kernels.names),
        notes=notes,
    )


def job_of(case: Case) -> TrainJob:
    """Return the job that a recipe of these settings would make; none of its files is read."""
    nowhere = Path()
    return TrainJob(
        base=nowhere,
        data=nowhere,
        out=nowhere,
        scratch=nowhere,
        quantization=QuantizationConfig(
            compute_dtype=case.dtype, keep_dequantized="off" if case.saves_memory else "auto"
        ),
        adapter=AdapterConfig(rank=RANK, alpha=ALPHA),
        training=TrainingConfig(
            epochs=1.0,
            global_batch=case.global_batch,
            micro_batch=case.micro_batch,
            learning_rate=LEARNING_RATE,
            schedule="constant",
            warmup=0.0,
            checkpointing="on" if case.saves_memory else "auto",
            optimizer="paged_adamw_8bit" if _pages(case) else "adamw",
        ),
        seed=SEED,
    )


def _pages(case: Case) -> bool:
    return case.saves_memory and case.device.startswith("cuda")
