"""LLaMA-Factory's supervised fine-tuning: padded, or with neat_packing.

It is run as its command line runs it, on a dataset whose questions are only row numbers: encoding a
row then returns the workload's tokens, so templates cannot differ; packing, collating and training
are its own.
"""

import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

from benchmarks.training.gauge import Gauge
from benchmarks.training.systems.order import fulfil
from benchmarks.training.workload import Row, Workload


def train(workload: Workload, gauge: Gauge, folder: Path) -> None:
    """Train ``gauge``'s steps."""
    if do_without_audio():
        gauge.notes.append("torchaudio is not there for this build of torch; text needs none.")
    from llamafactory.train.tuner import run_exp

    from benchmarks.training.systems.trainer import OnTrainer, arguments

    _give_rows(workload.rows(), folder)
    settings = workload.settings
    is_packed = gauge.system == "llama-factory-neat"
    asked = arguments(settings, gauge, folder / "out") | {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(workload.model),
        "adapter_name_or_path": str(workload.adapter),
        "finetuning_type": "lora",
        "dataset": "rows",
        "dataset_dir": str(folder),
        "template": "empty",
        "cutoff_len": settings.pack_length if is_packed else settings.longest + 1,
        "packing": is_packed,
        "neat_packing": is_packed,
        "flash_attn": "sdpa",
        "disable_shuffling": not is_packed,  # packs are sorted by their longest row
        "disable_gradient_checkpointing": True,
        "overwrite_cache": True,
    }
    del asked["gradient_checkpointing"]
    if is_packed:
        asked["per_device_train_batch_size"] = settings.num_packs
    run_exp(asked, callbacks=[OnTrainer(gauge)])


def _give_rows(rows: list[Row], folder: Path) -> None:
    from llamafactory.data.processor.supervised import SupervisedDatasetProcessor

    def encode(_: Any, prompt: list[dict[str, str]], **__: Any) -> tuple[list[int], list[int]]:
        row = rows[int(prompt[-1]["content"])]
        return row.input_ids, row.labels

    SupervisedDatasetProcessor._encode_data_example = encode
    numbers = [
        {"instruction": str(number), "input": "", "output": "-"} for number in range(len(rows))
    ]
    (folder / "rows.json").write_text(json.dumps(numbers), "utf-8")
    info = {"rows": {"file_name": "rows.json", "formatting": "alpaca"}}
    (folder / "dataset_info.json").write_text(json.dumps(info), "utf-8")


def do_without_audio() -> bool:
    """Stand in for torchaudio, which it imports, where there is none for this build of torch."""
    if importlib.util.find_spec("torchaudio") is not None:
        return False
    stand_in = types.ModuleType("torchaudio")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = stand_in
    return True


if __name__ == "__main__":
    fulfil(train)
