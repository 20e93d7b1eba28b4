"""The kernels themselves without a GPU, in Triton's interpreter: slow, but the same program.

Triton decides whether it interprets when it is imported, and other libraries import it, so these
run in a process of their own: `test_kernels.py` starts it. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/modeling/interpreted_kernels.py

In float32, as the interpreter's bfloat16 is not to be trusted.
"""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qlora_core.data.prepared import read_split
from qlora_core.modeling.fusing import fused
from qlora_core.modeling.head import cross_entropy_sum
from qlora_core.modeling.kernels import NO_KERNELS, try_kernels
from qlora_core.modeling.lora import trainable_parameters
from qlora_core.modeling.packing import packed_attention
from qlora_core.training.objective import LossFunction
from tests.modeling.test_kernels import CPU, SIZES, adapted
from tests.training.conftest import dataset

__all__ = ["dataset"]


@pytest.fixture(scope="module")
def interpreted():
    return try_kernels(CPU, torch.float32, SIZES)


def test_every_kernel_gives_torchs_numbers(interpreted):
    assert interpreted.names == ("silu_gate", "rotate_both", "predict")
    assert interpreted.notes == ("Kernels of liger-kernel: silu_gate, rotate_both, predict.",)


def test_the_engine_with_kernels_gives_the_loss_and_gradients_without(interpreted, dataset):
    model = adapted()
    rows, chunk = read_split(dataset, "train"), np.arange(4)
    found = [loss_and_gradients(model, rows, chunk, use) for use in (NO_KERNELS, interpreted)]

    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    for ours, torchs in zip(found[1][1], found[0][1], strict=True):
        assert (ours - torchs).norm() <= 1e-5 * torchs.norm()


def test_losses_in_chunks_by_a_kernel_are_those_of_whole_logits(interpreted, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=generator)
    weight = torch.randn(300, 16, generator=generator)
    labels = torch.randint(300, (37,), generator=generator)
    monkeypatch.setattr("qlora_core.modeling.head.CHUNK_BYTES", 10 * 4 * len(weight))
    ours, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()

    found = cross_entropy_sum(ours, weight, labels, interpreted.predict)
    found.backward()

    expected = F.cross_entropy(exact @ weight.double().T, labels, reduction="sum")
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (ours.grad - exact.grad).norm() <= 1e-6 * exact.grad.norm()


def loss_and_gradients(model, rows, chunk, use):
    head = model.get_output_embeddings()
    with ExitStack() as stack:
        loss = LossFunction(model, kernels=use, packs=True)
        stack.callback(delattr, head, "forward")  # the class's own again
        stack.enter_context(packed_attention(model))
        stack.enter_context(fused(model, 10**9, use))
        total = loss(loss.batch(rows, chunk, CPU))
        gradients = torch.autograd.grad(total, list(trainable_parameters(model).values()))
    return total.item(), gradients
