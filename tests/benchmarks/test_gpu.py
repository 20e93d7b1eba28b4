"""The benchmark on a GPU, tried with a tiny shape on a CPU; and the arithmetic of its table."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.gpu import agreement
from benchmarks.gpu.building import num_multiplied, random_model
from benchmarks.gpu.cases import SHAPES, Case
from benchmarks.gpu.needs import pip_line
from benchmarks.gpu.summary import Result, summarise
from benchmarks.gpu.systems import ours, plain, trl_sft
from benchmarks.gpu.table import table
from benchmarks.record import ROOT

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
    assert found.micro_batch == 2
    assert (found.planned_bytes is None) == (system is plain)


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
    assert num_multiplied(whole) == (2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 192 * 3), 512 * 64)


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
        "peak_ever_bytes": 41_000_000_000, "losses": [11.8, 11.7], "num_body": 7_000_000_000,
        "num_head": 500_000_000, "micro_batch": 4, "recomputes": False, "is_fused": True,
        "planned_bytes": 42_000_000_000 if system == "ours" else None,
        "notes": ["Kernels of liger-kernel: silu_gate."],
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


def test_the_share_of_the_matrix_rate_counts_layers_but_no_head_again_where_they_are_recomputed(
    result,
):
    (plain,) = summarise([Result(result.case, [{"ours": measured("ours", 1.6)}])], 8e14)
    again = measured("ours", 1.6, recomputes=True)
    (recomputed,) = summarise([Result(result.case, [{"ours": again}])], 8e14)

    assert plain.matrix_share == pytest.approx(4 * 7.5e9 * 10240 / 8e14)
    assert recomputed.matrix_share == pytest.approx((6 * 7e9 + 4 * 0.5e9) * 10240 / 8e14)


def test_the_table_gives_targets_notes_and_who_is_left_out(result):
    lines = summarise([result], 8e14)

    text = table([result], lines, {"device": "H100", "matrix_rate": 8e14}).splitlines()

    assert text[0] == "H100, large products at 800 TFLOP/s"
    assert "8b 8 x 2048: plain left out: TOO LARGE" in text
    assert text.count("8b 8 x 2048: Kernels of liger-kernel: silu_gate.") == 1
    assert "8b 8 x 2048: 10240 tok/s; target on one H100: 10000" in text
    target = "2.50 times as fast as trl with fused kernels, on full packs; target: 1.5"
    assert f"8b 8 x 2048: {target}" in text
    (ours,) = (line.split() for line in text if line.startswith("8b 8 x 2048  ours"))
    assert ours[-6:-4] == ["42.00", "40.00"]  # planned beside measured


def test_without_fused_kernels_a_peer_is_not_what_the_target_means(result):
    for each in result.rounds:
        each["trl"] |= {"is_fused": False, "notes": ["TRL ran without."]}

    text = table([result], summarise([result], 8e14), {"device": "H100", "matrix_rate": 8e14})

    assert "times as fast as trl" not in text
    assert "8b 8 x 2048: TRL ran without." in text.splitlines()


def test_a_peer_without_kernels_that_run_says_why():
    assert trl_sft.why_unfused(torch.device("cpu"), torch.float32) == "they need a GPU"


def test_a_bare_machine_is_told_all_that_is_missing_and_one_line_that_installs_it(tmp_path):
    for name in ("torch", "peft", "yaml"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    command = [sys.executable, "-m", "benchmarks.gpu", "--shapes", "tiny", "--device", "cpu"]

    done = subprocess.run(
        [*command, "--out", tmp_path / "out"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    for name in ("torch", "peft", "yaml"):
        assert f"{name} is missing or broken: ImportError: not here" in done.stderr
    (line,) = re.findall(r"pip install torch.*", done.stderr)
    assert re.search(r" torch==\d\S+ .*peft==\d\S+ .*pyyaml==\d", line, re.IGNORECASE)
    assert not (tmp_path / "out").exists()


def test_versions_come_from_the_tested_set_or_from_the_ranges_that_are_allowed():
    assert re.fullmatch(r"pip install liger-kernel==0\.8\.\d+", pip_line(["liger_kernel"]))
    assert pip_line(["qlora_core.training.worker"]).startswith("pip install torch==")
    assert pip_line(["setuptools"]) == "pip install 'setuptools>=77'"


def test_llama_3_turns_positions_as_published():
    eight = SHAPES["8b"]

    assert eight["rms_norm_eps"] == 1e-5
    assert eight["rope_parameters"]["rope_type"] == "llama3"
    assert eight["rope_parameters"]["factor"] == 8.0
    assert SHAPES["1b"]["rope_parameters"]["factor"] == 32.0
