"""What do 4 bits cost, and how much of it does training win back?

    python -m benchmarks.quality --data FOLDER

Trains examples/e2e on the NF4 base and on the unquantised one, with the same seeds, and compares
held-out loss and BLEU before and after. Hours of one core: everything finished is kept, so a run
that was interrupted goes on where it was when the same command is given again.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.quality.cell import (
    DATA,
    METHODS,
    NUM_ROWS,
    RECIPE,
    STORE,
    Cell,
    Place,
    measure,
)
from benchmarks.quality.comparison import CONFIDENCE, Answers, Comparison, compare
from benchmarks.quality.table import table
from benchmarks.record import ROOT, num_cores, say, store
from qlora_core.artifacts import EvalReport
from qlora_core.backends.ray_resources import WORKER_PROCESS
from qlora_core.evaluation.records import read_records

QUANTIZED, WHOLE = METHODS
METRICS = ("loss", "bleu")
_WHAT = "held-out loss and BLEU of examples/e2e, quantised against unquantised base"
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "sacrebleu")


def main() -> int:
    """Make all cells; print the table and store the results."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cells are ended as well
    place = Place(
        options.data.absolute(), options.store.absolute(), options.rows, options.max_steps
    )
    for seed in options.seeds:
        if problem := _make_cells(seed, place):
            say(problem)
            return 1
    cells = {m: [measure(m, seed, place) for seed in options.seeds] for m in METHODS}
    reports = [r for made in cells.values() for cell in made for r in (cell.before, cell.after)]
    require_same_rows([report.facts for report in reports])
    answers = {method: _answers(made) for method, made in cells.items()}
    found = [compare(metric, QUANTIZED, WHOLE, answers) for metric in METRICS]
    print(table(found, QUANTIZED, WHOLE))
    say(f"stored in {_store(options, cells, found)}")
    return 0


def require_same_rows(reports: Sequence[EvalReport]) -> None:
    """Refuse to pair what was not measured on the same rows.

    Raises:
        ValueError: It was not.
    """
    digests = {report.dataset_digest for report in reports}
    if len(digests) > 1:
        raise ValueError(
            f"The reports were measured on {len(digests)} different sets of rows, so they cannot "
            "be paired: the data changed while the cells were made. Run the same command again."
        )


def _make_cells(seed: int, place: Place) -> str:
    """Make a seed's cells side by side, each with its share of the cores; return what went wrong.

    Side by side, as cores that work for themselves need not wait for each other.
    """
    threads = max(1, num_cores() // len(METHODS))
    environment = {**os.environ, **WORKER_PROCESS, "OMP_NUM_THREADS": str(threads)}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    asked = ["--seed", str(seed), "--rows", str(place.num_rows)]
    asked += ["--data", str(place.data), "--store", str(place.store)]
    asked += ["--max-steps", str(place.max_steps)] if place.max_steps else []
    started = {
        method: subprocess.Popen(
            [sys.executable, "-m", "benchmarks.quality.cell", "--method", method, *asked],
            env=environment,
            cwd=ROOT,
        )
        for method in METHODS
    }
    try:
        failed = [method for method, process in started.items() if process.wait()]
    finally:
        for process in started.values():
            process.terminate()
    return f"seed {seed}: {', '.join(failed)} failed; see above." if failed else ""


def _answers(cells: Sequence[Cell]) -> Answers:
    return Answers(
        before=read_records(cells[0].before.path),
        after=tuple(read_records(cell.after.path) for cell in cells),
    )


def _store(
    options: argparse.Namespace, cells: Mapping[str, Sequence[Cell]], found: Sequence[Comparison]
) -> Path:
    measured: dict[str, Any] = {
        "options": {name: getattr(options, name) for name in ("seeds", "rows", "max_steps")},
        "recipe": str(RECIPE.relative_to(ROOT)),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "confidence": CONFIDENCE,
        "comparisons": [asdict(each) for each in found],
        "cells": [_cell(cell) for made in cells.values() for cell in made],
    }
    return store(options.out, "quality", _WHAT, measured)


def _cell(cell: Cell) -> dict[str, Any]:
    """Return what a reader may want to know of a cell beyond the comparison."""
    base = cell.base.facts
    return {
        "method": cell.method,
        "seed": cell.seed,
        "base": base.model_dump(mode="json", exclude={"layer_errors"}),
        "adapter": cell.adapter.facts.model_dump(mode="json"),
        "before": _report(cell.before.facts),
        "after": _report(cell.after.facts),
    }


def _report(facts: EvalReport) -> dict[str, Any]:
    shown: dict[str, Any] = facts.model_dump(mode="json", exclude={"samples"})
    return shown


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--data", type=Path, default=DATA, metavar="FOLDER",
        help="of devset.csv and testset_w_refs.csv; default: e2e of QLORAFLOW_DATA")  # fmt: skip
    add("--seeds", type=_numbers, default=[0, 1, 2], help="default: 0,1,2")
    add("--rows", type=int, default=NUM_ROWS,
        help="held-out rows, and at most as many meaning representations")  # fmt: skip
    add("--max-steps", type=int, help="instead of the recipe's 120: to try this out")
    add("--store", type=Path, default=STORE, help="where finished work is kept and found again")
    add("--out", type=Path, help="folder for the results; default: benchmarks/results")
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
