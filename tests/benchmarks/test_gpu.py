"""The benchmark on a GPU, tried with a tiny shape on a CPU; and the arithmetic of its table."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.gpu import agreement
from benchmarks.gpu.building import num_multiplied, random_model
from benchmarks.gpu.cases import SHAPES, Case
from benchmarks.gpu.processes import ROOT
from benchmarks.gpu.summary import Result, summarise
from benchmarks.gpu.systems import ours, plain
from benchmarks.gpu.table import table

CASE = Case(
    shape="tiny", device="cpu", dtype="float32", row_length=48, global_batch=4, micro_batch=2,
    num_warmup=1, num_steps=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_script_measures_ours_on_a_cpu_and_stores_it(tmp_path):
    options = ["--shapes", "tiny", "--device", "cpu", "--systems", "ours", "--no-agreement"]
    options += ["--small", "", "--rounds", "1", "--steps", "1", "--warmup", "1"]
    command = [sys.executable, "-m", "benchmarks.gpu", *options, "--out", tmp_path]

    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("gpu-*.json")
    record = json.loads(file.read_text())
    (line,) = record["summary"]
    assert line["system"] == "ours"
    assert line["case"] == "tiny 8 x 64"
    assert f"{line['tokens_per_s']:.0f}" in done.stdout
    assert str(tmp_path) not in file.read_text()


@pytest.mark.parametrize("saves_memory", [False, True], ids=["fast", "small GPU"])
@pytest.mark.parametrize("system", [ours, plain])
def test_a_system_trains_every_row_and_starts_where_chance_does(system, saves_memory):
    found = system.measure(replace(CASE, saves_memory=saves_memory))

    assert found.num_tokens == 4 * 48
    assert found.recomputes == saves_memory
    assert found.losses[0] == pytest.approx(6.24, abs=0.05)  # log of 512 words
    assert found.seconds > 0


def test_ours_agrees_with_transformers_and_peft():
    found = agreement.measure(CASE)

    assert found.loss <= 1e-6
    assert found.gradient <= 1e-5
    assert found.their_gradient_error == 0.0  # they are measured in float32 here


def test_in_16_bits_ours_is_as_near_to_float32_as_they_are():
    found = agreement.measure(replace(CASE, dtype="bfloat16"))

    assert 0 < found.our_gradient_error <= 1.5 * found.their_gradient_error


def test_the_same_seed_makes_the_same_4_bit_model_in_any_dtype():
    short, whole = (
        random_model("tiny", torch.device("cpu"), dtype, seed=0)
        for dtype in (torch.bfloat16, torch.float32)
    )

    pairs = zip(short.named_parameters(), whole.named_parameters(), strict=True)
    assert all(torch.equal(a.float(), b.float()) for (_, a), (_, b) in pairs)
    assert num_multiplied(whole) == 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 192 * 3) + 512 * 64


@pytest.mark.parametrize(
    ("shape", "num_parameters"),
    [("1b", 1_235_814_400), ("7b", 6_738_415_616), ("8b", 8_030_261_248)],
)
def test_shapes_have_as_many_parameters_as_the_published_models(shape, num_parameters):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]))

    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


def measured(system: str, seconds: float, **changes):
    return {
        "system": system, "num_tokens": 16384, "seconds": seconds, "peak_bytes": 40_000_000_000,
        "peak_ever_bytes": 41_000_000_000, "losses": [11.8, 11.7], "num_multiplied": 7_500_000_000,
        "micro_batch": 4, "recomputes": False, "notes": ["Kernels of liger-kernel: silu_gate."],
    } | changes  # fmt: skip


@pytest.fixture
def result():
    case = replace(CASE, shape="8b", row_length=2048, global_batch=8)
    rounds = [
        {"ours": measured("ours", 1.6), "trl": measured("trl", 3.2)},
        {"ours": measured("ours", 2.0), "trl": measured("trl", 5.0)},
        {"ours": measured("ours", 1.0), "trl": measured("trl", 3.0)},
    ]
    return Result(case, rounds, left_out={"plain": "TOO LARGE"})


def test_rates_are_medians_and_ratios_are_taken_within_a_round(result):
    ours, trl = summarise([result], matrix_rate=8e14)

    assert (ours.tokens_per_s, ours.lowest, ours.highest) == (10240, 8192, 16384)
    assert ours.ours_is_faster is None
    assert trl.ours_is_faster == pytest.approx(2.5)


def test_the_share_of_the_matrix_rate_counts_two_flop_more_where_activations_are_recomputed(result):
    (plain,) = summarise([Result(result.case, [{"ours": measured("ours", 1.6)}])], 8e14)
    again = measured("ours", 1.6, recomputes=True)
    (recomputed,) = summarise([Result(result.case, [{"ours": again}])], 8e14)

    assert plain.matrix_share == pytest.approx(4 * 7.5e9 * 10240 / 8e14)
    assert recomputed.matrix_share == pytest.approx(1.5 * plain.matrix_share)


def test_the_table_gives_targets_notes_and_who_is_left_out(result):
    lines = summarise([result], 8e14)

    text = table([result], lines, {"device": "H100", "matrix_rate": 8e14}).splitlines()

    assert text[0] == "H100, large products at 800 TFLOP/s"
    assert "8b 8 x 2048: plain left out: TOO LARGE" in text
    assert text.count("8b 8 x 2048: Kernels of liger-kernel: silu_gate.") == 1
    assert "8b 8 x 2048: 10240 tok/s; target on one H100: 10000" in text
    assert "8b 8 x 2048: 2.50 times as fast as trl; target: 1.5" in text
