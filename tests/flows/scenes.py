"""Runs of the finetune flow on a tiny Llama: a recipe, a person who watches, a process to kill."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from qlora_core.backends.memory import SilentProgress
from qlora_core.config import RunConfig
from qlora_core.ports import Launcher, StepMetrics, TrainJob

NUM_STEPS = 6
STAGES = (
    "prepare_dataset",
    "quantize_base",
    "evaluate base",
    "train_adapter",
    "evaluate tuned",
    "merge_adapter",
    "evaluate merged",
    "register_model",
)
"""All that a run does, as it is told to a person, in an order in which it may be done."""


def write_rows(folder: Path, num_rows: int = 48) -> Path:
    path = folder / "rows.jsonl"
    rows = ({"prompt": f"say {i}", "completion": f"the answer is {i}"} for i in range(num_rows))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_recipe(store: Path, model: Path, rows: Path, **changes: Any) -> RunConfig:
    """A recipe that takes seconds; ``changes`` are dotted names with `__` for the dot."""
    data: dict[str, Any] = {
        "name": "tiny",
        "model": {"source": str(model)},
        "dataset": {"source": str(rows), "max_length": 128, "heldout": {"fraction": 0.2}},
        "adapter": {"rank": 4},
        "training": {"epochs": 100, "max_steps": NUM_STEPS, "global_batch": 4, "micro_batch": 4},
        "evaluation": {"max_new_tokens": 4, "num_samples": 2},
        "workspace": {"store": str(store)},
        "snapshots": {"every_steps": 1},
    }
    for name, value in changes.items():
        part, _, field = name.partition("__")
        data.setdefault(part, {})[field] = value
    return RunConfig.model_validate(data)


HELD = {"evaluate tuned": "merge_adapter"}
"""What else could be done when a stage is stood in, and must not: it is to be killed later."""


class Watcher(SilentProgress):
    """Notes who reported; stands still in the middle of one stage, as if somebody pulled a plug."""

    def __init__(self, stand_at: str = "", at_least: float = 0.0, standing: Any = None) -> None:
        self.built: set[str] = set()
        self._stand_at, self._at_least, self._standing = stand_at, at_least, standing

    def update(self, stage: str, done: float, total: float, note: str = "") -> None:
        if note != "cached":
            self.built.add(stage)
            self._stand(stage, done)

    def say(self, stage: str, message: str) -> None:
        self._stand(stage, 0.0)

    def _stand(self, stage: str, done: float) -> None:
        if stage == self._stand_at and done >= self._at_least:
            self._standing.set()
            time.sleep(600)
        if stage == HELD.get(self._stand_at):
            time.sleep(600)


class FullCluster:
    """A launcher whose turn never comes: training has not begun, and has left no trace."""

    def awake(self) -> AbstractContextManager[None]:
        return nullcontext()

    def train(self, job: TrainJob, on_step: Callable[[StepMetrics], None]) -> None:
        time.sleep(600)


def child_run(
    config: RunConfig, environment: dict[str, str], stand_at: str, at_least: float, standing: Any
) -> None:
    """What a killed process ran: the command's own entry, with a person who watches."""
    os.environ.update(environment)
    from flows.finetune import run_recipe
    from qlora_core.backends.in_process import InProcessLauncher
    from tasks.wiring import Surroundings

    watcher = Watcher(stand_at, at_least, standing)
    beside = stand_at == "evaluate base"  # training would be over before it is its turn
    launcher = FullCluster() if beside else InProcessLauncher(config.snapshots)
    run_recipe(config, Surroundings(watcher, launcher))


def child_run_on_ray(config: RunConfig, environment: dict[str, str], stepping: Any) -> None:
    """The same on Ray; nobody stands still, the first steps are told."""
    _child_run_told(config, environment, stepping, None)


def child_run_in_process(config: RunConfig, environment: dict[str, str], stepping: Any) -> None:
    """The same without Ray."""
    from qlora_core.backends.in_process import InProcessLauncher

    _child_run_told(config, environment, stepping, InProcessLauncher(config.snapshots))


def _child_run_told(
    config: RunConfig, environment: dict[str, str], stepping: Any, launcher: Launcher | None
) -> None:
    os.environ.update(environment)
    from flows.finetune import run_recipe
    from tasks.wiring import Surroundings

    class Teller(SilentProgress):
        def update(self, stage: str, done: float, total: float, note: str = "") -> None:
            if stage == "train_adapter" and done >= 3:
                stepping.set()

    try:
        run_recipe(config, Surroundings(Teller(), launcher))
    except KeyboardInterrupt:
        os._exit(130)


class Children:
    """Processes that have everything imported already: forked from a server that has."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["flows.finetune"])

    def event(self) -> Any:
        return self._context.Event()

    def start(self, target: Any, *args: Any) -> Any:
        process = self._context.Process(target=target, args=args)
        process.start()
        return process

    def kill_in(self, config: RunConfig, environment: dict[str, str], stage: str) -> int:
        """Run ``config``, end it with SIGKILL in the middle of ``stage``; return its exit code."""
        standing = self.event()
        at_least = 3.0 if stage == "train_adapter" else 0.0
        process = self.start(child_run, config, environment, stage, at_least, standing)
        assert standing.wait(120), f"{stage} never began"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        return process.exitcode
