"""The process that talks to Ray, from its launcher's side: start it, give it a job, end it.

It may be started before there is a job: Ray comes up, and Ray Train is imported, while the base is
still being quantised. The process lives in a session of its own, ends when our end of its stdin
closes (even by SIGKILL), and is ended with all of Ray's processes.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

import qlora_core
from qlora_core.backends import process_session
from qlora_core.backends.ray_asker import AskSpec
from qlora_core.backends.ray_resources import WORKER_PROCESS
from qlora_core.backends.ray_worker import RayHome, RaySpec
from qlora_core.config import ClusterConfig
from qlora_core.training.durable import replace_durably

IDLE_S = 180.0
"""How long a Ray without a job is kept. There may come none (another run makes the adapter, say),
and beside a preparation that takes longer than this, starting anew counts for little."""
_PATIENCE_S = 10.0  # with somebody else's Ray, which is told that we leave; ours keeps nothing

START_S = 30
"""How long Ray Train waits for a running cluster to have places for workers, each time it asks."""

# Measured with Ray 2.60: what each default costs is in the comment.
TRAIN_SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # 2 s: a lost worker is noticed later
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",  # 600 s: a stopped worker blocks that long
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_S),
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "600",  # none: a barrier can wait for ever
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "10",  # 30 s for each restart after a hang
    "RAY_TRAIN_METRICS_ENABLED": "0",  # Prometheus gauges that nobody reads
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers would run in a folder of Ray's
    **WORKER_PROCESS,
}
"""Environment of Ray Train, on whatever Ray it runs."""
_RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",  # idle processes that nobody here asks for
    "RAY_worker_niceness": "0",  # 15: training would wait for whatever else this machine does
    **TRAIN_SETTINGS,
}


@dataclass
class DriverProcess:
    """A running driver and the pipe on which it answers."""

    home: RayHome
    process: subprocess.Popen[bytes]
    pipe: int
    _said: bytes = field(default=b"", init=False)

    def give(self, spec: RaySpec | AskSpec) -> None:
        """Let it run the job of ``spec``; what it has said before is kept in the job's log."""
        file = spec.job.scratch / "ray_spec.json"
        replace_durably(file, spec.model_dump_json().encode())
        if self.home.log != spec.log:
            with spec.log.open("ab") as log:
                log.write(self.home.log.read_bytes())
        assert self.process.stdin is not None  # noqa: S101  # it was started with one
        with suppress(BrokenPipeError):  # it has ended: its answer says why
            self.process.stdin.write(os.fsencode(file) + b"\n")
            self.process.stdin.flush()

    def has_answered(self) -> bool:
        """Say whether it has said all that it will say, by ending if not in words."""
        try:
            while part := os.read(self.pipe, 1 << 16):
                self._said += part
        except BlockingIOError:
            return False
        return True

    def outcome(self) -> dict[str, str] | None:
        """Return what it answered; None if it ended without a whole answer."""
        try:
            answer: dict[str, str] = json.loads(self._said)
        except json.JSONDecodeError:
            return None
        return answer

    def end(self) -> None:
        """End it and every process it started."""
        is_own = self.home.cluster.address is None
        process_session.end(self.process.pid, patience_s=0.0 if is_own else _PATIENCE_S)
        self.process.wait()
        os.close(self.pipe)
        if self.process.stdin:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        shutil.rmtree(self.home.temp, ignore_errors=True)


class WaitingDriver:
    """Holds a driver that was started before there was a job, until somebody takes it."""

    def __init__(self) -> None:
        self._drivers: SimpleQueue[DriverProcess] = SimpleQueue()

    def start(self, cluster: ClusterConfig) -> None:
        """Let one wait, unless one does already or Ray runs elsewhere."""
        if cluster.address is None and self._drivers.empty():
            with suppress(OSError):  # no room, say: whoever needs it will meet it, and can tell
                self._drivers.put(start_driver(cluster))

    @property
    def is_here(self) -> bool:
        """Whether a driver, with its workers, waits."""
        return not self._drivers.empty()

    def take(self) -> DriverProcess | None:
        """Return the driver, if one is here that has not met trouble."""
        with suppress(Empty):
            driver = self._drivers.get_nowait()
            if not driver.has_answered():
                return driver
            driver.end()  # another one will meet the same trouble, and tell it
        return None

    def end(self) -> None:
        """End the driver that nobody took."""
        if unused := self.take():
            unused.end()


def start_driver(
    cluster: ClusterConfig, log: Path | None = None, idle_s: float = IDLE_S
) -> DriverProcess:
    """Start a driver; it connects to Ray, or starts one, and waits for its job.

    Args:
        cluster: Which Ray, and how large.
        log: Of the job that is waiting; none: there may come one, or none.
        idle_s: How long it waits for a job that may come.
    """
    temp = Path(tempfile.mkdtemp(prefix="ql-", dir=_short_folder()))
    home = RayHome(
        cluster=cluster, temp=temp, log=log or temp / "driver.log", idle_s=None if log else idle_s
    )
    pipe, far_end = os.pipe()
    os.set_blocking(pipe, False)
    try:
        process = _started(home, far_end)
    except BaseException:
        os.close(pipe)
        shutil.rmtree(temp, ignore_errors=True)
        raise
    finally:
        os.close(far_end)
    return DriverProcess(home, process, pipe)


def _started(home: RayHome, far_end: int) -> subprocess.Popen[bytes]:
    module = "qlora_core.backends.ray_driver"
    with home.log.open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", module, home.model_dump_json(), str(far_end)],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[far_end],
            env=_environment(home.cluster),
        )


def _environment(cluster: ClusterConfig) -> dict[str, str]:
    """Return the driver's environment; a Ray of our own gets a secret of its own."""
    root = str(Path(qlora_core.__file__).parent.parent)
    paths = [root, os.environ.get("PYTHONPATH", "")]
    environment = (
        dict(os.environ) | _RAY_SETTINGS | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    )
    environment.pop("RAY_ADDRESS", None)  # Ray would take it where the address given is `auto`
    if cluster.address is None:
        environment["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # nobody preempts this machine
        environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "120"  # it may be busy, not lost
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return environment


def _short_folder() -> str | None:
    """Return a folder with a short path: a Unix socket's path holds 107 characters at most."""
    return "/tmp" if Path("/tmp").is_dir() else None  # noqa: S108  # mkdtemp makes it private
