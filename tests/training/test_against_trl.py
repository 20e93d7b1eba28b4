"""Our loop and TRL's trainer on the same rows: the same losses, step by step."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from qlora_core.backends.in_process import InProcessLauncher
from qlora_core.config import SnapshotConfig
from qlora_core.data.prepared import read_split
from qlora_core.modeling.loading import load_base
from qlora_core.modeling.lora import attach_adapter
from qlora_core.training.worker import plan_of

NUM_STEPS = 50


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.of_steps: list[float] = []

    def on_log(self, *_, logs, **__) -> None:
        if "loss" in logs:
            self.of_steps.append(float(logs["loss"]))


@pytest.fixture
def job(make_job):
    settings = {"schedule": "constant", "warmup": 0.0, "learning_rate": 5e-3, "micro_batch": 8}
    return make_job(epochs=1000.0, max_steps=NUM_STEPS, heldout_every=None, **settings)


def trl_losses(job, tokenizer, folder) -> list[float]:
    from trl import SFTConfig, SFTTrainer

    rows = read_split(job.data, "train")
    plan = plan_of(job, len(rows))
    order = np.concatenate([plan.rows(step) for step in range(1, NUM_STEPS + 1)])
    columns = {
        "input_ids": [rows.input_ids(i).tolist() for i in order],
        "labels": [rows.labels(i).tolist() for i in order],
    }
    ours = attach_adapter(load_base(job.base), job.adapter, job.seed)
    start = {name: p.detach().clone() for name, p in ours.named_parameters() if p.requires_grad}
    losses = Losses()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.base / "model", dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(folder),
            max_steps=NUM_STEPS,
            per_device_train_batch_size=job.training.global_batch,
            learning_rate=job.training.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=job.training.max_grad_norm,
            weight_decay=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            max_length=None,
            train_sampling_strategy="sequential",
        ),
        train_dataset=Dataset.from_dict(columns),
        processing_class=AutoTokenizer.from_pretrained(tokenizer),
        peft_config=ours.peft_config["default"],
        callbacks=[losses],
    )
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:  # TRL keeps the adapter of a 4-bit base in 16 bits
            parameter.data = start[name].clone()
    trainer.train()
    return losses.of_steps


def test_losses_are_those_of_trl_within_a_thousandth_over_50_steps(job, tiny_llama, tmp_path):
    ours = []
    InProcessLauncher(SnapshotConfig(every_s=1e9)).train(job, ours.append)

    theirs = trl_losses(job, tiny_llama, tmp_path)

    assert [step.loss for step in ours] == pytest.approx(theirs, abs=1e-3)
    assert theirs[-1] < theirs[0] - 0.5  # something was learnt, so the curves could have parted
    assert all(math.isfinite(loss) for loss in theirs)
