"""All stages of a recipe one after the other in this process: no Prefect, Ray, MLflow or store.

    python -m benchmarks.pipeline.plainly --recipe FILE --out FOLDER

What `qlora run` takes longer for the same recipe is what orchestration costs.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.pipeline.preparers.order import MARK
from benchmarks.stage_context import stage_context
from qlora_core.artifacts import Artifact
from qlora_core.config import RunConfig
from qlora_core.ports import Stage
from qlora_core.recipe import load_config
from qlora_core.sources import find_source
from qlora_core.stages import evaluate, merge, prepare, quantize, register, train


class Stages:
    """Runs stages and notes how long each one took."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.seconds: dict[str, float] = {}

    def run(self, role: str, stage: Stage[Any, Any], *inputs: Any) -> Artifact[Any]:
        """Run a stage into a folder of its own."""
        started = time.perf_counter()
        facts = stage(stage_context(self._out / role), *inputs)
        self.seconds[role] = time.perf_counter() - started
        key = role.ljust(64, "0")
        return Artifact(stage=stage.name, key=key, digest=key, path=self._out / role, facts=facts)


def run_plainly(config: RunConfig, out: Path) -> dict[str, float]:
    """Run the recipe; return the seconds of each stage."""
    stages = Stages(out)
    rows, source = find_source(config.dataset.source), find_source(config.model.source)
    model = config.model
    training = (config.quantization, config.adapter, config.training, config.seed)
    data = stages.run(
        "data", prepare.prepare_dataset, config.dataset, model, rows, None, source, None
    )
    base = stages.run("base", quantize.quantize_base, model, config.quantization, source, None)
    adapter = stages.run("adapter", train.train_adapter, base, data, *training)
    merged = stages.run(
        "merged", merge.merge_adapter, config.merge, model, base, adapter, data, source
    )
    subjects = {"base": (None, None), "tuned": (adapter, None), "merged": (None, merged)}
    reports = [
        stages.run(
            f"{name}_report", evaluate.evaluate_model, config.evaluation, data, base, *subject, ()
        )
        for name, subject in subjects.items()
    ]
    stages.run(
        "registered", register.register_model, config.registry, config.gate, config.name, base,
        adapter, merged, *reports,
    )  # fmt: skip
    return stages.seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    print(MARK + json.dumps(run_plainly(load_config(given.recipe), given.out)), flush=True)
