"""Training on a GPU, held against the CPU and against itself."""

import pytest
import torch

from qlora_core.config import AdapterConfig, SnapshotConfig
from qlora_core.data.prepared import read_split
from qlora_core.modeling.loading import load_base
from qlora_core.modeling.lora import attach_adapter
from qlora_core.training.comm import Alone
from qlora_core.training.objective import LossFunction
from qlora_core.training.worker import run_worker

pytestmark = pytest.mark.gpu

RARELY = SnapshotConfig(every_s=1e9)


def curve(job, device: str) -> list[float]:
    steps = []
    run_worker(job, Alone(), RARELY, "0001", torch.device(device), steps.append)
    return [step.loss for step in steps]


@pytest.fixture
def bfloat16_base(tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama, dtype=torch.bfloat16, quantization_config=nf4
    )
    model.save_pretrained(tmp_path / "bfloat16" / "model")
    return tmp_path / "bfloat16"


def test_in_float32_a_gpu_follows_the_curve_of_a_cpu(make_job):
    on_cpu, on_gpu = curve(make_job("cpu"), "cpu"), curve(make_job("gpu"), "cuda")

    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


def test_in_bfloat16_rows_are_packed_and_the_loss_is_that_of_float32_but_for_rounding(
    bfloat16_base, dataset, make_job
):
    model = attach_adapter(load_base(bfloat16_base, "cuda"), AdapterConfig(rank=4), seed=0)
    loss = LossFunction(model)
    loss.try_out(read_split(dataset, "train"), torch.device("cuda"))
    job = make_job("short").model_copy(update={"base": bfloat16_base})

    assert loss.notes == []
    assert loss.packs
    assert curve(job, "cuda") == pytest.approx(curve(make_job("long"), "cpu"), rel=5e-2)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_moments_stay_near_those_of_32_bits(optimizer, make_job):
    exact = curve(make_job("exact", rank=64), "cuda")
    short = curve(make_job("short", rank=64, optimizer=optimizer), "cuda")

    assert short == pytest.approx(exact, rel=5e-2)


def test_recomputing_activations_changes_nothing_but_memory(make_job):
    kept = curve(make_job("kept", checkpointing="off"), "cuda")
    recomputed = curve(make_job("recomputed", checkpointing="on"), "cuda")

    assert recomputed == pytest.approx(kept, rel=1e-5)


def test_the_memory_of_the_gpu_is_what_is_reported(make_job):
    steps = []
    job = make_job("memory")
    run_worker(job, Alone(), RARELY, "0001", torch.device("cuda"), steps.append)

    assert steps[-1].memory_bytes == torch.cuda.max_memory_allocated()
