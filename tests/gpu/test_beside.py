"""Copies beside a real GPU's computing: their order, and the numbers of what is brought by them."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from qlora_core.modeling.beside import copy_beside
from qlora_core.modeling.sharding import KeepsAll, ShardedBase
from qlora_core.training.comm import TorchComm

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
SIZE, CYCLES = 1 << 26, 400_000_000
"""Numbers of a copy, and of a GPU's clock while it does nothing: some 10 ms and 200 ms."""


@pytest.fixture
def on_host() -> torch.Tensor:
    return torch.ones(SIZE).pin_memory()


def test_a_copy_ends_while_the_gpu_computes_what_was_queued_after_it(on_host):
    there, computed = torch.zeros(SIZE, device=GPU), torch.cuda.Event()
    torch.cuda.synchronize()

    coming = copy_beside(there, on_host)
    torch.cuda._sleep(CYCLES)
    computed.record()

    while not coming.done.query():
        assert not computed.query(), "the copy was behind it in the queue"
        time.sleep(1e-3)
    coming.wait()
    assert torch.equal(there, torch.ones_like(there))


def test_a_copy_waits_for_what_was_queued_before_it_and_what_is_queued_later_for_the_copy(on_host):
    there = torch.zeros(SIZE, device=GPU)
    torch.cuda.synchronize()

    torch.cuda._sleep(CYCLES)
    before = there.clone()
    coming = copy_beside(there, on_host)
    coming.wait()
    after = there.clone()

    assert not before.any()
    assert after.all()


class Layer(nn.Module):
    """A 4-bit layer and an adapter, so that gradients flow and have to be right."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.base = Linear4bit(size, size, bias=False, compute_dtype=torch.float32)
        self.base.weight = Params4bit(torch.randn(size, size) / size**0.5, requires_grad=False)
        self.a = nn.Parameter(torch.randn(8, size) / size**0.5)
        self.b = nn.Parameter(torch.randn(size, 8))

    def forward(self, x):
        return x + torch.tanh(self.base(x) + x @ self.a.T @ self.b.T)


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(2048) for _ in range(12))).to(GPU)


@pytest.fixture
def nccl():
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    dist.init_process_group("nccl", rank=0, world_size=1)
    yield lambda: TorchComm(GPU, local_size=1)
    dist.destroy_process_group()


def gradients(model: nn.Module, base: ShardedBase | None) -> list[torch.Tensor]:
    x = torch.randn(4096, 2048, generator=torch.Generator().manual_seed(1)).to(GPU)
    if base is not None:
        base.begin_pass(goes_back=True)
    mine = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(model(x.requires_grad_()).square().mean(), mine)
    if base is not None:
        base.end_pass()
    return list(found)


@pytest.mark.parametrize("is_offloaded", [False, True])
@pytest.mark.parametrize("through", ["one worker", "nccl"])
def test_passes_over_blocks_that_come_beside_give_the_gradients_of_those_that_stay(
    is_offloaded, through, request
):
    expected = gradients(stack(), None)
    comm = KeepsAll() if through == "one worker" else request.getfixturevalue("nccl")()
    model, base = stack(), ShardedBase(comm, is_offloaded=is_offloaded)
    for block in model:
        base.take(block)

    for _ in range(5):  # buffers come and go many times, and the host never waits in between
        assert all(map(torch.equal, gradients(model, base), expected))
    assert base.present_bytes == 0


@pytest.mark.parametrize("is_offloaded", [False, True])
def test_two_blocks_are_on_the_gpu_at_a_time_however_far_the_host_runs_ahead(is_offloaded):
    whole = peak_bytes(stack(), None)
    model, base = stack(), ShardedBase(KeepsAll(), is_offloaded=is_offloaded)
    for block in model:
        base.take(block)

    grown = peak_bytes(model, base) - whole

    block = base.part_bytes // 12
    assert grown <= 2 * block + (1 << 20)


def peak_bytes(model: nn.Module, base: ShardedBase | None) -> int:
    """What a pass takes at most, beyond what is there before it."""
    gradients(model, base)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(model, base)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
