"""Real workers over gloo: two processes that run several trainings and write down what they saw.

python -m tests.training.two_workers RANK FOLDER    # FOLDER/scenes.json: a list of `Scene`
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora_core.artifacts import Frozen
from qlora_core.config import ClusterConfig, SnapshotConfig
from qlora_core.errors import QLoraError
from qlora_core.modeling.sharding import blocks_of
from qlora_core.ports import TrainJob
from qlora_core.training import worker
from qlora_core.training.comm import TorchComm
from qlora_core.training.loop import Run
from qlora_core.training.optimizer import FlatGradients

NUM_WORKERS = 2
_TIMEOUT_S = 600


class Scene(Frozen):
    """One training, and what happens to worker 1 in it."""

    name: str
    job: TrainJob
    cluster: ClusterConfig
    fault: Literal[
        "",
        "memory forward",
        "memory backward",
        "memory always",
        "death",
        "packing at once",
        "packing halfway",
        "packing for memory",
    ] = ""


class Seen(Frozen):
    """What one worker saw."""

    error: str = ""
    notes: tuple[str, ...] = ()
    held_bytes: int = 0
    """Of packed weights and scales, between passes."""
    most_present_bytes: int = 0
    """Of a sharded base's blocks that were whole at a time."""
    block_bytes: int = 0
    num_gathered_bytes: int = 0


def play(scenes: Sequence[Scene], folder: Path) -> None:
    """Run all ``scenes``, one after another, on two processes."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps([scene.model_dump(mode="json") for scene in scenes])
    (folder / "scenes.json").write_text(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(NUM_WORKERS)}
    command = [sys.executable, "-m", "tests.training.two_workers"]
    running = []
    for rank in range(NUM_WORKERS):
        with (folder / f"log-{rank}.txt").open("w") as log:
            running.append(
                subprocess.Popen(
                    [*command, str(rank), str(folder)],
                    env=os.environ | own | {"OMP_NUM_THREADS": "1"},
                    stdout=log,
                    stderr=log,
                )
            )
    try:
        for process in running:
            process.wait(_TIMEOUT_S)
    finally:
        for process in running:
            process.kill()


def seen(folder: Path, name: str, rank: int) -> Seen:
    """Return what a worker saw in a scene."""
    file = folder / f"{name}-{rank}.json"
    assert file.exists(), (folder / f"log-{rank}.txt").read_text()[-4000:]
    return Seen.model_validate_json(file.read_text())


def main() -> None:
    """Play one worker's part."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=NUM_WORKERS, timeout=timedelta(seconds=60)
    )
    for plain in json.loads((folder / "scenes.json").read_text()):
        scene = Scene.model_validate(plain)
        found = _played(scene, rank, folder)
        (folder / f"{scene.name}-{rank}.json").write_text(found.model_dump_json())


def _played(scene: Scene, rank: int, folder: Path) -> Seen:
    device, comm = torch.device("cpu"), TorchComm(torch.device("cpu"), NUM_WORKERS)
    watch = _Watch(scene.fault if rank == 1 else "")
    try:
        with watch.watching():
            rarely = SnapshotConfig(every_s=1e9)
            worker.run_worker(scene.job, comm, rarely, "0001", device, cluster=scene.cluster)
    except QLoraError as error:
        return Seen(error=f"{type(error).__name__}: {error}")
    if rank == 0:
        steps = {f"{n:03d}": flat_P for n, flat_P in enumerate(watch.gradients)}
        save_file(steps, folder / f"{scene.name}.safetensors")
    return watch.seen()


class _Watch:
    """Looks over a worker's shoulder, and lets things happen to it."""

    def __init__(self, fault: str) -> None:
        self.gradients: list[Tensor] = []
        self._fault, self._run = fault, None
        self._most = 0

    @contextmanager
    def watching(self):
        clip, prepare, attach = FlatGradients.clip, worker._prepare, worker.attach_adapter

        def clipping(gradients: FlatGradients, max_norm: float) -> float:
            self.gradients.append(gradients.flat_P.clone())
            return clip(gradients, max_norm)

        def preparing(*given: Any) -> Run:
            self._run = prepare(*given)
            self._follow(self._run)
            return self._run

        def attaching(*given: Any) -> Any:
            model = attach(*given)
            if "packing" in self._fault:
                self._spoil_packing(model)
            return model

        FlatGradients.clip, worker._prepare, worker.attach_adapter = clipping, preparing, attaching
        try:
            yield
        finally:
            FlatGradients.clip, worker._prepare, worker.attach_adapter = clip, prepare, attach

    def seen(self) -> Seen:
        run = self._run
        assert run is not None
        blocks = blocks_of(run.model)
        held_bytes = sum(s.nbytes() for block in blocks for s in _storages(block))
        own = held_bytes + (run.base.part_bytes if run.base else 0)
        return Seen(
            notes=tuple(run.loss.notes),
            held_bytes=own,
            most_present_bytes=self._most,
            block_bytes=run.base._blocks[0].whole.nbytes if run.base else 0,
            num_gathered_bytes=run.base.num_gathered_bytes if run.base else 0,
        )

    def _follow(self, run: Run) -> None:
        for place, block in enumerate(blocks_of(run.model)):
            block.register_forward_pre_hook(self._looker(run))
            block.register_forward_hook(self._looker(run))
            if place == 2:
                block.register_forward_hook(self._strike)

    def _spoil_packing(self, model: nn.Module) -> None:
        """Let the first packed pass fail: before its first block computes, or after its third."""

        def fail(_module: nn.Module, _inputs: Any, options: dict[str, Any], *_: Any) -> None:
            if "layout" not in options or not self._fault:
                return
            fault, self._fault = self._fault, ""
            if "memory" in fault:
                raise torch.OutOfMemoryError("no memory left, says the test")
            raise ValueError("packing is beyond me, says the test")

        if "at once" in self._fault:
            model.register_forward_pre_hook(fail, with_kwargs=True)
        else:
            blocks_of(model)[2].register_forward_hook(fail, with_kwargs=True)

    def _looker(self, run: Run) -> Callable[..., None]:
        def look(*_: Any) -> None:
            if run.base is not None:
                self._most = max(self._most, run.base.present_bytes)

        return look

    def _strike(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if not self._fault or not tensor.requires_grad or len(self.gradients) != 1:
            return
        if self._fault == "death":
            os._exit(1)
        fault, self._fault = self._fault, self._fault if "always" in self._fault else ""
        if "backward" in fault:
            tensor.register_hook(_run_out)
        else:
            _run_out(tensor)


def _run_out(_: Tensor) -> None:
    raise torch.OutOfMemoryError("no memory left, says the test")


def _storages(block: nn.Module) -> list[torch.UntypedStorage]:
    layers = [m for m in block.modules() if type(m).__name__ == "Linear4bit"]
    tensors = [t for m in layers for t in (m.weight.data, m.weight.quant_state.absmax)]
    found = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return list(found.values())


if __name__ == "__main__":
    main()
