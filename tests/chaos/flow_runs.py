"""Whole flows: killed in every stage, and started several times at once.

Within these runs training takes place in the flow's own process, so that it stands still where it
is to be killed; `processes` kills what talks to Ray. All of them, the undisturbed one too, are
children of one kind, with the same number of threads: bytes depend on it.
"""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any
from uuid import uuid4

from qlora_core.backends.mlflow_client import connect, local_place
from qlora_core.config import RunConfig
from tests.chaos.place import Place
from tests.chaos.trial import Trial
from tests.flows.scenes import NUM_STEPS, STAGES, Watcher

_AT_ONCE_S = 300.0


def run_here(config: RunConfig, watcher: Watcher) -> Any:
    """Run a recipe in this process."""
    from flows.finetune import run_recipe
    from qlora_core.backends.in_process import InProcessLauncher
    from tasks.wiring import Surroundings

    return run_recipe(config, Surroundings(watcher, InProcessLauncher(config.snapshots)))


def kill_flow(place: Place, random: Random) -> Trial:
    """SIGKILL one run's process in each stage, one after the other, and give its command again."""
    flows, store = place.flows, place.folder / f"store-{uuid4().hex[:8]}"
    recipe = flows.recipe(store)
    sealed: dict[str, str] = {}
    problems, seconds = [], []
    for stage in STAGES:
        begun = time.monotonic()
        if flows.children.kill_in(recipe, flows.environment, stage) != -signal.SIGKILL:
            problems.append(f"the process was not killed in {stage}")
        seconds.append(time.monotonic() - begun)
        problems += _repeated(store, sealed, stage)
    (told,) = _in_children(place, recipe, 1)
    if not set(told["built"]) <= {STAGES[-1]}:
        problems.append(f"built again at the end: {told['built']}")
    problems += _equals(place, told["adapter"])
    problems += list(_mlflow_problems(store, told["mlflow_run_id"]))
    lost = max(0, 3 - told["resumed_at"][0])  # it is killed when the third is told or later
    return Trial(tuple(problems), max(seconds[1:]), lost)


def _repeated(store: Path, sealed: dict[str, str], stage: str) -> Iterator[str]:
    """Compare what is sealed with what was before."""
    from flows.records import load_record

    record = load_record(store)
    now = {role: ref.digest for role, ref in record.artifacts.items()}
    if any(now.get(role) != digest for role, digest in sealed.items()):
        yield f"an artefact was made again before {stage}"
    if record.state != "interrupted":
        yield f"a run that was killed in {stage} is {record.state}"
    sealed.update(now)


def _equals(place: Place, digest: str) -> Iterator[str]:
    if digest != undisturbed_digest(place):
        yield "the adapter has other bytes than the undisturbed run's"


def undisturbed_digest(place: Place) -> str:
    """Return the digest of the adapter of a run that nothing happened to."""
    store, kept = place.folder / "store-undisturbed", place.folder / "undisturbed.txt"
    if not kept.exists():
        (told,) = _in_children(place, place.flows.recipe(store), 1)
        kept.write_text(told["adapter"])
    return kept.read_text()


def _mlflow_problems(store: Path, run_id: str) -> Iterator[str]:
    from flows.records import records

    if len(records(store)) != 1:
        yield f"{len(records(store))} runs on record instead of one"
    client = connect(local_place(store).tracking_uri)
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id])
    if [run.info.run_id for run in runs] != [run_id]:
        yield f"{len(runs)} MLflow runs instead of one"
    steps = Counter(point.step for point in client.get_metric_history(run_id, "train/loss"))
    if steps != Counter(range(1, NUM_STEPS + 1)):
        yield f"train/loss has the points {dict(steps)}"


def child_run(config: RunConfig, environment: dict[str, str], answer: Path) -> None:
    """Run a recipe in a process of its own; leave what it built, and what it got."""
    os.environ.update(environment)
    watcher = Watcher()
    result = run_here(config, watcher)
    told = {
        "built": sorted(watcher.built),
        "adapter": result.adapter.digest,
        "resumed_at": result.adapter.facts.resumed_at,
        "mlflow_run_id": result.mlflow_run_id,
    }
    answer.write_text(json.dumps(told), "utf-8")


def _in_children(place: Place, recipe: RunConfig, count: int) -> list[dict[str, Any]]:
    """Run a recipe in ``count`` processes at the same moment; return what those that finish say."""
    flows, folder = place.flows, place.folder / f"answers-{uuid4().hex[:8]}"
    folder.mkdir()
    answers = [folder / f"{number}.json" for number in range(count)]
    processes = [
        flows.children.start(child_run, recipe, flows.environment, answer) for answer in answers
    ]
    for process in processes:
        process.join(_AT_ONCE_S)
        process.kill()
    return [json.loads(answer.read_text("utf-8")) for answer in answers if answer.exists()]


def start_at_once(place: Place, random: Random, least: int = 2, most: int = 6) -> Trial:
    """Start one recipe in several processes at the same moment."""
    store, count = place.folder / f"store-{uuid4().hex[:8]}", random.randint(least, most)
    told = _in_children(place, place.flows.recipe(store), count)
    built = Counter(stage for each in told for stage in each["built"])
    problems = [f"{stage} was done {n} times" for stage, n in built.items() if n > 1]
    if len(told) != count:
        problems.append(f"only {len(told)} of {count} runs finished")
    if built["train_adapter"] != 1:
        problems.append(f"{built['train_adapter']} trainings instead of one")
    for digest in {each["adapter"] for each in told}:
        problems += _equals(place, digest)
    return Trial(tuple(problems), remarks=(f"{count} at once",))
