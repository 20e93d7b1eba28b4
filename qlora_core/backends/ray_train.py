"""Train on Ray: start a driver process, follow the journal, survive what can be survived.

Three layers catch faults, each what the one below cannot: Ray restarts lost *workers*; this
launcher restarts a lost *driver* (it ends without a word when Ray's head dies); running the same
recipe again restarts a lost *launcher*. All of them go on from the newest verified snapshot.

Nothing of Ray is imported here: the driver lives in a session of its own, ends when our end of its
stdin closes (even by SIGKILL), and is ended, with all of Ray's processes, when we leave.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import qlora_core
from qlora_core.backends import process_session
from qlora_core.backends.ray_address import require_ray
from qlora_core.backends.ray_resources import WORKER_PROCESS, require_local_room
from qlora_core.backends.ray_worker import RaySpec
from qlora_core.config import ClusterConfig, SnapshotConfig
from qlora_core.errors import LaunchError, from_json
from qlora_core.ports import StepMetrics, TrainJob
from qlora_core.training.attempt import next_launch
from qlora_core.training.desk import NOTES_FILE, SUMMARY_FILE
from qlora_core.training.durable import replace_durably
from qlora_core.training.journal import JOURNAL_FILE, StepTail, Tail

_POLL_S = 0.1
_PATIENCE_S = 10.0  # Ray's processes need about 3 s to end in good order

# Measured with Ray 2.60: what each default costs is in the comment.
_RAY_SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # 2 s: a lost worker is noticed later
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",  # 600 s: a stopped worker blocks that long
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",  # x 6 controller failures > 65 s to lose a node
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "600",  # none: a barrier can wait for ever
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "10",  # 30 s for each restart after a hang
    "RAY_TRAIN_METRICS_ENABLED": "0",  # Prometheus gauges that nobody reads
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers would run in a folder of Ray's
    "RAY_worker_niceness": "0",  # 15: training would wait for whatever else this machine does
    **WORKER_PROCESS,
}


@dataclass(frozen=True)
class RayTrainLauncher:
    """Runs jobs with Ray Train, on a Ray of its own or a running cluster."""

    cluster: ClusterConfig
    snapshots: SnapshotConfig
    say: Callable[[str], None]
    """Told what a person should know, once: a resume, a damaged snapshot, a lost driver."""
    check: Callable[[], None] = lambda: None
    """Called several times a second; what it raises ends training and all of Ray's processes."""

    def train(self, job: TrainJob, on_step: Callable[[StepMetrics], None]) -> None:
        """Run ``job`` to its end, calling ``on_step`` once for each step, in order.

        Raises:
            TrainingError: Training cannot go on.
            UserError: Nobody answers at the address of the cluster.
            ResourceError: The cluster has not what was asked for.
            StoreError: There is no room for snapshots, say.
            LaunchError: Workers or drivers were lost more often than ``cluster.max_failures``.
        """
        if self.cluster.address is None:
            require_local_room(self.cluster)
        else:
            self.say(f"connecting to Ray at {self.cluster.address}")
            require_ray(self.cluster.address)
        job = _absolute(job)
        job.scratch.mkdir(parents=True, exist_ok=True)
        for stale in (JOURNAL_FILE, SUMMARY_FILE):  # snapshots hold the journal's truth
            (job.scratch / stale).unlink(missing_ok=True)
        follower = _Follower.of(job, on_step, self.say)
        for _ in range(self.cluster.max_failures + 1):
            if self._launch(job, follower):
                return
            self.say("Ray's driver process was lost; starting again from the last snapshot.")
        raise LaunchError(
            f"Ray's driver was lost more than cluster.max_failures={self.cluster.max_failures} "
            f"times. Its last words:\n{last_lines(_log_file(job))}",
            fix=f"Run again to go on from the last snapshot. The log: {_log_file(job)}",
        )

    def _launch(self, job: TrainJob, follower: "_Follower") -> bool:
        """Run one driver; return whether it finished the job, False if it was lost."""
        temp = Path(tempfile.mkdtemp(prefix="ql-", dir=_short_folder()))
        spec = RaySpec(
            job=job,
            cluster=self.cluster,
            snapshots=self.snapshots,
            launch=next_launch(job.scratch),
            temp=temp,
            log=_log_file(job),
        )
        try:
            with _driver(spec) as driver:
                return _watch(driver, spec, follower, self.check)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
            shutil.rmtree(job.scratch / "ray", ignore_errors=True)


@dataclass(frozen=True)
class _Follower:
    """Passes on what the workers write down."""

    steps: StepTail
    notes: Tail
    on_step: Callable[[StepMetrics], None]
    say: Callable[[str], None]

    @classmethod
    def of(
        cls, job: TrainJob, on_step: Callable[[StepMetrics], None], say: Callable[[str], None]
    ) -> "_Follower":
        notes = Tail(job.scratch / NOTES_FILE)
        list(notes.lines())  # what earlier runs said was told then
        return cls(StepTail(job.scratch / JOURNAL_FILE), notes, on_step, say)

    def catch_up(self) -> None:
        for note in self.notes.lines():
            self.say(note)
        for metrics in self.steps.steps():
            self.on_step(metrics)


@dataclass(frozen=True)
class _Driver:
    """A running driver and the pipe on which it answers."""

    process: subprocess.Popen[bytes]
    answer: int

    def outcome(self) -> dict[str, str] | None:
        """Return what the ended driver answered; None if it ended without an answer."""
        os.set_blocking(self.answer, False)
        try:
            text = os.read(self.answer, 1 << 16)
        except BlockingIOError:
            return None
        return json.loads(text) if text else None


@contextmanager
def _driver(spec: RaySpec) -> Iterator[_Driver]:
    """Start a driver; on the way out end it and every process it started."""
    spec_file = spec.job.scratch / "ray_spec.json"
    replace_durably(spec_file, spec.model_dump_json().encode())
    answer, far_end = os.pipe()
    command = [sys.executable, "-m", "qlora_core.backends.ray_driver", str(spec_file), str(far_end)]
    with spec.log.open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[far_end],
            env=_environment(spec),
        )
    os.close(far_end)
    try:
        yield _Driver(process, answer)
    finally:
        process_session.end(process.pid, patience_s=_PATIENCE_S)
        process.wait()
        os.close(answer)
        if process.stdin:
            process.stdin.close()


def _watch(driver: _Driver, spec: RaySpec, follower: _Follower, check: Callable[[], None]) -> bool:
    """Follow a driver to its end; return whether it finished, False if it was lost."""
    while driver.process.poll() is None and not spec.error_file.exists():
        check()
        follower.catch_up()
        time.sleep(_POLL_S)
    follower.catch_up()
    if spec.error_file.exists():
        raise from_json(json.loads(spec.error_file.read_text("utf-8")))
    outcome = driver.outcome()
    if outcome:
        raise from_json(outcome)
    return outcome is not None


def _environment(spec: RaySpec) -> dict[str, str]:
    """Return the driver's environment; a Ray of our own gets a secret of its own."""
    root = str(Path(qlora_core.__file__).parent.parent)
    paths = [root, os.environ.get("PYTHONPATH", "")]
    environment = (
        dict(os.environ) | _RAY_SETTINGS | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    )
    if spec.cluster.address is None:
        environment.pop("RAY_ADDRESS", None)
        environment["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # nobody preempts this machine
        environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "120"  # it may be busy, not lost
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return environment


def _absolute(job: TrainJob) -> TrainJob:
    """Return ``job`` with absolute paths: workers run elsewhere."""
    names = ("base", "data", "out", "scratch")
    return job.model_copy(update={name: getattr(job, name).resolve() for name in names})


def _log_file(job: TrainJob) -> Path:
    return job.scratch / "ray.log"


def last_lines(path: Path, count: int = 15) -> str:
    """Return the end of a log."""
    if not path.exists():
        return ""
    return "\n".join(path.read_text("utf-8", errors="replace").splitlines()[-count:])


def _short_folder() -> str | None:
    """Return a folder with a short path: a Unix socket's path holds 107 characters at most."""
    return "/tmp" if Path("/tmp").is_dir() else None  # noqa: S108  # mkdtemp makes it private
