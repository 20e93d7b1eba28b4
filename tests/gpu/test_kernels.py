"""Kernels on the GPU itself, against torch in float64 and against the engine without them."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch

from benchmarks.gpu.building import random_model
from qlora_core.config import AdapterConfig
from qlora_core.data.prepared import Rows
from qlora_core.modeling.fusing import fused
from qlora_core.modeling.kernels import NO_KERNELS, Sizes, find_kernels, sizes_of
from qlora_core.modeling.lora import attach_adapter, trainable_parameters
from qlora_core.modeling.packing import packed_attention
from qlora_core.training.objective import LossFunction

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
LLAMA_8B = Sizes(intermediate=14336, vocabulary=128256, num_heads=32, num_key_heads=8, head=128)
ALL = ("silu_gate", "rotate_both", "predict")
LENGTHS = (90, 64, 33)


@pytest.fixture
def liger():
    return pytest.importorskip("liger_kernel", reason="needs the extra `gpu`")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_at_the_sizes_of_a_real_model_every_kernel_gives_torchs_numbers(liger, dtype):
    found = find_kernels(GPU, dtype, LLAMA_8B)

    assert found.names == ALL, found.notes


def test_without_liger_torch_does_it_and_that_is_said(monkeypatch):
    import sys

    for module in ("swiglu", "rope", "cross_entropy"):
        monkeypatch.setitem(sys.modules, f"liger_kernel.ops.{module}", None)

    found = find_kernels(GPU, torch.bfloat16, LLAMA_8B)

    assert found.names == ()
    (said,) = found.notes
    assert said.startswith("Not installed, so torch does it")


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def model(request):
    return adapted(request.param)


def adapted(dtype):
    base = random_model("tiny", GPU, dtype, seed=0)
    model = attach_adapter(base, AdapterConfig(rank=8), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(model).values():
        noise = 0.05 * torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(noise.to(GPU))
    return model.train()


def rows() -> Rows:
    random = np.random.default_rng(0)
    ids = random.integers(1, 500, sum(LENGTHS), dtype=np.int32)
    return Rows(ids, ids, np.concatenate([[0], np.cumsum(LENGTHS)]))


def loss_and_gradient(model, *, use=NO_KERNELS, packs=True, fuses=True, budget_bytes=0):
    """The mean loss, and all gradients as one vector."""
    head, found = model.get_output_embeddings(), rows()
    with ExitStack() as stack:
        loss = LossFunction(model, kernels=use, packs=packs)
        stack.callback(delattr, head, "forward")  # the class's own again
        if packs:
            stack.enter_context(packed_attention(model))
        if fuses:
            stack.enter_context(fused(model, budget_bytes, use))
        total = loss(loss.batch(found, np.arange(len(found)), GPU)) / sum(LENGTHS)
        parts = torch.autograd.grad(total, list(trainable_parameters(model).values()))
    return total.detach(), torch.cat([part.flatten() for part in parts])


def assert_near(found, expected, dtype):
    loss, gradient = (2e-3, 3e-2) if dtype == torch.bfloat16 else (1e-5, 1e-4)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=loss)
    assert (found[1] - expected[1]).norm() <= gradient * expected[1].norm()


def test_the_engine_with_kernels_gives_the_loss_and_gradients_without(liger, model):
    dtype = model.get_input_embeddings().weight.dtype
    use = find_kernels(GPU, dtype, sizes_of(model.config))
    assert use.names == ALL, use.notes

    assert_near(loss_and_gradient(model, use=use), loss_and_gradient(model), dtype)


def test_the_engine_gives_the_loss_and_gradients_of_transformers_and_peft(model):
    dtype = model.get_input_embeddings().weight.dtype
    theirs = loss_and_gradient(model, packs=False, fuses=False)

    assert_near(loss_and_gradient(model), theirs, dtype)


def test_packed_rows_give_the_loss_and_gradients_of_padded_ones(model):
    dtype = model.get_input_embeddings().weight.dtype

    assert_near(loss_and_gradient(model), loss_and_gradient(model, packs=False), dtype)


def test_weights_kept_dequantised_change_no_bit_of_the_loss(model):
    kept, unpacked = (loss_and_gradient(model, budget_bytes=size)[0] for size in (10**9, 0))

    assert torch.equal(kept, unpacked)


def test_a_pass_is_queued_without_waiting_for_the_gpu():
    model = adapted(torch.bfloat16)
    found = rows()
    loss = LossFunction(model, packs=True)
    with packed_attention(model), fused(model, 10**9):
        parameters = list(trainable_parameters(model).values())
        for debug_mode in ("default", "error"):  # the first pass makes what later ones find
            torch.cuda.set_sync_debug_mode(debug_mode)
            try:
                total = loss(loss.batch(found, np.arange(len(found)), GPU))
                torch.autograd.grad(total, parameters)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_a_model_is_quantised_without_ever_being_whole_in_16_bits():
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    model = random_model("1b", GPU, torch.bfloat16, seed=0)

    held = torch.cuda.memory_allocated() - before
    largest = max(p.numel() for p in model.parameters()) * 2
    assert torch.cuda.max_memory_allocated() - before <= held + 2 * largest
    assert held < 1.1e9
