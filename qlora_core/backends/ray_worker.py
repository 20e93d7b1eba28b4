"""What Ray runs on each worker: set the threads, open the line to the others, train.

Errors are sorted here. What trying again cannot mend (a loss that is not finite, a full disk, a
bug) is written down for the launcher, which ends the run at once; Ray would start the workers
again. A lost peer is left to Ray, and so is a GPU that failed: its process ends with the group, and
a new one is placed.
"""

import json
import os
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora_core.artifacts import Frozen, Incident, IncidentKind
from qlora_core.backends.masking import mask_secrets
from qlora_core.config import ClusterConfig, SnapshotConfig
from qlora_core.errors import (
    CollectiveError,
    DeviceError,
    LaunchError,
    QLoraError,
    StoreError,
    TrainingError,
    from_json,
    storing,
)
from qlora_core.ports import TrainJob

_POLL_S = 0.05


class RayHome(Frozen):
    """What a driver is told when it starts: which Ray it works with."""

    cluster: ClusterConfig
    temp: Path
    """Where a Ray started by the driver keeps its sockets and logs; its path is short."""
    log: Path
    """Where the driver writes what it says until it has a job."""
    idle_s: float | None
    """How long to wait for a job; none: one is waiting already."""

    @property
    def job_file(self) -> Path:
        """Where workers of a Ray of our own find the job."""
        return self.temp / "job.json"


class RaySpec(Frozen):
    """What the launcher tells the driver, and the driver its workers."""

    job: TrainJob
    snapshots: SnapshotConfig
    launch: str
    log: Path
    """Where driver and workers write what they say."""
    cluster: ClusterConfig = ClusterConfig()
    """Says where the base shall lie."""

    @property
    def error_file(self) -> Path:
        """Where workers leave an error that is final."""
        return self.job.scratch / f"error-{self.launch}.json"

    def final_error(self) -> QLoraError | None:
        """Return what a worker has left there; None as long as none has.

        Raises:
            StoreError: It cannot be looked at.
        """
        with storing(self.error_file, "read"):
            try:
                return from_json(json.loads(self.error_file.read_text("utf-8")))
            except (FileNotFoundError, ValueError):  # none, or over a network not whole yet
                return None


class WorkerOrder(Frozen):
    """What the driver tells its workers."""

    spec: RaySpec | None = None
    job_file: Path | None = None
    """Where the spec is going to be, if it is not known yet."""
    num_threads: int = 1
    """The cores a worker owns."""

    def awaited(self) -> RaySpec:
        """Return the spec as soon as there is one."""
        if self.spec is not None:
            return self.spec
        assert self.job_file is not None  # noqa: S101  # one of the two is given
        while not self.job_file.exists():
            time.sleep(_POLL_S)
        return RaySpec.model_validate_json(self.job_file.read_text("utf-8"))


def train_on_worker(plain: dict[str, Any]) -> None:
    """Run one worker of a Ray Train group."""
    from qlora_core.training import worker  # noqa: F401  # takes seconds: before there is a job

    order = WorkerOrder.model_validate(plain)
    spec = order.awaited()
    with storing(spec.error_file, "read"):
        has_failed = spec.error_file.exists()
    if has_failed:  # the launcher is about to end this run
        raise TrainingError(f"This run has failed already; see {spec.error_file}.")
    before = _num_attempts(spec)
    try:
        _train(spec, order.num_threads)
    except QLoraError as error:
        if not error.is_transient:
            _leave(spec, error, before)
        elif isinstance(error, CollectiveError):
            _note(spec, error, "collective")
        elif isinstance(error, DeviceError):
            _note(spec, error, "lost_gpu")
        raise
    except Exception as error:
        unknown = unforeseen(error, f"Worker {os.environ.get('RANK', '0')}", spec.log)
        _leave(spec, unknown, before)
        raise unknown from error


def _train(spec: RaySpec, num_threads: int) -> None:
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    from qlora_core.training.comm import Alone, Comm, TorchComm
    from qlora_core.training.lookout import Lookout, never
    from qlora_core.training.worker import run_worker

    torch.set_num_threads(num_threads)
    device = get_device()
    group = get_context()
    comm: Comm = Alone()
    if group.get_world_size() > 1:
        comm = TorchComm(device, group.get_local_world_size())
    lookout = Lookout(_seconds_left if is_preemption_watched() else never)
    given = (spec.job, comm, spec.snapshots, spec.launch, device)
    run_worker(*given, lookout=lookout, cluster=spec.cluster)


def is_preemption_watched() -> bool:
    """Say whether Ray looks out for nodes that are taken away; on a machine of our own none is."""
    return os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0"


def _seconds_left() -> float | None:
    """Return when Ray has a node taken away; 0 if it does not say when, None if none is."""
    from ray.train import get_preemption_info

    try:
        info = get_preemption_info()
    except Exception as error:  # Ray's or Ray Train's: all workers have to answer, and one is gone
        raise CollectiveError(f"workers did not agree on what Ray announces: {error}") from error
    if info is None:
        return None
    return max(0.0, info.deadline_ms / 1000 - time.time()) if info.deadline_ms else 0.0


def _num_attempts(spec: RaySpec) -> int:
    from qlora_core.training.attempt import read_record

    return len(read_record(spec.job.scratch).started_after)


def _leave(spec: RaySpec, error: QLoraError, before: int) -> None:
    """Write down what ends the run, unless others go on already.

    Args:
        spec: Says where.
        error: That is final.
        before: Attempts when this worker started; its own is the one after, if it came so far.
    """
    from qlora_core.fingerprint import canonical_json
    from qlora_core.training.durable import replace_durably, replace_reserved

    with suppress(StoreError):  # who cannot read cannot write, either; or can again
        if _num_attempts(spec) > before + 1:
            return  # this worker was cut off, and what it met is its own trouble
    text = canonical_json(error.to_json()).encode()
    try:
        replace_durably(spec.error_file, text)
    except StoreError:
        # Ray would start the workers again before it brings the error. If there is no room taken,
        # or nothing can be written at all, it does: the driver tells what the last of them raised.
        with suppress(StoreError):
            replace_reserved(spec.error_file, text)


def _note(spec: RaySpec, error: LaunchError, kind: IncidentKind) -> None:
    from qlora_core.training.incidents import note

    incident = Incident(
        kind=kind,
        what=error.what.partition("\n")[0][:300],
        remedy="New workers go on from the last snapshot.",
        launch=spec.launch,
    )
    with suppress(StoreError):
        note(spec.job.scratch, incident)


def unforeseen(
    error: Exception, who: str, log: Path, kind: type[QLoraError] = TrainingError
) -> QLoraError:
    """Return an error for what nobody has thought of: the end of its traceback, secrets masked."""
    last_lines = "".join(traceback.format_exception(error)).strip().splitlines()[-8:]
    return kind(
        mask_secrets(f"{who} failed: {type(error).__name__}: {error}"),
        why=mask_secrets("\n".join(last_lines)),
        fix=f"The whole log: {log}",
    )
