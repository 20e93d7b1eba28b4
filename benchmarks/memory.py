"""The peak of memory as it was planned, beside the peak as it is then measured.

    python -m benchmarks.memory [--micro-batches 2,8,16] [--steps 6]

Each setting is a training of its own on a Ray worker, as in a run: what the worker planned before
its first step, and the kernel's high-water mark after its last.
"""

import argparse
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from benchmarks.record import as_stated, found_gsm8k, say, store, versions
from benchmarks.training.making import Wish, found_workload
from benchmarks.training.workload import open_workload
from qlora_core.artifacts import AdapterCheckpoint
from qlora_core.backends.ray_train import RayTrainLauncher
from qlora_core.config import (
    AdapterConfig,
    ClusterConfig,
    QuantizationConfig,
    SnapshotConfig,
    TrainingConfig,
)
from qlora_core.modeling.dtypes import present_device_type
from qlora_core.ports import StepMetrics, TrainJob
from qlora_core.training.desk import SUMMARY_FILE

_NUM_ROWS, _SMALLEST_BATCH = 500, 8


@dataclass(frozen=True)
class Setting:
    """How a micro-batch is computed."""

    micro_batch: int
    checkpointing: Literal["on", "off"] = "off"
    keep_dequantized: Literal["auto", "off"] = "auto"


@dataclass(frozen=True)
class Peak:
    """Of one worker [bytes]."""

    planned: int
    measured: int

    @property
    def error(self) -> float:
        """How far the plan is off, as a share of what was measured."""
        return self.planned / self.measured - 1


def main() -> int:
    """Train in every setting; print planned and measured peaks, and store them."""
    options = _options()
    dtype = "bfloat16" if present_device_type() == "cuda" else "float32"
    wish = Wish(found_gsm8k(options.gsm8k), _NUM_ROWS, _SMALLEST_BATCH, dtype)
    workload = found_workload(wish)
    settings = [Setting(micro_batch) for micro_batch in options.micro_batches]
    settings += [Setting(micro_batch, checkpointing="on") for micro_batch in options.micro_batches]
    settings += [Setting(max(options.micro_batches), keep_dequantized="off")]
    peaks = []
    print("micro-batch  checkpointing  dequantised  planned GB  measured GB  difference")
    for setting in settings:
        peak = measure(workload, setting, options.steps)
        peaks.append(asdict(setting) | asdict(peak))
        print(
            f"{setting.micro_batch:11}  {setting.checkpointing:>13}  "
            f"{setting.keep_dequantized:>11}  {peak.planned / 1e9:10.2f}  "
            f"{peak.measured / 1e9:11.2f}  {peak.error:+10.1%}",
            flush=True,
        )
    found = {
        "options": as_stated(vars(options)),
        "workload": asdict(open_workload(workload).settings),
        "versions": versions(),
        "peaks": peaks,
    }
    say(f"stored in {store(options.out, 'memory', 'planned and measured peaks', found)}")
    return 0


def measure(workload: Path, setting: Setting, num_steps: int) -> Peak:
    """Train ``num_steps`` steps on a worker; return what it planned and what it needed."""
    with tempfile.TemporaryDirectory() as folder:
        job = _job(workload, setting, num_steps, Path(folder))
        RayTrainLauncher(ClusterConfig(), SnapshotConfig(), say).train(job, _ignore)
        facts = AdapterCheckpoint.model_validate_json((job.scratch / SUMMARY_FILE).read_text())
    return Peak(facts.predicted_peak_bytes, facts.peak_memory_bytes)


def _job(workload: Path, setting: Setting, num_steps: int, folder: Path) -> TrainJob:
    for name in ("out", "scratch"):
        (folder / name).mkdir()
    return TrainJob(
        base=workload / "base",
        data=workload / "data",
        out=folder / "out",
        scratch=folder / "scratch",
        quantization=QuantizationConfig.model_validate(
            {
                "compute_dtype": open_workload(workload).settings.compute_dtype,
                "keep_dequantized": setting.keep_dequantized,
            }
        ),
        adapter=AdapterConfig(),
        training=TrainingConfig(
            max_steps=num_steps,
            epochs=1000,
            global_batch=max(_SMALLEST_BATCH, setting.micro_batch),
            micro_batch=setting.micro_batch,
            checkpointing=setting.checkpointing,
            heldout_rows=1,
        ),
        seed=0,
    )


def _ignore(_: StepMetrics) -> None: ...


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--micro-batches", type=_sizes, default=[2, 8, 16])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument(
        "--gsm8k", type=Path, help="GSM8K's train.jsonl; default: of QLORAFLOW_DATA, else made up"
    )
    parser.add_argument("--out", type=Path, help="folder for the results")
    return parser.parse_args()


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
