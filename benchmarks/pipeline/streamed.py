"""One stage on the made-up model, in a process of its own that watches its memory.

    python -m benchmarks.pipeline.streamed {make,quantize,dequantized,original} --work FOLDER

The clock starts right before the first weight is read: what Python and its packages hold by then is
not the stage's. From there on it is the kernel's high-water mark of resident memory (VmHWM, set
back by writing to /proc/self/clear_refs): anonymous pages and those of mapped files together.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.pipeline.preparation import save_model_files
from benchmarks.pipeline.preparers.order import MARK
from benchmarks.pipeline.sharded import Size, write_adapter, write_model, write_rows
from benchmarks.stage_context import stage_context
from qlora_core.artifacts import (
    AdapterCheckpoint,
    Artifact,
    PreparedDataset,
    QuantizedBase,
    SplitFacts,
)
from qlora_core.config import MergeConfig, ModelConfig, QuantizationConfig
from qlora_core.modeling import weights
from qlora_core.modeling.weights import CheckpointWeights
from qlora_core.sources import find_source
from qlora_core.stages import merge
from qlora_core.stages.merge import merge_adapter
from qlora_core.stages.quantize import quantize_base

STAGES = ("quantize", "dequantized", "original")


@dataclass
class Watched:
    """Memory of this process, in bytes."""

    before: int = 0
    """Resident right before the first weight was read."""
    peaks: dict[str, int] = field(default_factory=dict)
    """Of each part, above ``before``."""
    anonymous: dict[str, int] = field(default_factory=dict)
    """Anonymous pages at the end of each part, above those before."""
    largest_tensor: int = 0
    """Of what was written."""
    _anonymous_before: int = 0

    def start(self) -> None:
        """Take what there is now as given."""
        self.before, self._anonymous_before = _status("VmRSS"), _status("RssAnon")
        _set_back()

    def end(self, part: str) -> None:
        """Note the peak since the start or the end of the last part."""
        self.peaks[part] = _status("VmHWM") - self.before
        self.anonymous[part] = _status("RssAnon") - self._anonymous_before
        _set_back()


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: this needs Linux 4.5 or newer.")


def _set_back() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def at_first_read(then: Callable[[], None]) -> None:
    """Call ``then`` right before the first tensor's bytes are read in this process."""
    read = weights.read_tensor

    def first(*args: Any) -> torch.Tensor:
        setattr(weights, "read_tensor", read)  # noqa: B010  # a function in place of another
        then()
        return read(*args)

    setattr(weights, "read_tensor", first)  # noqa: B010


def make(work: Path) -> None:
    """Write the model, then everything that merging reads."""
    save_model_files(work / "model")
    num_shards = write_model(work / "model", Size())
    print(MARK + json.dumps({"num_shards": num_shards}), flush=True)


def quantize(work: Path) -> None:
    """Run `quantize_base`."""
    watched = Watched()
    at_first_read(watched.start)
    model, source = ModelConfig(source=str(work / "model")), find_source(str(work / "model"))
    quantization = QuantizationConfig(compute_dtype="float32")
    shutil.rmtree(work / "base", ignore_errors=True)
    facts = quantize_base(stage_context(work / "base"), model, quantization, source, None)
    watched.end("quantize")
    _report(watched, work / "base")
    (work / "base.json").write_text(facts.model_dump_json(), "utf-8")
    write_adapter(work / "base", work / "adapter")
    write_rows(work / "data")


def fold(work: Path, onto: Any) -> None:
    """Run `merge_adapter`; its comparison with the tuned model is a part of its own."""
    watched = Watched()
    at_first_read(watched.start)
    compare = merge._measure_all

    def noting(*args: Any) -> Any:
        watched.end("fold")
        found = compare(*args)
        watched.end("compare")
        return found

    setattr(merge, "_measure_all", noting)  # noqa: B010
    out = work / onto
    merge_adapter(
        stage_context(out),
        MergeConfig(onto=onto, max_shard_bytes=200_000_000, batch_size=4),
        ModelConfig(source=str(work / "model")),
        _artifact("quantize_base", work / "base", _base_facts(work)),
        _artifact("train_adapter", work / "adapter", _adapter_facts()),
        _artifact("prepare_dataset", work / "data", _data_facts()),
        find_source(str(work / "model")),
    )
    _report(watched, out)
    shutil.rmtree(out)


def _report(watched: Watched, out: Path) -> None:
    infos = CheckpointWeights(out / "model").infos().values()
    watched.largest_tensor = max(info.size_bytes for info in infos)
    print(MARK + json.dumps(asdict(watched)), flush=True)


def _artifact(stage: str, path: Path, facts: Any) -> Artifact[Any]:
    return Artifact(stage=stage, key="k" * 64, digest="d" * 64, path=path, facts=facts)


def _base_facts(work: Path) -> QuantizedBase:
    return QuantizedBase.model_validate_json((work / "base.json").read_text("utf-8"))


def _adapter_facts() -> AdapterCheckpoint:
    return AdapterCheckpoint(
        num_trainable_parameters=1, num_target_layers=1, num_steps=1, num_steps_run=1,
        num_steps_planned=1, num_tokens=1, num_supervised_tokens=1, train_loss=1.0,
        heldout_loss=1.0, stopped_early=False, seconds=1.0, tokens_per_s=1.0,
        supervised_tokens_per_s=1.0, peak_memory_bytes=1, num_workers=1, num_attempts=1,
    )  # fmt: skip


def _data_facts() -> PreparedDataset:
    split = SplitFacts(num_rows=1, num_tokens=1, num_supervised_tokens=1, length_quantiles={})
    return PreparedDataset(
        num_rows_read=1, dropped={}, train=split, heldout=split, num_prompts=1, format="messages",
        sample="",
    )  # fmt: skip


def main() -> None:
    """Do what was ordered."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("make", *STAGES))
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    if given.what == "make":
        make(given.work)
    elif given.what == "quantize":
        quantize(given.work)
    else:
        fold(given.work, given.what)


if __name__ == "__main__":
    main()
