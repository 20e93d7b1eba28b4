"""A frozen 4-bit base whole, in parts by our own gathers, and in parts by PyTorch's FSDP2.

    python -m benchmarks.sharding [--layers 8] [--hidden 2048] [--passes 5] [--tokens 64]

Two workers are processes of this machine that talk over gloo, one thread each. The model is a stack
of gated blocks in NF4 with double quantisation, random weights, an adapter of rank 16 on each
layer; a pass goes forward and backward. The systems take turns within the same processes, on the
same numbers, and their gradients are compared. Measured on each worker: seconds of a pass, bytes
of all gathers in a pass (as filled on one worker), bytes of the packed base that are kept between
passes, and what a pass takes at most beside them, twice: bytes of tensors, from torch's profiler,
exact but for what gloo's own threads take; and by how much resident memory grows. The latter says
something of large blocks only: tensors of 1 MB and more are given back to the kernel at once, but
smaller ones stay with the C library, and whoever comes later finds room that others left.

FSDP2 cannot shard bitsandbytes' own parameter (a subclass that carries the scales), so its packed
weights are plain uint8 parameters beside their scales, which stay whole; the adapter is excluded.
Its last block stays whole between forward and backward (`reshard_after_forward=False`), as it does
with ours. The next block comes while one computes on GPUs alone, if nothing else is said;
`fsdp2-ahead` says so and does it over gloo, too, by FSDP2's explicit prefetching.
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import accumulate, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import torch.distributed as dist
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from benchmarks.record import say, store, versions
from qlora_core.modeling.heap import give_back_at_once
from qlora_core.modeling.sharding import ShardedBase, blocks_of
from qlora_core.training.comm import TorchComm

_RANK = 16
_COLUMNS = {
    "kept by a worker [bytes]": "kept_bytes",
    "gathered in a pass [bytes]": "gathered_bytes",
    "a pass takes beside it: tensors [bytes]": "tensor_bytes",
    "resident [bytes]": "grown_bytes",
    "a pass [s]": "seconds",
}
_NUM_WORKERS = 2
_SYSTEMS = ("whole", "ours", "fsdp2", "fsdp2-ahead")


class _Plain4bit(nn.Module):
    """A 4-bit layer whose packed weight is a parameter like any other."""

    def __init__(self, layer: Linear4bit) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.data.clone(), requires_grad=False)
        self.state = layer.weight.quant_state

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = bnb.matmul_4bit(x, self.weight.t(), quant_state=self.state)
        return output


class _Adapted(nn.Module):
    """A frozen layer and its adapter."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        weight = torch.randn(num_out, num_in) / num_in**0.5
        self.base: nn.Module = Linear4bit(
            num_in, num_out, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        self.base.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(
            "cpu"
        )
        self.a = nn.Parameter(torch.randn(_RANK, num_in) / num_in**0.5)
        self.b = nn.Parameter(torch.zeros(num_out, _RANK))

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.base(x) + x @ self.a.T @ self.b.T
        return adapted


class _Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        inner = hidden * 11 // 4 // 64 * 64
        self.gate, self.up = _Adapted(hidden, inner), _Adapted(hidden, inner)
        self.down = _Adapted(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return output


class _Stack(nn.Module):
    def __init__(self, num_layers: int, hidden: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(_Block(hidden) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    @property
    def adapters(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]


class _System:
    """One way to hold the base, ready to make passes."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self._base = name, None
        self._num_gathered = 0
        self.model = _Stack(options.layers, options.hidden)
        packed = _packed_bytes(self.model)
        if name == "ours":
            self._base = ShardedBase(TorchComm(torch.device("cpu"), _NUM_WORKERS))
            for block in blocks_of(self.model):
                self._base.take(block)
            packed = self._base.part_bytes
        elif name.startswith("fsdp2"):
            packed = self._shard_by_torch(is_ahead=name == "fsdp2-ahead")
        self.kept_bytes = packed

    def run(self, x: Tensor) -> list[Tensor]:
        """Go forward and backward; return the adapters' gradients."""
        if self._base is not None:
            self._base.begin_pass(goes_back=True)
        loss = self.model(x).square().mean()
        gradients = torch.autograd.grad(loss, self.model.adapters)
        if self._base is not None:
            self._base.end_pass()
        return list(gradients)

    @property
    def num_gathered_bytes(self) -> int:
        """So far, as filled on this worker."""
        return self._base.num_gathered_bytes if self._base else self._num_gathered

    def _shard_by_torch(self, *, is_ahead: bool) -> int:
        for module in list(self.model.modules()):
            if isinstance(module, _Adapted):
                module.base = _Plain4bit(module.base)
        mine, blocks = set(self.model.adapters), list(self.model.layers)
        for block in blocks:
            stays = block is blocks[-1]
            fully_shard(block, ignored_params=mine, reshard_after_forward=not stays)
        fully_shard(self.model, ignored_params=mine)
        if is_ahead:
            _let_next_come(self.model, blocks)
        self._count_gathers()
        packed = [p for p in self.model.parameters() if not p.requires_grad]
        scales = sum(_scale_bytes(m.state) for m in self.model.modules() if type(m) is _Plain4bit)
        return sum(p.to_local().nbytes for p in packed) + scales  # type: ignore[attr-defined]

    def _count_gathers(self) -> None:
        for name in ("all_gather_into_tensor", "all_gather_single"):
            if gather := getattr(dist, name, None):
                setattr(dist, name, self._counting(gather))

    def _counting(self, gather: Callable[..., Any]) -> Callable[..., Any]:
        def counted(output: Tensor, given: Tensor, **others: Any) -> Any:
            if _is_active(self):
                self._num_gathered += output.nbytes
            return gather(output, given, **others)

        return counted


def _let_next_come(model: Any, blocks: list[Any]) -> None:
    """Have FSDP2 ask for the next block before one computes, and not wait for it."""
    model._set_unshard_async_op(True)
    for block, following in pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])


_active: list[_System] = []


def _is_active(system: _System) -> bool:
    return _active == [system]


def _scale_bytes(state: Any) -> int:
    return int(state.absmax.nbytes)


def _packed_bytes(model: nn.Module) -> int:
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    return sum(m.weight.data.nbytes + _scale_bytes(m.weight.quant_state) for m in layers)


def main() -> int:
    """Start two workers, or be one; print and store what rank 0 measured."""
    options = _options()
    if options.rank is not None:
        _work(options)
        return 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.sharding", *sys.argv[1:]]
    workers = [
        subprocess.Popen([*command, "--rank", str(rank)], env=os.environ | place)
        for rank in range(_NUM_WORKERS)
    ]
    return max(worker.wait() for worker in workers)


def _work(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    give_back_at_once()
    dist.init_process_group(
        "gloo", rank=options.rank, world_size=_NUM_WORKERS, timeout=timedelta(seconds=120)
    )
    measured = [_measured(name, options) for name in _SYSTEMS]
    if options.rank:
        return
    reference = measured[0].pop("gradients")
    for found in measured[1:]:
        pairs = zip(found.pop("gradients"), reference, strict=True)
        found["largest_difference"] = max(float((a - b).abs().max()) for a, b in pairs)
    print(_table(measured))
    stated = {k: v for k, v in vars(options).items() if k not in ("rank", "out")}
    result = {"options": stated, "versions": versions(), "systems": measured}
    say(f"stored in {store(options.out, 'sharding', 'a frozen base whole and in parts', result)}")


def _table(measured: list[dict[str, Any]]) -> str:
    """Return what was found, as Markdown."""
    head = ("base", *_COLUMNS, "gradients")
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for found in measured:
        largest = found.get("largest_difference")
        gradients = "" if largest is None else f"{largest:.1e} off" if largest else "the same bits"
        numbers = [f"{found[name]:,}" for name in _COLUMNS.values()]
        lines.append("| " + " | ".join([found["name"], *numbers, gradients]) + " |")
    return "\n".join(lines)


def _measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Make passes with one system; the others are not there meanwhile."""
    system = _System(name, options)
    x = torch.randn(options.tokens, options.hidden, generator=torch.Generator().manual_seed(1))
    _active[:] = [system]
    gradients = system.run(x)  # warms up
    before, gathered = _resident_bytes(), system.num_gathered_bytes
    _forget_peak()
    seconds = []
    for _ in range(options.passes):
        dist.barrier()
        start = time.monotonic()
        system.run(x)
        seconds.append(time.monotonic() - start)
    _active.clear()
    return {
        "name": name,
        "seconds": round(sorted(seconds)[len(seconds) // 2], 4),
        "gathered_bytes": (system.num_gathered_bytes - gathered) // options.passes,
        "kept_bytes": system.kept_bytes,
        "grown_bytes": _peak_bytes() - before,
        "tensor_bytes": _tensor_bytes(lambda: system.run(x)),
        "gradients": gradients,
    }


def _tensor_bytes(act: Callable[[], object]) -> int:
    """Return the most that tensors take at a time while ``act`` runs, beside those there before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        act()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(accumulate(size for _, size in sorted(changes, key=itemgetter(0))), default=0)


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew


def _resident_bytes() -> int:
    return _status("VmRSS:")


def _peak_bytes() -> int:
    return _status("VmHWM:")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder of results; none: benchmarks/results")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
