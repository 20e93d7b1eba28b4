"""What all systems built on transformers' Trainer share: settings, data, and the gauge on it."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from benchmarks.training.gauge import Gauge
from benchmarks.training.workload import Settings, Workload


class OnTrainer(TrainerCallback):  # type: ignore[misc]
    """Tells a gauge what a Trainer does."""

    def __init__(self, gauge: Gauge) -> None:
        self.gauge = gauge

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        self.gauge.attach(model)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.gauge.step_done()

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        if "loss" in logs:
            self.gauge.losses.append(float(logs["loss"]))


def arguments(settings: Settings, gauge: Gauge, folder: Path) -> dict[str, Any]:
    """Return keyword arguments for TrainingArguments and what is derived from it."""
    return {
        "output_dir": str(folder),
        "max_steps": gauge.num_all_steps,
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": settings.num_accumulated,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": settings.max_grad_norm,
        "weight_decay": 0.0,
        "seed": settings.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        # all systems keep their activations: they fit, and recomputing them costs a quarter
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def dataset(workload: Workload) -> Dataset:
    """Return all rows in order, with labels and lengths."""
    rows = workload.rows()
    return Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in rows],
            "labels": [row.labels for row in rows],
            "length": [len(row.input_ids) for row in rows],
        }
    )
