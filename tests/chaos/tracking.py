"""MLflow's server stopped or killed while a training is tracked there."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from urllib.error import URLError
from urllib.request import urlopen

from qlora_core.backends.in_process import InProcessLauncher
from qlora_core.backends.mlflow_client import connect
from qlora_core.backends.mlflow_tracking import MlflowTracker
from qlora_core.ports import StepMetrics
from qlora_core.stages.train import tracked_metrics
from tests.backends.mlflow_place import fresh_place
from tests.backends.ray_nodes import free_port
from tests.chaos.place import NUM_STEPS, SNAPSHOTS, Place
from tests.chaos.trial import Trial, Watch, curve_problems, random_step, told_problems

_START_S, _DELIVERY_S = 90.0, 120.0
_BLOCKED_S = 30.0
"""No step waits that long even on a busy machine; MLflow's own client would, for minutes."""


@dataclass
class MlflowServer:
    """A server of our own, on a database of its own."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it; it listens some seconds later."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.folder / "files")]
        quiet = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=quiet, start_new_session=True, stdout=log, stderr=log
            )

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + _START_S
        while True:
            try:
                urlopen(f"{self.address}/health", timeout=5).close()
                return
            except (URLError, OSError):
                assert time.monotonic() < deadline, "MLflow's server did not come"
                time.sleep(0.2)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all of it."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def end(self) -> None:
        """Kill it."""
        if self.process is not None and self.process.poll() is None:
            self.send(signal.SIGKILL)
            self.process.wait()


@contextmanager
def _server(folder: Path) -> Iterator[MlflowServer]:
    fresh_place(folder)
    server = MlflowServer(folder)
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.end()


def stop_tracking(place: Place, random: Random, away_s: float = 60.0) -> Trial:
    """SIGSTOP MLflow's server for a while: it takes requests and does not answer."""
    with _server(_folder(place)) as server:
        return _untracked(
            place,
            random,
            server,
            lambda: server.send(signal.SIGSTOP),
            lambda: server.send(signal.SIGCONT),
            away_s,
        )


def kill_tracking(place: Place, random: Random, away_s: float = 60.0) -> Trial:
    """SIGKILL MLflow's server, and start it again after a while."""
    with _server(_folder(place)) as server:
        return _untracked(place, random, server, server.end, server.start, away_s)


def _folder(place: Place) -> Path:
    return place.folder / f"mlflow-{time.monotonic_ns()}"


def _untracked(
    place: Place,
    random: Random,
    server: MlflowServer,
    breaks: Callable[[], None],
    mends: Callable[[], None],
    away_s: float,
) -> Trial:
    """Train while the server is away; it does not come back before training has ended."""
    job = place.job()
    tracker = MlflowTracker(
        job.scratch / "tracking", server.address, "chaos", "a run", sample_every_s=None
    )
    assert tracker.wait_for_run_id(_START_S), "MLflow made no run"
    watch = Watch(random_step(random, NUM_STEPS), breaks)

    def on_step(metrics: StepMetrics) -> None:
        tracker.log_metrics(tracked_metrics(metrics), metrics.step)
        watch(metrics)

    InProcessLauncher(SNAPSHOTS).train(job, on_step)
    assert watch.broken_at is not None
    time.sleep(max(0.0, watch.broken_at + away_s - time.monotonic()))
    mends()
    server.wait()
    begun = time.monotonic()
    report = tracker.close("FINISHED", timeout_s=_DELIVERY_S)
    problems = (
        *curve_problems(job, place.undisturbed_here(), exactly=True),
        *told_problems(watch.told, NUM_STEPS),
        *_blocked(watch),
        *_delivery_problems(server, report.run_id or ""),
    )
    return Trial(problems, time.monotonic() - begun, 0)


def _blocked(watch: Watch) -> Iterator[str]:
    times = [when for _, when in watch.told]
    longest = max(after - before for before, after in itertools.pairwise(times))
    if longest > _BLOCKED_S:
        yield f"training waited for {longest:.1f} s"


def _delivery_problems(server: MlflowServer, run_id: str) -> Iterator[str]:
    server.wait()
    client = connect(server.address)
    experiment = client.get_experiment_by_name("chaos")
    runs = client.search_runs([experiment.experiment_id])
    if [run.info.run_id for run in runs] != [run_id]:
        yield f"{len(runs)} MLflow runs instead of one"
    for name in ("train/loss", "train/grad_norm"):
        steps = Counter(point.step for point in client.get_metric_history(run_id, name))
        if steps != Counter(range(1, NUM_STEPS + 1)):
            yield f"{name} has {sum(steps.values())} points, {len(steps)} different ones"
