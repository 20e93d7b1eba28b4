"""The process that talks to Ray: started by `ray_train`, ends with it, answers on a pipe.

It is a process of its own because Ray ends its driver without an exception when the cluster's head
dies, and takes over signal handling. What it has Ray do is in `ray_work`.

    python -m qlora_core.backends.ray_driver HOME PIPE    # HOME: a `RayHome` in JSON

The job comes later, as one line on stdin: the path of its `RaySpec`. On a Ray of our own the
workers are started before, and import what they need while they wait.
"""

import json
import os
import shutil
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

import qlora_core
from qlora_core.backends import process_session
from qlora_core.backends.node_probe import own_installation
from qlora_core.backends.ray_resources import WORKER_PROCESS, local_cpus
from qlora_core.backends.ray_work import (
    Spec,
    beside,
    carry_out,
    fit,
    outcome,
    shares,
    tell_of_idle_gpus,
)
from qlora_core.backends.ray_worker import RayHome, RaySpec, WorkerOrder, unforeseen
from qlora_core.errors import HeadLostError, LaunchError, QLoraError, UserError
from qlora_core.training.durable import replace_durably

OBJECT_STORE_BYTES = 80_000_000
"""Nothing big goes through Ray's object store; 75 MiB is the least it takes."""


def main() -> None:
    """Run the job that comes on stdin; write `{}` or an error's fields to the pipe."""
    home = RayHome.model_validate_json(sys.argv[1])
    jobs = _Jobs(home)
    jobs.start()
    error = _met(home, jobs)
    if error and home.idle_s is not None and jobs.spec is None:
        return  # the next driver will meet the same trouble, and has somebody to tell
    with os.fdopen(int(sys.argv[2]), "w") as pipe:
        pipe.write(json.dumps(error.to_json() if error else {}))


def _met(home: RayHome, jobs: "_Jobs") -> QLoraError | None:
    try:
        _run(home, jobs)
    except QLoraError as error:
        return error
    except Exception as error:
        return unforeseen(error, "The process that talks to Ray", jobs.log)
    return None


class _Jobs(threading.Thread):
    """Hears of the job, and ends the process with its launcher: then stdin closes, however it ends.

    Args:
        home: What the driver was told.
    """

    def __init__(self, home: RayHome) -> None:
        super().__init__(daemon=True)
        self.spec: Spec | None = None
        self._home = home
        self._given = threading.Event()
        self._patience = threading.Timer(home.idle_s or 0.0, self._end)
        self._patience.daemon = True

    @property
    def log(self) -> Path:
        """Where this process says what it says."""
        return self.spec.log if self.spec else self._home.log

    def run(self) -> None:
        """Pass the job on when it comes."""
        if self._home.idle_s is not None:
            self._patience.start()
        try:
            # not buffered: a lock that this thread holds as Python ends would be a fatal error
            for line in open(sys.stdin.fileno(), "rb", buffering=0, closefd=False):  # noqa: SIM115
                self._patience.cancel()
                self._pass_on(Path(os.fsdecode(line.removesuffix(b"\n"))))
        finally:
            self._end()

    def wait(self) -> Spec:
        """Return the job when it is known."""
        self._given.wait()
        assert self.spec is not None  # noqa: S101  # set before the event
        return self.spec

    def wait_for_training(self) -> RaySpec:
        """Return the job when it is known; nobody asks questions of a Ray of our own."""
        spec = self.wait()
        assert isinstance(spec, RaySpec)  # noqa: S101  # see `has_crew`
        return spec

    def _pass_on(self, file: Path) -> None:
        text = file.read_bytes()
        self.spec = TypeAdapter[Spec](Spec).validate_json(text)
        with self.spec.log.open("ab") as log:
            for output in (sys.stdout, sys.stderr):
                os.dup2(log.fileno(), output.fileno())
        if self._home.cluster.address is None:
            replace_durably(self._home.job_file, text)
        self._given.set()

    def _end(self) -> None:
        for pid in process_session.members(os.getsid(0)):
            if pid != os.getpid():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self._home.temp, ignore_errors=True)
        os._exit(1)


def _run(home: RayHome, jobs: _Jobs) -> None:
    import ray

    _connect(home)
    if home.cluster.address is None:  # ended by the launcher, which is quicker than `shutdown`
        _train_on_our_own(home, jobs)
        return
    try:
        carry_out(home.cluster, jobs.wait(), own_installation())
    finally:
        ray.shutdown()


def _train_on_our_own(home: RayHome, jobs: _Jobs) -> None:
    cpus, gpus = shares(home.cluster, print)
    tell_of_idle_gpus(home.cluster, gpus, jobs.wait_for_training)
    order = WorkerOrder(job_file=home.job_file, num_threads=cpus)
    with beside(home.cluster, jobs.wait_for_training, cpus, gpus):
        failure = fit(home.cluster, order, gpus, home.temp / "train")
    if failure is not None:
        raise outcome(failure, home.cluster, jobs.log)


def _connect(home: RayHome) -> None:
    import ray

    settings: dict[str, Any] = {"log_to_driver": True, "namespace": "qloraflow"}
    if home.cluster.address is None:
        settings |= {
            "address": "local",
            "num_cpus": local_cpus(home.cluster),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": str(home.temp / "r"),  # Ray opens it to everybody; its parent is private
        }
    else:
        package = str(Path(qlora_core.__file__).parent)
        settings |= {
            "address": home.cluster.address,
            "runtime_env": {"py_modules": [package], "env_vars": worker_environment()},
        }
    try:
        ray.init(**settings)
    except (
        ray.exceptions.AuthenticationError,
        ConnectionError,
        RuntimeError,
        ValueError,
        TimeoutError,
    ) as error:
        if refusal := _refusal(error):
            raise UserError(
                f"Ray at {home.cluster.address} does not let us in: {refusal}",
                fix="Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to its "
                "token, where the run starts and on every node.",
            ) from error
        kind = HeadLostError if home.cluster.address else LaunchError
        raise kind(
            f"Ray does not answer at {home.cluster.address or 'a local address'}: {error}",
            fix="Check cluster.address and that the cluster runs; leave it out for a Ray of the "
            f"run's own. The log: {home.log}",
        ) from error


def _refusal(error: BaseException | None) -> str:
    """Return what Ray says of our token; nothing if that is not behind ``error``.

    Where it finds out as it connects, that is a line of a traceback in the text of another error.
    """
    import ray

    while error is not None:
        for line in str(error).splitlines():
            if "InvalidAuthToken" in line or "AuthenticationError" in line:
                return line.strip()
        if isinstance(error, ray.exceptions.AuthenticationError):
            return str(error).strip()
        error = error.__cause__ or error.__context__
    return ""


def worker_environment() -> dict[str, str]:
    """Return the variables every worker needs."""
    wanted = {name: os.environ[name] for name in ("HF_HUB_OFFLINE",) if name in os.environ}
    return wanted | WORKER_PROCESS


if __name__ == "__main__":
    main()
