"""How much memory quantising and merging take beside the model's size: see `streamed`."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from benchmarks.pipeline.children import measured_by
from benchmarks.pipeline.sharded import SHARD_BYTES
from benchmarks.pipeline.streamed import STAGES
from benchmarks.record import say


@dataclass(frozen=True)
class Peak:
    """Of one part of a stage, in bytes above what the process held before the first weight."""

    stage: str
    part: str
    peak_bytes: int
    allowed_bytes: int
    """Two files of the input and the output's largest tensor."""


@dataclass(frozen=True)
class Streaming:
    """What was measured."""

    num_shards: int
    shard_bytes: int
    model_bytes: int
    peaks: list[Peak]


def measure(work: Path) -> Streaming:
    """Make the model, run each stage in a process of its own, and remove it all."""
    folder = work / "sharded"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        say("streaming: making the model")
        made = measured_by("streamed", "make", "--work", folder)
        size = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
        peaks: list[Peak] = []
        for stage in STAGES:
            say(f"streaming: {stage}")
            found = measured_by("streamed", stage, "--work", folder)
            allowed = 2 * SHARD_BYTES + found["largest_tensor"]
            peaks += [Peak(stage, part, peak, allowed) for part, peak in found["peaks"].items()]
        return Streaming(made["num_shards"], SHARD_BYTES, size, peaks)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
