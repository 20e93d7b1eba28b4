"""One cell of the study: a base, its adapter trained with one seed, and how good both are.

    python -m benchmarks.quality.cell --method nf4 --seed 0

What is measured is what `qlora run` would measure: the same stages, through the same store, without
Prefect, Ray and MLflow around them. So whatever is finished is found again, training goes on from
its last snapshot, and cells share what they have in common (the rows, a method's base).

The environment of this process is the one that our launcher gives to its workers (see `__main__`).
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import ROOT, WORK, data_folder
from qlora_core.artifacts import (
    AdapterCheckpoint,
    Artifact,
    EvalReport,
    PreparedDataset,
    QuantizedBase,
)
from qlora_core.backends.in_process import InProcessLauncher
from qlora_core.backends.memory import MemoryRegistry, MemoryTracker
from qlora_core.config import RunConfig
from qlora_core.modeling.dtypes import dtype_name, present_device_type, resolve_compute_dtype
from qlora_core.ports import Services
from qlora_core.recipe import load_config
from qlora_core.sources import find_source
from qlora_core.stages.evaluate import evaluate_model
from qlora_core.stages.prepare import prepare_dataset
from qlora_core.stages.quantize import quantize_base
from qlora_core.stages.train import train_adapter
from qlora_core.store import Store

RECIPE = ROOT / "examples" / "e2e" / "recipe.yaml"
DATA = data_folder() / "e2e"
STORE = WORK / "quality"
METHODS = ("nf4", "none")
NUM_ROWS = 315
"""Of 4,577 held-out rows whose loss is measured, and of the test set's 630 meaning representations
that are answered: evenly spread. More cost hours and narrow little, as seeds differ by more."""


@dataclass(frozen=True)
class Place:
    """Where the study's inputs lie, and where it works."""

    data: Path
    """Folder of `devset.csv` and `testset_w_refs.csv`."""
    store: Path
    num_rows: int = NUM_ROWS
    max_steps: int | None = None
    """Instead of the recipe's: for trying this out."""


@dataclass(frozen=True)
class Cell:
    """What was made of one method and seed."""

    method: str
    seed: int
    data: Artifact[PreparedDataset]
    base: Artifact[QuantizedBase]
    adapter: Artifact[AdapterCheckpoint]
    before: Artifact[EvalReport]
    """Of the base alone: no seed in it."""
    after: Artifact[EvalReport]


class Spoken:
    """Progress as one line now and then."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._next: dict[str, float] = {}

    def update(self, stage: str, done: float, total: float, note: str = "") -> None:
        """Tell every tenth of a stage."""
        share = done / total if total else 1.0
        if share >= self._next.get(stage, 0.0):
            self._next[stage] = share + 0.1
            self._tell(f"{stage} {share:.0%} {note}")

    def say(self, stage: str, message: str) -> None:
        """Tell a message."""
        self._tell(f"{stage}: {message}")

    def _tell(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {self._name}: {text}", file=sys.stderr, flush=True)


def recipe(method: str, seed: int, place: Place) -> RunConfig:
    """Return the example's recipe with what the study changes of it.

    Raises:
        ConfigError: The data are not where ``place`` says.
    """
    changed = [
        f"dataset.source={place.data / 'devset.csv'}",
        f"dataset.heldout.source={place.data / 'testset_w_refs.csv'}",
        f"quantization.method={method}",
        f"seed={seed}",
        "evaluation.scorers=[bleu]",
        f"evaluation.max_rows={place.num_rows}",
        # measured on the way by the recipe; it does not act on training, only takes its time
        "training.heldout_every=null",
    ]
    changed += [f"training.max_steps={place.max_steps}"] if place.max_steps else []
    return load_config(RECIPE, changed)


def measure(method: str, seed: int, place: Place) -> Cell:
    """Return the cell, making whatever the store has not yet.

    Raises:
        QLoraError: What a stage raises.
    """
    config = recipe(method, seed, place)
    store, services = Store(place.store), _services(config, f"{method}, seed {seed}")
    model, dataset = config.model, config.dataset
    model_source = find_source(model.source, model.revision, field="model.source")
    rows = find_source(dataset.source, field="dataset.source")
    heldout = find_source(str(dataset.heldout.source), field="dataset.heldout.source")
    data = store.produce(
        prepare_dataset, services, dataset, model, rows, heldout, model_source, None
    ).artifact
    compute = resolve_compute_dtype(config.quantization.compute_dtype, present_device_type())
    quantization = config.quantization.model_copy(update={"compute_dtype": dtype_name(compute)})
    base = store.produce(quantize_base, services, model, quantization, model_source, None).artifact
    asked = config.evaluation
    before = store.produce(evaluate_model, services, asked, data, base, None, None, ()).artifact
    trained = (base, data, quantization, config.adapter, config.training, config.seed)
    adapter = store.produce(train_adapter, services, *trained).artifact
    after = store.produce(evaluate_model, services, asked, data, base, adapter, None, ()).artifact
    return Cell(method, seed, data, base, adapter, before, after)


def _services(config: RunConfig, name: str) -> Services:
    return Services(
        tracker=MemoryTracker(),
        registry=MemoryRegistry(),
        launcher=InProcessLauncher(config.snapshots),
        progress=Spoken(name),
    )


def main() -> int:
    """Make one cell."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.cell")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--rows", type=int, default=NUM_ROWS)
    parser.add_argument("--max-steps", type=int)
    given = parser.parse_args()
    place = Place(given.data, given.store, given.rows, given.max_steps)
    measure(given.method, given.seed, place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
