"""Where trials take place: a tiny base, rows, jobs on them, and what undisturbed ones leave.

A `Place` is made once and used by all trials. What few of them need (a Prefect server, say) is
started by the first that asks for it, and ended with the place.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from qlora_core.backends.in_process import InProcessLauncher
from qlora_core.backends.ray_train import RayTrainLauncher
from qlora_core.config import (
    AdapterConfig,
    ClusterConfig,
    QuantizationConfig,
    SnapshotConfig,
    TrainingConfig,
)
from qlora_core.ports import StepMetrics, TrainJob
from tests.tiny import make_tiny_llama
from tests.training.conftest import SMALL, write_base, write_dataset

INTERVAL = 5
"""Steps between snapshots."""
SNAPSHOTS = SnapshotConfig(every_steps=INTERVAL, every_s=1e9)
NUM_STEPS = 120
"""About two seconds of training: long enough for a fault to fall anywhere."""
GENTLE = 3e-5
"""A learning rate at which rounding is not amplified, so that long curves can be compared."""
OnStep = Callable[[StepMetrics], None]


def ignore(_: StepMetrics) -> None:
    """Listen to no step."""


@dataclass(frozen=True)
class FlowHome:
    """What runs of whole flows share."""

    recipe: Any
    """A function of a store's folder that returns a recipe."""
    environment: dict[str, str]
    """That leads a child process to the server."""
    children: Any


class Place:
    """What trials share.

    Args:
        folder: Where everything is written.
        stack: Ends what was started on the way.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self._undisturbed: dict[tuple[int, int], Path] = {}

    @cached_property
    def model(self) -> Path:
        """Folder of the tiny Llama."""
        return make_tiny_llama(self.folder / "model")

    @cached_property
    def base(self) -> Path:
        """Folder of the tiny Llama in NF4."""
        return write_base(self.folder / "base", self.model, is_nf4=True)

    @cached_property
    def data(self) -> Path:
        """Folder of a few prepared rows."""
        return write_dataset(self.folder / "data")

    def job(
        self,
        *,
        num_steps: int = NUM_STEPS,
        scratch: Path | None = None,
        learning_rate: float = GENTLE,
    ) -> TrainJob:
        """Return a new job, the same work as all others of so many steps."""
        folder = self.folder / f"job-{uuid4().hex[:8]}"
        scratch = scratch or folder / "scratch"
        for made in (folder / "out", scratch):
            made.mkdir(parents=True, exist_ok=True)
        settings = SMALL | {"epochs": 1e6, "max_steps": num_steps, "heldout_every": None}
        settings["learning_rate"] = learning_rate
        return TrainJob(
            base=self.base,
            data=self.data,
            out=folder / "out",
            scratch=scratch,
            quantization=QuantizationConfig(),
            adapter=AdapterConfig(rank=4),
            training=TrainingConfig(**settings),
            seed=3,
            base_name="tiny",
        )

    def undisturbed(self, num_workers: int, num_steps: int = NUM_STEPS) -> Path:
        """Return what a training leaves that nothing happened to, on so many workers of Ray."""
        asked = (num_workers, num_steps)
        if asked not in self._undisturbed:
            job = self.job(num_steps=num_steps)
            train_on_ray(job, ignore, workers=num_workers)
            self._undisturbed[asked] = job.out
        return self._undisturbed[asked]

    def undisturbed_here(self) -> Path:
        """Return what a training leaves that nothing happened to, in this very process."""
        if (0, NUM_STEPS) not in self._undisturbed:
            job = self.job()
            InProcessLauncher(SNAPSHOTS).train(job, ignore)
            self._undisturbed[0, NUM_STEPS] = job.out
        return self._undisturbed[0, NUM_STEPS]

    @cached_property
    def flows(self) -> FlowHome:
        """A Prefect server of our own, and processes that have imported what a flow needs."""
        from flows import server
        from tests.flows.scenes import Children, tiny_recipe, write_rows

        home, rows = self.folder / "home", write_rows(self.folder)
        home.mkdir()
        before = dict(os.environ)
        self._stack.callback(lambda: (os.environ.clear(), os.environ.update(before)))
        for name in ("PREFECT_API_URL", "RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
            os.environ.pop(name, None)
        os.environ["QLORAFLOW_HOME"] = str(home)
        self._stack.callback(server.stop_server, home, force=True)
        connection = server.ensure_server(home)
        self._stack.enter_context(connection.in_use())
        children = Children()
        forkserver.ensure_running()  # it outlasts the trials
        environment = {"QLORAFLOW_HOME": str(home), **connection.environment()}
        return FlowHome(
            lambda store, **changes: tiny_recipe(store, self.model, rows, **changes),
            environment,
            children,
        )


@contextmanager
def open_place() -> Iterator[Place]:
    """Make a place in a temporary folder; all of it is gone afterwards."""
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # tiny products are quicker so, above all on a busy machine
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-"))
        yield Place(Path(folder), stack)


def train_on_ray(
    job: TrainJob, on_step: OnStep, snapshots: SnapshotConfig = SNAPSHOTS, **cluster: Any
) -> str:
    """Train on Ray with one core for each worker; return what was said, one line each."""
    said: list[str] = []
    config = ClusterConfig(**({"cpus_per_worker": 1} | cluster))
    RayTrainLauncher(config, snapshots, said.append).train(job, on_step)
    return "\n".join(said)
