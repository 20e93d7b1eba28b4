"""Kernels are used where they give torch's numbers, and only there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qlora_core.config import AdapterConfig
from qlora_core.modeling import kernels
from qlora_core.modeling.fusing import fused
from qlora_core.modeling.kernels import (
    NO_KERNELS,
    GateKernel,
    Sizes,
    find_kernels,
    sizes_of,
    try_kernels,
)
from qlora_core.modeling.lora import attach_adapter, trainable_parameters
from tests.tiny import small_model

CPU = torch.device("cpu")
SIZES = Sizes(intermediate=96, vocabulary=300, num_heads=6, num_key_heads=2, head=24)


def test_in_tritons_interpreter_every_kernel_gives_torchs_numbers():
    if not all(importlib.util.find_spec(name) for name in ("triton", "liger_kernel")):
        pytest.skip("liger-kernel and Triton are not installed: pip install 'qloraflow[gpu]'")
    tests = Path(__file__).with_name("interpreted_kernels.py")

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout


def test_on_a_cpu_there_are_none():
    assert find_kernels(CPU, torch.float32, SIZES) == NO_KERNELS


def test_what_is_not_installed_is_left_out_and_said(monkeypatch):
    for module in ("swiglu", "rope", "cross_entropy"):
        monkeypatch.setitem(sys.modules, f"liger_kernel.ops.{module}", None)

    found = try_kernels(CPU, torch.float32, SIZES)

    assert found.names == ()
    (said,) = found.notes
    assert said.startswith("Not installed, so torch does it")
    assert "silu_gate, rotate_both, predict" in said


def torch_gate(*, scale: float = 1.0, breaks: bool = False) -> GateKernel:
    """What a kernel has to compute, by torch; or something else."""

    def multiply(y_NO):
        gate_NF, up_NF = y_NO.chunk(2, 1)
        return F.silu(gate_NF) * up_NF

    def differentiate(y_NO, dh_NF):
        if breaks:
            raise RuntimeError("out of resource: shared memory")
        with torch.enable_grad():
            y_NO = y_NO.detach().requires_grad_()
            return scale * torch.autograd.grad(multiply(y_NO), y_NO, dh_NF)[0]

    return GateKernel(multiply, differentiate)


@pytest.mark.parametrize(
    ("kernel", "why"),
    [
        (torch_gate(scale=1.001), "1.0e-03 off, 1e-05 allowed"),
        (torch_gate(scale=torch.nan), "nan off"),
        (torch_gate(breaks=True), "RuntimeError: out of resource: shared memory"),
    ],
    ids=["a wrong gradient", "no number", "an error"],
)
def test_a_kernel_that_is_wrong_or_fails_is_left_out_and_said(kernel, why, monkeypatch):
    monkeypatch.setattr(kernels, "_silu_gate", lambda: kernel)

    found = try_kernels(CPU, torch.float32, SIZES)

    assert found.silu_gate is None
    (said,) = [note for note in found.notes if "silu_gate is left out" in note]
    assert why in said


def test_a_right_one_is_used_for_silu_and_for_no_other_activation(monkeypatch):
    monkeypatch.setattr(kernels, "_silu_gate", torch_gate)
    found = try_kernels(CPU, torch.float32, SIZES)

    used = {kind: blocks_with_kernel(kind, found) for kind in ("Llama", "Gemma")}

    assert "silu_gate" in found.names
    assert used == {"Llama": 2, "Gemma": 0}


def blocks_with_kernel(kind: str, use: kernels.Kernels) -> int:
    model = adapted(kind)
    with fused(model, 0, use):
        blocks = [getattr(m, "forward", None) for m in model.modules() if "forward" in vars(m)]
        return sum(getattr(block, "kernel", None) is not None for block in blocks)


def test_sizes_are_read_off_any_configuration():
    found = sizes_of(small_model("Qwen3", head_dim=24).config)

    assert found == Sizes(96, 64, num_heads=4, num_key_heads=2, head=24)


def adapted(kind: str = "Llama"):
    """A model in training whose adapter is not zero, so that all gradients are at work."""
    base = small_model(kind, vocab_size=300).requires_grad_(False)
    model = attach_adapter(base, AdapterConfig(rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(model).values():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.train()
