"""The process that talks to Ray: started by `ray_train`, ends with it, answers on a pipe.

It is a process of its own because Ray ends its driver without an exception when the cluster's head
dies, and takes over signal handling. Resuming is not left to Ray Train: each start has a name of
its own, and the workers go on from our newest verified snapshot. Ray's own checkpoint register is
rewritten in place, so a full disk can make it unreadable for good.

    python -m qlora_core.backends.ray_driver HOME PIPE    # HOME: a `RayHome` in JSON

The job comes later, as one line on stdin: the path of its `RaySpec`.
"""

import json
import os
import shutil
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from uuid import uuid4

import qlora_core
from qlora_core.backends import process_session
from qlora_core.backends.ray_resources import WORKER_PROCESS, local_cpus, share_out
from qlora_core.backends.ray_worker import RayHome, RaySpec, train_on_worker
from qlora_core.errors import LaunchError, QLoraError

_IDLE_S = 180.0
"""How long a Ray without a job is kept. There may come none (another run makes the adapter, say),
and beside a preparation that takes longer than this, starting anew counts for little."""

OBJECT_STORE_BYTES = 80_000_000
"""Nothing big goes through Ray's object store; 75 MiB is the least it takes."""


def main() -> None:
    """Run the job that comes on stdin; write `{}` or an error's fields to the pipe."""
    home = RayHome.model_validate_json(sys.argv[1])
    jobs: SimpleQueue[Path] = SimpleQueue()
    threading.Thread(target=_listen, args=[home, jobs], daemon=True).start()
    outcome: dict[str, str] = {}
    try:
        _connect(home)
        _run(jobs.get(timeout=None if home.has_job else _IDLE_S))
    except Empty:
        return
    except QLoraError as error:
        if not home.has_job and jobs.empty():
            return  # the next driver will meet the same trouble, and has somebody to tell
        outcome = error.to_json()
    with os.fdopen(int(sys.argv[2]), "w") as pipe:
        pipe.write(json.dumps(outcome))


def _listen(home: RayHome, jobs: "SimpleQueue[Path]") -> None:
    """Pass on the job, and end with the launcher: then our stdin closes, however it ends."""
    for line in sys.stdin.buffer:
        jobs.put(Path(os.fsdecode(line.removesuffix(b"\n"))))
    for pid in process_session.members(os.getsid(0)):
        if pid != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    shutil.rmtree(home.temp, ignore_errors=True)
    os._exit(1)


def _run(job: Path) -> None:
    import ray

    spec = RaySpec.model_validate_json(job.read_text("utf-8"))
    with spec.log.open("ab") as log:
        for output in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), output.fileno())
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus, gpus = share_out(spec.cluster, nodes)
        _fit(spec.model_copy(update={"cpus_per_worker": cpus}), gpus)
    finally:
        if spec.cluster.address is not None:  # our own is ended by the launcher, which is quicker
            ray.shutdown()


def _connect(home: RayHome) -> None:
    import ray
    import ray.train.torch  # takes seconds, like Ray itself: there may be no job yet

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


def _fit(spec: RaySpec, gpus: float) -> None:
    from ray.exceptions import RayError
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config=spec.model_dump(mode="json"),
        torch_config=TorchConfig(timeout_s=300),
        scaling_config=ScalingConfig(
            num_workers=spec.cluster.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": spec.cpus_per_worker} | ({"GPU": gpus} if gpus else {}),
        ),
        run_config=RunConfig(
            name=f"{spec.launch}-{uuid4().hex[:8]}",
            storage_path=str(spec.job.scratch / "ray"),
            failure_config=FailureConfig(
                max_failures=spec.cluster.max_failures, controller_failure_limit=6
            ),
        ),
    )
    try:
        trainer.fit()
    except (TrainingFailedError, RayError) as error:
        raise _outcome(error, spec) from error


def _outcome(error: Exception, spec: RaySpec) -> QLoraError:
    """Return what a worker raised, if it is final; otherwise that workers were lost too often."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause = getattr(failure, "_base_exc", failure)  # Ray wraps it with its traceback
        if isinstance(cause, QLoraError) and not cause.is_transient:
            return cause
    first_line = str(error).strip().partition("\n")[0]
    return LaunchError(
        f"Training was interrupted more than cluster.max_failures={spec.cluster.max_failures} "
        f"times: {type(error).__name__}: {first_line}",
        why="Workers were lost, or could not be started.",
        fix=f"Run again to go on from the last snapshot. The log: {spec.log}",
    )


if __name__ == "__main__":
    main()
