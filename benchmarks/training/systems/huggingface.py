"""transformers' Trainer with PEFT: padded, grouped by length, or rows flattened into one.

Flattened rows are told apart by their positions, from which transformers makes a block mask where
attention is torch's own (on a CPU, say).

Grouping sorts 50 batches at a time, so the first few hold the longest rows of 400, and say little
of an epoch. The batches measured here are those of transformers' own sampler, but spread evenly
over the first 50; the first step has the workload's first rows, as everywhere.
"""

from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks.training.gauge import Gauge
from benchmarks.training.systems.order import fulfil
from benchmarks.training.systems.trainer import OnTrainer, arguments, dataset
from benchmarks.training.workload import Workload, spread_evenly

_SORTED_AT_ONCE = 50  # batches; transformers' own number


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
        train_sampling_strategy="sequential",
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=_rows(workload, gauge),
        data_collator=collator,
        callbacks=[OnTrainer(gauge)],
    )
    trainer.train()


def _rows(workload: Workload, gauge: Gauge) -> Dataset:
    rows = dataset(workload)
    if gauge.system != "hf-grouped":
        return rows
    size, seed = workload.settings.global_batch, workload.settings.seed
    lengths = list(rows["length"])[size:]  # the first step has the longest rows of all
    order = get_length_grouped_indices(lengths, size, generator=torch.Generator().manual_seed(seed))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    num_chosen = gauge.num_all_steps - 1
    chosen = spread_evenly(min(len(batches), _SORTED_AT_ONCE), num_chosen) if num_chosen else []
    grouped = [size + row for place in chosen for row in batches[place]]
    return rows.select([*range(size), *grouped])


if __name__ == "__main__":
    fulfil(train)
