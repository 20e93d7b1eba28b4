"""transformers' Trainer with PEFT: padded, grouped by length, or rows flattened into one.

Flattened rows are told apart by their positions, from which transformers makes a block mask where
attention is torch's own (on a CPU, say).
"""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from benchmarks.training.gauge import Gauge
from benchmarks.training.systems.order import take_order
from benchmarks.training.systems.trainer import OnTrainer, arguments, dataset
from benchmarks.training.workload import Workload

SAMPLING = {
    "hf-padded": "sequential",
    "hf-grouped": "group_by_length",
    "hf-flattened": "sequential",
}


def main() -> None:
    """Train and report."""
    workload, gauge = take_order()
    with tempfile.TemporaryDirectory() as folder:
        train(workload, gauge, Path(folder))
    gauge.report()


def train(workload: Workload, gauge: Gauge, folder: Path) -> None:
    """Train ``gauge``'s steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(workload.model, device_map={"": device})
    model = PeftModel.from_pretrained(base, workload.adapter, is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(workload.model)
    if gauge.system == "hf-flattened":
        collator = DataCollatorWithFlattening()
    else:
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    args = TrainingArguments(
        **arguments(workload.settings, gauge, folder),
        train_sampling_strategy=SAMPLING[gauge.system],
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=dataset(workload),
        data_collator=collator,
        callbacks=[OnTrainer(gauge)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
