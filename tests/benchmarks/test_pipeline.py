"""The made-up model, and how results are told."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.pipeline.__main__ import (
    orchestration_lines,
    preparation_lines,
    start_lines,
    streaming_lines,
)
from benchmarks.pipeline.orchestration import RECIPE, Orchestration
from benchmarks.pipeline.plainly import run_plainly
from benchmarks.pipeline.preparation import Line, Preparation
from benchmarks.pipeline.preparers.order import Prepared
from benchmarks.pipeline.sharded import Size, write_model
from benchmarks.pipeline.starting import Starting
from benchmarks.pipeline.streaming import Peak, Streaming
from benchmarks.record import as_stated
from benchmarks.training.summary import Spread
from qlora_core.recipe import load_config

FEW = Spread(2.0, 1.0, 4.0)
TWO = {"cold": FEW, "warm": FEW}
BOTH = {"stage": FEW, "tokenise": FEW}


def test_the_made_up_model_loads_and_fills_several_files(tmp_path):
    size = Size(num_layers=2, hidden=32, intermediate=64, vocabulary=64)

    num_files = write_model(tmp_path, size, shard_bytes=10_000)

    assert num_files == len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.dtype == torch.bfloat16


def test_what_is_timed_counts_its_own_seconds():
    found = Prepared("ours")

    with found.timed("stage"):
        sum(range(3_000_000))

    assert 0 < found.cpu_s["stage"] < 60
    assert found.wall_s["stage"] > 0


def test_where_files_lie_on_a_machine_is_not_kept():
    given = {"python": [1], "out": Path("/some/where"), "rounds": 3}

    assert as_stated(given) == {"out": "where", "rounds": 3}


def test_all_stages_run_one_after_the_other_without_orchestration(tmp_path, tiny_llama):
    rows = tmp_path / "rows.jsonl"
    chats = ({"prompt": f"say {i}", "completion": f"the answer is {i}"} for i in range(60))
    rows.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(seed=0, model=tiny_llama, rows=rows))

    seconds = run_plainly(load_config(recipe), tmp_path / "out")

    reports = ["base_report", "tuned_report", "merged_report"]
    assert list(seconds) == ["data", "base", "adapter", "merged", *reports, "registered"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (start_lines(Starting({"qlora --help": FEW}, {"qlora --help": FEW})), "at most 0.6"),
        (
            preparation_lines(
                Preparation(
                    "GSM8K", [Line("ours", 9, 99, 9, BOTH, BOTH)], {"trl": BOTH}, {"x": "y"}
                )
            ),
            "ours is 2.00 (1.00-4.00) times as fast as trl",
        ),
        (
            streaming_lines(
                Streaming(8, 200, 1600, [Peak("original", "fold", 300_000_000, 500_000_000)])
            ),
            "300  (at most 500)",
        ),
        (
            orchestration_lines(Orchestration([], TWO, TWO, FEW, FEW, 0.3, 60.0, 0.0055, 0.004)),
            "0.55%",
        ),
    ],
    ids=["start", "prepare", "stream", "orchestrate"],
)
def test_each_part_is_told_in_words(lines, said):
    assert said in "\n".join(lines)
