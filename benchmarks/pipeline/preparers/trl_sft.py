"""TRL's preparation: what SFTTrainer does to a conversational prompt-completion dataset.

It is called without a trainer around it, which would want a model; it needs three of its fields.
"""

import types
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from benchmarks.pipeline.preparers.order import Order, Prepared, fulfil


def prepare(order: Order, found: Prepared, folder: Path) -> None:
    """Prepare the rows."""
    args = SFTConfig(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        bf16=False,
        packing=order.is_packed,
        max_length=order.max_length,
        dataset_num_proc=order.num_processes,
    )
    with found.timed("stage"):
        tokenizer = AutoTokenizer.from_pretrained(order.model)
        trainer = types.SimpleNamespace(
            _tokenizer=tokenizer, chat_template=None, completion_only_loss=True
        )
        chats = _chats(order, folder)
        with found.timed("tokenise"):
            rows = SFTTrainer._prepare_dataset(
                trainer, chats, tokenizer, args, order.is_packed, None, "train"
            )
    found.num_rows = len(chats)
    found.num_tokens = sum(len(row) for row in rows["input_ids"])
    found.num_supervised = sum(sum(label >= 0 for label in row) for row in rows["labels"])


def _chats(order: Order, folder: Path) -> Dataset:
    loaded = load_dataset(
        "json", data_files=str(order.rows), split="train", cache_dir=str(folder / "cache")
    )
    return loaded.map(_as_chat, remove_columns=["question", "answer"], num_proc=order.num_processes)


def _as_chat(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": row["question"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }


if __name__ == "__main__":
    fulfil(prepare)
