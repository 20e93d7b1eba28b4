"""LLaMA-Factory's preparation: its own `get_dataset`, as its supervised fine-tuning calls it.

Its template of the model's family writes the same text as the tokenizer's own chat template. The
part that tokenises is the function that it maps over the rows once they are aligned.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.pipeline.preparers.order import Order, Prepared, fulfil
from benchmarks.training.systems.llama_factory import do_without_audio

_TEMPLATE = "smollm2"


def prepare(order: Order, found: Prepared, folder: Path) -> None:
    """Prepare the rows."""
    do_without_audio()
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer, loader
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    _describe(order, folder)
    model_args, data_args, training_args, _, _ = get_train_args(_arguments(order, folder))
    mapped = loader._get_preprocessed_dataset

    def timed(dataset: Any, *args: Any, **options: Any) -> Any:
        if dataset is None:
            return None
        found.num_rows = len(dataset)
        with found.timed("tokenise"):
            return mapped(dataset, *args, **options)

    loader._get_preprocessed_dataset = timed
    with found.timed("stage"):
        tokenizer = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(tokenizer["tokenizer"], data_args)
        rows = get_dataset(
            template, model_args, data_args, training_args, stage="sft", **tokenizer
        )["train_dataset"]
    found.num_tokens = sum(len(row) for row in rows["input_ids"])
    found.num_supervised = sum(sum(label >= 0 for label in row) for row in rows["labels"])


def _describe(order: Order, folder: Path) -> None:
    shutil.copyfile(order.rows, folder / "rows.jsonl")
    columns = {"prompt": "question", "response": "answer"}
    info = {"rows": {"file_name": "rows.jsonl", "formatting": "alpaca", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info), "utf-8")


def _arguments(order: Order, folder: Path) -> dict[str, Any]:
    return {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(order.model),
        "finetuning_type": "lora",
        "dataset": "rows",
        "dataset_dir": str(folder),
        "cache_dir": str(folder / "cache"),
        "template": _TEMPLATE,
        "cutoff_len": order.max_length,
        "packing": order.is_packed,
        "neat_packing": order.is_packed,
        "preprocessing_num_workers": order.num_processes,
        "overwrite_cache": True,
        "output_dir": str(folder / "out"),
        "report_to": "none",
        "use_cpu": True,
    }


if __name__ == "__main__":
    fulfil(prepare)
