"""What a driver has a running Ray do, train or ask: the same in a child process and in a job.

Nothing is booked before every node has shown that it can do it (`ray_preflight`). Resuming is not
left to Ray Train: each start has a name of its own, and workers go on from our newest verified
snapshot. Ray's own checkpoint register is rewritten in place, so a full disk can make it unreadable
for good.
"""

import math
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from uuid import uuid4

from qlora_core.backends.errands import asking_errand, training_errand
from qlora_core.backends.node_probe import Installation
from qlora_core.backends.ray_asker import AskSpec
from qlora_core.backends.ray_process import START_S
from qlora_core.backends.ray_resources import Node, idle_gpus, share_out
from qlora_core.backends.ray_worker import RaySpec, WorkerOrder, train_on_worker
from qlora_core.backends.triage import LostDriverError
from qlora_core.config import ClusterConfig
from qlora_core.errors import (
    KilledError,
    LaunchError,
    LaunchLostError,
    NoRoomError,
    QLoraError,
    ResourceError,
    WorkersLostError,
)
from qlora_core.training.attempt import read_record
from qlora_core.training.journal import add_notes, noted

_NOT_STARTED = ("WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError")

Spec = RaySpec | AskSpec
_POLL_S = 1.0
_ROOM_POLL_S = 5.0  # asking nodes starts a process on each
_LEAST_STARTS = 6
# how long workers wait for each other: one may load from a cold disk, or save, so much longer than
# the rest. Who is lost, Ray tells within seconds; who hangs otherwise, only this.
_MEETING_S = 900


def carry_out(cluster: ClusterConfig, spec: Spec, launcher: Installation) -> None:
    """Do what ``spec`` says on the cluster that this process is connected to.

    Args:
        cluster: How many workers, and how often they may be lost.
        spec: A training, or questions to a model.
        launcher: What the flow imports that asks for it.

    Raises:
        ResourceError: The cluster has not what was asked for.
        ClusterError: Nodes are not ready for it.
        LaunchError: Workers were lost too often or found no room, or nodes do not answer.
        LostDriverError: The line to Ray broke.
        QLoraError: What a worker met.
    """
    try:
        _carry_out(cluster, spec, launcher)
    except ConnectionError as error:
        raise _line_lost(error, spec.log) from error


def _carry_out(cluster: ClusterConfig, spec: Spec, launcher: Installation) -> None:
    from qlora_core.backends.ray_preflight import require_ready

    one_more = isinstance(spec, RaySpec) and spec.snapshots.validate_beside
    cpus, gpus = _shares_again(cluster, spec, one_more=one_more)
    tell_of_idle_gpus(cluster, gpus, lambda: spec)
    errand = (
        asking_errand(spec.job, gpus)
        if isinstance(spec, AskSpec)
        else training_errand(spec.job, cluster, cpus, gpus)
    )
    await_room(
        lambda: require_ready(cluster, errand, cpus, gpus, launcher),
        cluster.wait_for_nodes_s,
        lambda note: _tell(spec, note),
    )
    if isinstance(spec, AskSpec):
        from qlora_core.backends.ray_asking import ask_on_cluster

        ask_on_cluster(cluster, spec, cpus, gpus)
        return
    storage = spec.job.scratch / "ray"
    with beside(cluster, lambda: spec, cpus, gpus):
        failure = fit(cluster, WorkerOrder(spec=spec, num_threads=cpus), gpus, storage)
    shutil.rmtree(storage, ignore_errors=True)
    if failure is not None:
        raise outcome(failure, cluster, spec.log)


def shares(
    cluster: ClusterConfig, say: Callable[[str], None], *, one_more: bool = False
) -> tuple[int, float]:
    """Return (CPUs, GPUs) of each worker on the Ray that this process is connected to.

    After a head was lost, say, its nodes come back one by one: they are waited for.

    Args:
        cluster: What is asked for, and how long to wait for it.
        say: Told once what is waited for.
        one_more: Leave cores to a worker more, as in `share_out`.

    Raises:
        ResourceError: It has not what was asked for.
    """
    import ray

    patience_s = cluster.wait_for_nodes_s if cluster.address else 0.0
    begun_s, is_told = time.monotonic(), False
    while True:
        try:
            return share_out(cluster, _present(ray.nodes()), one_more=one_more)
        except ResourceError as error:
            if time.monotonic() - begun_s >= patience_s:
                raise
            if not is_told:
                say(f"{error.what} {error.why} Waiting {patience_s:g} s for nodes; if none come:")
                say(error.fix)
                is_told = True
        time.sleep(_POLL_S)


def tell_of_idle_gpus(
    cluster: ClusterConfig, gpus: float, wait_for_spec: Callable[[], Spec]
) -> None:
    """Say once, as soon as there is a training, that more workers would have fitted.

    Args:
        cluster: What `shares` found room for on the Ray that this process is connected to.
        gpus: Of a worker.
        wait_for_spec: Returns what is to be done when it is known.
    """
    import ray

    nodes = _present(ray.nodes())

    def tell() -> None:
        spec = wait_for_spec()
        if isinstance(spec, RaySpec):
            note = idle_gpus(cluster, nodes, gpus, int(spec.snapshots.validate_beside))
            if note and note not in noted(spec.job.scratch):
                _tell(spec, note)

    threading.Thread(target=tell, daemon=True).start()  # a Ray of our own hears of its job later


def _present(nodes: list[dict[str, Any]]) -> list[Node]:
    return [node["Resources"] for node in nodes if node["Alive"]]


def await_room(
    require: Callable[[], None],
    patience_s: float,
    say: Callable[[str], None],
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Return once there is room: what is in the way may be a run that is just ending.

    Args:
        require: Raises a NoRoomError as long as there is none.
        patience_s: How long it is asked again.
        say: Told once what is waited for.
        pause: Called between with seconds to let pass.

    Raises:
        NoRoomError: There is still none.
    """
    begun_s, is_told = time.monotonic(), False
    while True:
        try:
            return require()
        except NoRoomError as error:
            if time.monotonic() - begun_s >= patience_s:
                raise
            if not is_told:
                say(f"{error.what} Waiting {patience_s:g} s for room. {error.fix}")
                is_told = True
        pause(_ROOM_POLL_S)


def _shares_again(cluster: ClusterConfig, spec: Spec, *, one_more: bool) -> tuple[int, float]:
    """Return `shares`; that too few nodes are there may pass, where there once were enough."""
    try:
        return shares(cluster, lambda note: _tell(spec, note), one_more=one_more)
    except ResourceError as error:
        had = read_record(spec.job.scratch).num_workers if isinstance(spec, RaySpec) else ()
        if max(had, default=0) < cluster.min_workers:
            raise
        raise NoRoomError(error.what, why=error.why, fix=error.fix) from error


def _tell(spec: Spec, note: str) -> None:
    """Tell the person who watches a training; of an evaluation, the log says it."""
    print(note, flush=True)  # noqa: T201  # into the log
    if isinstance(spec, RaySpec):
        add_notes(spec.job.scratch, [note])


def beside(
    cluster: ClusterConfig, wait_for_spec: Callable[[], RaySpec], cpus: int, gpus: float
) -> AbstractContextManager[None]:
    """Have snapshots measured beside what trains within the block, if the recipe asks for it.

    Args:
        cluster: How many workers train.
        wait_for_spec: Returns the training when it is known.
        cpus: Of a worker.
        gpus: Of a worker.
    """
    from qlora_core.backends.ray_judge import WorkerMore
    from qlora_core.backends.ray_validating import validated_beside

    return validated_beside(wait_for_spec, WorkerMore(cluster, cpus, gpus))


def fit(cluster: ClusterConfig, order: WorkerOrder, gpus: float, storage: Path) -> Exception | None:
    """Let Ray Train carry out ``order``; return what it could not get over.

    Args:
        cluster: How many workers, and how often they may be lost.
        order: For each worker, who has as many CPUs as threads.
        gpus: Of a worker.
        storage: Where Ray keeps what nobody reads: resuming is not left to it.
    """
    from ray.exceptions import RayError
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig

    from qlora_core.backends.ray_killed import KillsNoted
    from qlora_core.backends.ray_places import PlacesAwaited
    from qlora_core.backends.ray_trainer import Trainer

    cpus, most = order.num_threads, _most_starts(cluster)
    waiting = [PlacesAwaited(cluster, order, most * START_S)] if _may_shrink(cluster) else []
    trainer = Trainer(
        train_on_worker,
        train_loop_config=order.model_dump(mode="json"),
        torch_config=TorchConfig(timeout_s=_MEETING_S),
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
                max_failures=cluster.max_failures,
                controller_failure_limit=most,
            ),
            callbacks=[KillsNoted(order), *waiting],
        ),
    )
    try:
        trainer.fit()
    except (TrainingFailedError, RayError, ConnectionError) as error:  # the last: over ray://
        failure: Exception = error
        return failure
    return None


def _most_starts(cluster: ClusterConfig) -> int:
    """Return how often in all Ray Train may find no places: it takes 65 s to lose a node."""
    return max(_LEAST_STARTS, math.ceil(cluster.wait_for_nodes_s / START_S))


def _may_shrink(cluster: ClusterConfig) -> bool:
    """Say whether Ray Train counts places first, and has no bound for that (`ray_places`)."""
    return cluster.address is not None and not isinstance(cluster.workers, int)


def _num_workers(cluster: ClusterConfig) -> int | tuple[int, int]:
    workers = cluster.workers
    return workers if isinstance(workers, int) else (workers.min, workers.max)


def outcome(error: Exception, cluster: ClusterConfig, log: Path) -> QLoraError:
    """Return what a worker raised, if it is final; otherwise what Ray Train could not get over.

    Args:
        error: What `fit` returned.
        cluster: How often workers might be lost.
        log: What drivers and workers said.
    """
    from ray.train import ControllerError, WorkerGroupError

    from qlora_core.backends.ray_killed import causes, is_killed
    from qlora_core.backends.ray_losses import is_loss

    if isinstance(error, ConnectionError):
        return _line_lost(error, log)
    told = [cause for cause in causes(error) if isinstance(cause, QLoraError)]
    for met in told:
        if not met.is_transient or isinstance(met, NoRoomError):
            return met
    first_line = str(error).strip().partition("\n")[0]
    if is_killed(error):
        return KilledError(
            f"Ray killed a worker for the memory it took: {first_line[:300]}",
            fix=f"Lower training.micro_batch, or set training.checkpointing=on. The log: {log}",
        )
    cause = getattr(error, "controller_failure", None)
    if isinstance(error, ControllerError) and type(cause).__name__ in _NOT_STARTED:
        return NoRoomError(
            f"Workers could not be started: {first_line}",
            why="Nodes are missing, or others use them.",
            fix=f"Run again when there is room, to go on from the last snapshot. The log: {log}",
        )
    again = f"Run again to go on from the last snapshot. The log: {log}"
    if isinstance(error, WorkerGroupError):
        return WorkersLostError(
            f"Training was interrupted more than cluster.max_failures={cluster.max_failures} "
            f"times: {type(error).__name__}: {first_line}",
            why=str(told[0]) if told else "Workers were lost, or could not be started.",
            fix=again,
        )
    (behind,) = causes(error)
    first_line = str(behind).strip().partition("\n")[0]
    said = f"{type(behind).__name__}: {first_line}"
    if is_loss(behind):
        whose = (
            "A worker or node was lost while Ray started or ended workers"
            if isinstance(error, ControllerError)
            else "Ray Train's controller was lost"
        )
        return LaunchLostError(f"{whose}: {said}", fix=again)
    return LaunchError(f"Ray Train could not go on: {said}", fix=again)


def _line_lost(error: ConnectionError, log: Path) -> LostDriverError:
    """Return what it means that Ray's client has lost its server: over ray://, nothing goes on."""
    return LostDriverError(
        f"The line to Ray broke: {str(error)[:300]}",
        why="Its head is lost, or the network to it.",
        fix=f"Run again to go on from the last snapshot. The log: {log}",
    )
