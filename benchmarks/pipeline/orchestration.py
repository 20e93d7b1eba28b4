"""What Prefect, Ray, MLflow and the store add to a run, and to a training step.

The same recipe on a tiny model: with `qlora run`, in a home of its own, where the servers have to
start first and MLflow's database has to be made (cold), and then, with another seed, on the servers
and the database that are there (warm); and stage by stage in one process (`plainly`). All three
import everything anew; so that none of them pays for reading packages from the disk, all are
imported, and the stages run once, before anything is measured.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peak import watch
from benchmarks.pipeline.children import measured_by, read_measured
from benchmarks.record import ROOT, say
from benchmarks.training.summary import Spread, spread

LIMIT_S, LIMIT_SHARE = 20.0, 0.01
_NUM_ROWS = 60
_LOOK_EVERY_S = 0.5
_IMPORTS = "import mlflow, prefect.server.api.server, ray.train, ray.tune, flows.finetune"
RECIPE = """\
name: tiny
seed: {seed}
model: {{source: {model}}}
dataset: {{source: {rows}, max_length: 128, heldout: {{fraction: 0.2}}}}
adapter: {{rank: 4}}
training: {{epochs: 100, max_steps: 6, global_batch: 4, micro_batch: 4}}
evaluation: {{max_new_tokens: 4, num_samples: 2}}
"""


@dataclass(frozen=True)
class Taken:
    """Seconds of a command."""

    wall_s: float
    cpu_s: float
    """Of all processes that it started, servers included."""


@dataclass(frozen=True)
class Run:
    """One recipe."""

    cold: Taken
    """`qlora run` as the first on a machine."""
    warm: Taken
    """`qlora run`, on servers and a database that are there; nothing else is."""
    plain: Taken
    """All stages one after the other in one process."""
    stages_s: dict[str, float]
    """Of that, each stage's own wall seconds; the rest is Python starting and importing."""


@dataclass(frozen=True)
class Orchestration:
    """What was measured."""

    runs: list[Run]
    added_wall_s: dict[str, Spread]
    added_cpu_s: dict[str, Spread]
    """By `cold` and `warm`."""
    step_s: Spread
    desk_s: Spread
    """Of each step: journal, notes, tracking."""
    snapshot_s: float
    snapshot_every_s: float
    wall_share: float
    """Of training's time that goes into the desk and snapshots."""
    cpu_share: float
    """Of its CPU time; unlike wall time, the same on a machine with other work."""


def measure(work: Path, rounds: int, workload: Path, num_steps: int) -> Orchestration:
    """Measure ``rounds`` runs each way, and ``num_steps`` steps of real training.

    Args:
        work: Where the tiny model and all that is made go.
        rounds: Times that the recipe is run each way.
        workload: Of `benchmarks.training`: a model of real size and its rows.
        num_steps: Steps trained on it.
    """
    _warm_up(work)
    runs = [_run(work, number) for number in range(1, rounds + 1)]
    say("orchestration: steps of training")
    paper = measured_by("paperwork", "--workload", workload, "--steps", str(num_steps))
    every = paper["snapshot_every_s"]
    cpu_per_s = sum(paper["step_cpu_s"]) / sum(paper["step_s"][1:])
    return Orchestration(
        runs,
        _added(runs, lambda taken: taken.wall_s),
        _added(runs, lambda taken: taken.cpu_s),
        spread(paper["step_s"]),
        spread(paper["desk_s"]),
        paper["snapshot_s"],
        every,
        sum(paper["desk_s"]) / sum(paper["step_s"]) + paper["snapshot_s"] / every,
        sum(paper["desk_cpu_s"][1:]) / sum(paper["step_cpu_s"])
        + paper["snapshot_cpu_s"] / (every * cpu_per_s),
    )


def _added(runs: list[Run], seconds: Callable[[Taken], float]) -> dict[str, Spread]:
    return {
        "cold": spread([seconds(run.cold) - seconds(run.plain) for run in runs]),
        "warm": spread([seconds(run.warm) - seconds(run.plain) for run in runs]),
    }


def _warm_up(work: Path) -> None:
    """Import all packages, and run the stages plainly; nothing is kept of it."""
    say("orchestration: a run to warm up")
    with tempfile.TemporaryDirectory(dir=work, prefix="run") as name:
        folder = Path(name)
        environment = _environment(folder / "home")
        _taken(["-c", _IMPORTS], environment, folder / "imports.txt")
        _plainly(_write_recipes(folder)[0], folder, environment)


def _run(work: Path, number: int) -> Run:
    with tempfile.TemporaryDirectory(dir=work, prefix="run") as name:
        folder = Path(name)
        recipes = _write_recipes(folder)
        environment = _environment(folder / "home")
        say(f"orchestration, run {number}: stage by stage")
        plain, stages = _plainly(recipes[0], folder, environment)
        try:
            say(f"orchestration, run {number}: qlora run, servers start")
            cold = _qlora(environment, "run", str(recipes[1]))
            say(f"orchestration, run {number}: qlora run, servers are there")
            warm = _qlora(
                environment, "run", str(recipes[2]),
                "--set", f"workspace.store={folder / 'another'}",
                "--set", f"workspace.tracking_uri=sqlite:///{folder / 'home' / 'mlflow.db'}",
            )  # fmt: skip
        finally:
            _qlora(environment, "ui", "--stop", "--force")
    return Run(cold, warm, plain, stages)


def _write_recipes(folder: Path) -> list[Path]:
    """Write model, rows and a recipe for each of three seeds."""
    _write_model(folder / "model")
    rows = folder / "rows.jsonl"
    chats = ({"prompt": f"say {i}", "completion": f"the answer is {i}"} for i in range(_NUM_ROWS))
    rows.write_text("".join(json.dumps(chat) + "\n" for chat in chats), "utf-8")
    recipes = []
    for seed in (0, 1, 2):
        recipes.append(folder / f"recipe{seed}.yaml")
        text = RECIPE.format(seed=seed, model=folder / "model", rows=rows)
        recipes[-1].write_text(text, "utf-8")
    return recipes


def _plainly(
    recipe: Path, folder: Path, environment: dict[str, str]
) -> tuple[Taken, dict[str, float]]:
    """Run the stages one after the other; return what all took, and each stage's wall seconds."""
    told = folder / "plainly.txt"
    command = ["-m", "benchmarks.pipeline.plainly", "--recipe", str(recipe)]
    taken = _taken([*command, "--out", str(folder / "plain")], environment, told)
    return taken, read_measured(told.read_text("utf-8"))


def _environment(home: Path) -> dict[str, str]:
    kept = {n: v for n, v in os.environ.items() if n not in ("PREFECT_API_URL", "QLORAFLOW_HOME")}
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",  # as `qlora` sets it; in the plain way as well
        "PYTHONPATH": str(ROOT),
        "QLORAFLOW_HOME": str(home),
    }
    return {**kept, **quiet}


def _qlora(environment: dict[str, str], *arguments: str) -> Taken:
    log = Path(environment["QLORAFLOW_HOME"]).with_name("qlora.txt")
    return _taken(["-m", "flows", *arguments], environment, log)


def _taken(arguments: list[str], environment: dict[str, str], log: Path) -> Taken:
    """Run Python; return what it and all that it started took."""
    with log.open("w", encoding="utf-8") as said:
        found = watch(
            [sys.executable, *arguments], _LOOK_EVERY_S, cwd=ROOT, env=environment,
            stdout=said, stderr=subprocess.STDOUT,
        )  # fmt: skip
    if found.exit_code:
        end = log.read_text("utf-8", "replace")[-3000:]
        raise RuntimeError(f"python {' '.join(arguments)} failed:\n{end}")
    return Taken(found.wall_s, found.cpu_s)


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
