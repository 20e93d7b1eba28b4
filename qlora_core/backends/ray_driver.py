"""The process that talks to Ray: started by `ray_train`, ends with it, answers on a pipe.

It is a process of its own because Ray ends its driver without an exception when the cluster's head
dies, and takes over signal handling. Resuming is not left to Ray Train: each start has a name of
its own, and the workers go on from our newest verified snapshot. Ray's own checkpoint register is
rewritten in place, so a full disk can make it unreadable for good.

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
from uuid import uuid4

from pydantic import TypeAdapter

import qlora_core
from qlora_core.backends import process_session
from qlora_core.backends.errands import asking_errand, training_errand
from qlora_core.backends.ray_asker import AskSpec
from qlora_core.backends.ray_resources import WORKER_PROCESS, local_cpus, share_out
from qlora_core.backends.ray_worker import RayHome, RaySpec, WorkerOrder, train_on_worker
from qlora_core.config import ClusterConfig
from qlora_core.errors import KilledError, LaunchError, QLoraError
from qlora_core.training.durable import replace_durably

Spec = RaySpec | AskSpec
_KILLED = ("OutOfMemoryError", "running low on memory")
OBJECT_STORE_BYTES = 80_000_000
"""Nothing big goes through Ray's object store; 75 MiB is the least it takes."""


def main() -> None:
    """Run the job that comes on stdin; write `{}` or an error's fields to the pipe."""
    home = RayHome.model_validate_json(sys.argv[1])
    jobs = _Jobs(home)
    jobs.start()
    outcome: dict[str, str] = {}
    try:
        _run(home, jobs)
    except QLoraError as error:
        if home.idle_s is not None and jobs.spec is None:
            return  # the next driver will meet the same trouble, and has somebody to tell
        outcome = error.to_json()
    with os.fdopen(int(sys.argv[2]), "w") as pipe:
        pipe.write(json.dumps(outcome))


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

    def run(self) -> None:
        """Pass the job on when it comes."""
        if self._home.idle_s is not None:
            self._patience.start()
        try:
            for line in sys.stdin.buffer:
                self._patience.cancel()
                self._pass_on(Path(os.fsdecode(line.removesuffix(b"\n"))))
        finally:
            self._end()

    def wait(self) -> Spec:
        """Return the job when it is known."""
        self._given.wait()
        assert self.spec is not None  # noqa: S101  # set before the event
        return self.spec

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
    is_own = home.cluster.address is None
    spec = None if is_own else jobs.wait()
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus, gpus = share_out(home.cluster, nodes)
        if spec is not None:
            _require_ready(home.cluster, spec, cpus, gpus)
        if isinstance(spec, AskSpec):
            return _ask(home.cluster, spec, cpus, gpus)
        order = WorkerOrder(job_file=home.job_file if is_own else None, spec=spec)
        storage = home.temp / "train" if order.spec is None else order.spec.job.scratch / "ray"
        error = _fit(home.cluster, order.model_copy(update={"num_threads": cpus}), gpus, storage)
        if error is not None:
            raise _outcome(error, home.cluster, jobs.spec.log if jobs.spec else home.log)
    finally:
        if not is_own:  # our own is ended by the launcher, which is quicker
            ray.shutdown()


def _require_ready(cluster: ClusterConfig, spec: Spec, cpus: int, gpus: float) -> None:
    from qlora_core.backends.ray_preflight import require_ready

    if isinstance(spec, AskSpec):
        errand = asking_errand(spec.job)
    else:
        errand = training_errand(spec.job, cluster, cpus, gpus)
    require_ready(cluster, errand, cpus, gpus)


def _ask(cluster: ClusterConfig, spec: AskSpec, cpus: int, gpus: float) -> None:
    from qlora_core.backends.ray_asking import ask_on_cluster

    ask_on_cluster(cluster, spec, cpus, gpus)


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
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise LaunchError(
            f"Ray does not answer at {home.cluster.address or 'a local address'}: {error}",
            fix="Check cluster.address and that the cluster runs; leave it out for a Ray of the "
            f"run's own. The log: {home.log}",
        ) from error


def worker_environment() -> dict[str, str]:
    """Return the variables every worker needs."""
    wanted = {name: os.environ[name] for name in ("HF_HUB_OFFLINE",) if name in os.environ}
    return wanted | WORKER_PROCESS


def _fit(
    cluster: ClusterConfig, order: WorkerOrder, gpus: float, storage: Path
) -> Exception | None:
    """Let Ray Train carry out ``order``; return what it could not get over."""
    from ray.exceptions import RayError
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    cpus = order.num_threads
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config=order.model_dump(mode="json"),
        torch_config=TorchConfig(timeout_s=300),
        scaling_config=ScalingConfig(
            num_workers=_num_workers(cluster),
            elastic_resize_monitor_interval_s=cluster.resize_every_s,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus} | ({"GPU": gpus} if gpus else {}),
        ),
        run_config=RunConfig(
            name=uuid4().hex,
            storage_path=str(storage),
            failure_config=FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=6
            ),
        ),
    )
    try:
        trainer.fit()
    except (TrainingFailedError, RayError) as error:
        failure: Exception = error
        return failure
    return None


def _num_workers(cluster: ClusterConfig) -> int | tuple[int, int]:
    workers = cluster.workers
    return workers if isinstance(workers, int) else (workers.min, workers.max)


def _outcome(error: Exception, cluster: ClusterConfig, log: Path) -> QLoraError:
    """Return what a worker raised, if it is final; otherwise that workers were lost too often."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause = getattr(failure, "_base_exc", failure)  # Ray wraps it with its traceback
        if isinstance(cause, QLoraError) and not cause.is_transient:
            return cause
    first_line = str(error).strip().partition("\n")[0]
    if any(text in str(error) for text in _KILLED):
        return KilledError(
            f"Ray killed a worker for the memory it took: {first_line[:300]}",
            fix=f"Lower training.micro_batch, or set training.checkpointing=on. The log: {log}",
        )
    return LaunchError(
        f"Training was interrupted more than cluster.max_failures={cluster.max_failures} "
        f"times: {type(error).__name__}: {first_line}",
        why="Workers were lost, or could not be started.",
        fix=f"Run again to go on from the last snapshot. The log: {log}",
    )


if __name__ == "__main__":
    main()
