"""What Prefect, Ray, MLflow and the store add to a run, and to a training step.

The same recipe on a tiny model: with `qlora run`, in a home of its own whose servers have to start
first (cold) and then, with another seed, on the servers that are there (warm); and stage by stage
in one process (`plainly`). All three import everything anew.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.pipeline.children import measured_by
from benchmarks.record import ROOT, say
from benchmarks.training.summary import Spread, spread

LIMIT_S, LIMIT_SHARE = 20.0, 0.01
_NUM_ROWS = 60
_RECIPE = """\
name: tiny
seed: {seed}
model: {{source: {model}}}
dataset: {{source: {rows}, max_length: 128, heldout: {{fraction: 0.2}}}}
adapter: {{rank: 4}}
training: {{epochs: 100, max_steps: 6, global_batch: 4, micro_batch: 4}}
evaluation: {{max_new_tokens: 4, num_samples: 2}}
"""


@dataclass(frozen=True)
class Run:
    """Wall seconds of one recipe."""

    cold_s: float
    """`qlora run`, servers included."""
    warm_s: float
    """`qlora run`, on servers that are there."""
    plain_s: float
    """All stages one after the other in one process."""
    stages_s: dict[str, float]
    """Of that, each stage's own; the rest is Python starting and importing."""


@dataclass(frozen=True)
class Orchestration:
    """What was measured."""

    runs: list[Run]
    cold_added_s: Spread
    warm_added_s: Spread
    step_s: Spread
    desk_s: Spread
    """Of each step: journal, notes, tracking."""
    snapshot_s: float
    snapshot_every_s: float
    step_share: float
    """Of training's time that goes into the desk and snapshots."""


def measure(work: Path, rounds: int, workload: Path, num_steps: int) -> Orchestration:
    """Measure ``rounds`` runs each way, and ``num_steps`` steps of real training.

    Args:
        work: Where the tiny model and all that is made go.
        rounds: Times that the recipe is run each way.
        workload: Of `benchmarks.training`: a model of real size and its rows.
        num_steps: Steps trained on it.
    """
    runs = [_run(work, number) for number in range(1, rounds + 1)]
    say("orchestration: steps of training")
    paper = measured_by("paperwork", "--workload", workload, "--steps", str(num_steps))
    steps, desk = paper["step_s"], paper["desk_s"]
    snapshots = paper["snapshot_s"] / paper["snapshot_every_s"]
    return Orchestration(
        runs,
        spread([run.cold_s - run.plain_s for run in runs]),
        spread([run.warm_s - run.plain_s for run in runs]),
        spread(steps),
        spread(desk),
        paper["snapshot_s"],
        paper["snapshot_every_s"],
        sum(desk) / sum(steps) + snapshots,
    )


def _run(work: Path, number: int) -> Run:
    with tempfile.TemporaryDirectory(dir=work, prefix="run") as name:
        folder = Path(name)
        _write_model(folder / "model")
        rows = folder / "rows.jsonl"
        chats = (
            {"prompt": f"say {i}", "completion": f"the answer is {i}"} for i in range(_NUM_ROWS)
        )
        rows.write_text("".join(json.dumps(chat) + "\n" for chat in chats), "utf-8")
        recipes = []
        for seed in (0, 1, 2):
            recipes.append(folder / f"recipe{seed}.yaml")
            text = _RECIPE.format(seed=seed, model=folder / "model", rows=rows)
            recipes[-1].write_text(text, "utf-8")
        say(f"orchestration, run {number}: stage by stage")
        started = time.perf_counter()
        stages = measured_by("plainly", "--recipe", recipes[0], "--out", folder / "plain")
        plain = time.perf_counter() - started
        environment = _environment(folder / "home")
        try:
            say(f"orchestration, run {number}: qlora run, servers start")
            cold = _qlora(environment, "run", str(recipes[1]))
            say(f"orchestration, run {number}: qlora run, servers are there")
            shutil.rmtree(folder / "home" / "store", ignore_errors=True)
            warm = _qlora(
                environment, "run", str(recipes[2]),
                "--set", f"workspace.store={folder / 'another'}",
            )  # fmt: skip
        finally:
            _qlora(environment, "ui", "--stop", "--force")
    return Run(cold, warm, plain, stages)


def _environment(home: Path) -> dict[str, str]:
    kept = {n: v for n, v in os.environ.items() if n not in ("PREFECT_API_URL", "QLORAFLOW_HOME")}
    quiet = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "QLORAFLOW_HOME": str(home)}
    return {**kept, **quiet}


def _qlora(environment: dict[str, str], *arguments: str) -> float:
    """Call the command line; return its wall seconds."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "flows", *arguments],
        capture_output=True, text=True, cwd=ROOT, check=False, env=environment,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"qlora {' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}")
    return time.perf_counter() - started


def _write_model(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; "
        "from benchmarks.pipeline import preparation, sharded; "
        "preparation.save_model_files(Path(sys.argv[1])); sharded.write_model(Path(sys.argv[1]), "
        "sharded.Size(num_layers=2, hidden=64, intermediate=128))"
    )
    subprocess.run(
        [sys.executable, "-c", code, folder],
        cwd=ROOT, check=True, env=_environment(folder), capture_output=True,
    )  # fmt: skip
