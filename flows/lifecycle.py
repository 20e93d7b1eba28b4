"""From the first moment of a run to its last: record, tracker, Prefect state, and an orderly end.

A flow is a `with running(config) as run:` around its DAG. Whatever ends the block (success, an
error, Ctrl-C, a person who cancels in Prefect, SIGTERM from a worker that was told to) the record
says how, MLflow's run is ended, and no process or thread of the run goes on. Only SIGKILL leaves no
word; then the next run on the same store finds the record without an owner and writes the word
itself.

The state that Prefect shows is Prefect's own business while its engine is in charge. Outside of it
two corrections are ours: a run whose process is gone is `Crashed`, and one that a person
interrupted is `Cancelled`, which the engine would call a crash.
"""

import logging
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx
from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound, TerminationSignal
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Crashed

from flows import records, tracking
from flows.cancelling import CancelledInPrefect, heeding_prefect
from flows.records import OpenRecord
from flows.server import server_kept
from qlora_core.artifacts import Artifact
from qlora_core.backends.journal import RunStatus
from qlora_core.backends.mlflow_tracking import MlflowTracker, TrackingReport, flatten
from qlora_core.backends.ray_address import require_address
from qlora_core.config import RunConfig
from qlora_core.errors import ConfigError, StoreError
from tasks import places, wiring
from tasks.progress import RunProgress
from tasks.wiring import Workspace

_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")

_STAGES_END_S = 20.0
"""A Ray job that is told to stop is watched for 15 s, and a driver for 10 s."""

INTERRUPTIONS = (KeyboardInterrupt, TerminationSignal)
_MLFLOW_STATUS: dict[records.State, RunStatus] = {
    "completed": "FINISHED",
    "failed": "FAILED",
    "cancelled": "KILLED",
}


@dataclass(frozen=True)
class ActiveRun:
    """A run in progress."""

    record: OpenRecord
    tracker: MlflowTracker
    workspace: Workspace

    def finish_tracking(self) -> TrackingReport:
        """End the MLflow run as finished and say what it could not be told."""
        report = self.tracker.close("FINISHED")
        self._note_mlflow()
        if note := report.sentence():
            get_run_logger().warning("%s", note)
        return report

    def _note_mlflow(self) -> None:
        if self.tracker.run_id and self.record.record.mlflow_run_id != self.tracker.run_id:
            self.record.track(self.tracker.run_id)


@contextmanager
def running(config: RunConfig) -> Iterator[ActiveRun]:
    """Open the run of ``config`` inside a flow, and end it in order however the block ends."""
    if call := _call.get():
        call.flow_run_id = str(runtime.flow_run.id)
    with server_kept(places.home()), _running(config) as run:
        yield run


@contextmanager
def _running(config: RunConfig) -> Iterator[ActiveRun]:
    root = places.store_root(config)
    for flow_run_id in records.bury_interrupted(root):
        set_state(flow_run_id, Crashed(message="Its process was killed."))
    record = records.open_record(root, config, str(runtime.flow_run.id))
    _rename_flow_run(record.record)
    tracker = tracking.open_tracker(record.record, record.folder, str(runtime.flow_run.ui_url))
    with _closed_at_end(record, tracker):
        run = _open(config, record, tracker)
        with _stages_ended(run.workspace), heeding_prefect(run.workspace.stop):
            yield run


@contextmanager
def _closed_at_end(record: OpenRecord, tracker: MlflowTracker) -> Iterator[None]:
    """Close both however the block ends; what that fails at hides no error of the block's."""
    try:
        yield
    except BaseException as error:
        state: records.State = "cancelled" if isinstance(error, INTERRUPTIONS) else "failed"
        with _failure_told("the run's record does not say how it ended"):
            record.close(state, str(error) or type(error).__name__)
        with _failure_told("MLflow does not know how the run ended"):
            if note := tracker.close(_MLFLOW_STATUS[state], timeout_s=5.0).sentence():
                _say(note)
        raise
    record.close("completed")


@contextmanager
def _stages_ended(workspace: Workspace) -> Iterator[None]:
    """Leave the block by an error only when its stages have ended.

    Until then they write to record and tracker; those that wait for Ray take some seconds.
    """
    try:
        yield
    except BaseException:
        workspace.stop()
        if left := workspace.wait_for_stages(_STAGES_END_S):
            _say(
                f"not ended {_STAGES_END_S:.0f} s after being told to: {', '.join(left)}. What is "
                "logged there from now on reaches MLflow with the next run, or with `qlora sync`."
            )
        raise


@contextmanager
def _failure_told(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, StoreError) as error:
        _say(f"{what}: {error}")


def _say(message: str) -> None:
    RunProgress(wiring.surroundings().progress).say("finetune", message)


@dataclass
class _Call:
    """A call of the flow, as its caller knows it."""

    flow_run_id: str | None = None
    """None: it has not begun."""

    def mark_cancelled(self, why: str) -> None:
        if self.flow_run_id:
            set_state(self.flow_run_id, Cancelled(message=why))


_call: ContextVar[_Call | None] = ContextVar("call", default=None)


@contextmanager
def interruption_cancels() -> Iterator[None]:
    """Mark the run of the flow that is called inside the block as cancelled if it is interrupted.

    That run and no other: the newest on the store may be another process's by now.

    Raises:
        KeyboardInterrupt: Whatever the interruption was.
    """
    call = _Call()
    token = _call.set(call)
    try:
        yield
    except CancelledInPrefect as cancelled:
        call.mark_cancelled(str(cancelled))
        raise
    except INTERRUPTIONS as interruption:
        call.mark_cancelled("Cancelled at the keyboard.")
        raise KeyboardInterrupt from interruption
    finally:
        _call.reset(token)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, for a flow that is called and not deployed.

    Prefect's engine has a handler of its own while a flow runs, and afterwards sends the signal
    again to the one it found: without this, the process would be gone before it said a word.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def set_state(flow_run_id: str, state: State[Any]) -> None:
    """Correct what Prefect says of a flow run of ours that is over; one it does not know is none.

    A run that reached a final state by itself keeps it.
    """
    try:
        with get_client(sync_client=True) as client:
            known = client.read_flow_run(UUID(flow_run_id)).state
            if known is None or not known.is_final() or known.is_crashed():
                client.set_flow_run_state(UUID(flow_run_id), state, force=True)
    except (ObjectNotFound, httpx.HTTPError) as error:  # the latter: refused, or the server is away
        logging.getLogger(__name__).warning("flow run %s cannot be marked: %s", flow_run_id, error)


def refuse_secrets(config: RunConfig) -> None:
    """Refuse a recipe that holds a password: parameters are stored and shown in clear.

    And one whose cluster has an address that is none: hours later it would be told as well.

    Raises:
        ConfigError: An address in it has one.
        UserError: The cluster's address is none; or a Jobs endpoint's, and more than a place.
    """
    found = [name for name, value in flatten(config).items() if _has_password(value)]
    if found:
        raise ConfigError(
            f"{' and '.join(found)} holds a password.",
            why="Recipes are kept in clear by Prefect, MLflow and the run's record.",
            fix="Take it out, and give it through the environment: MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, HF_TOKEN, RAY_AUTH_TOKEN, or what the storage's own client "
            "reads.",
        )
    if config.cluster.address is not None:
        require_address(config.cluster.address)


def _has_password(value: object) -> bool:
    return isinstance(value, str) and _PASSWORD.search(value) is not None


def _open(config: RunConfig, record: OpenRecord, tracker: MlflowTracker) -> ActiveRun:
    provenance = {
        "run_id": record.record.run_id,
        "prefect_flow_run_id": record.record.attempts[-1].prefect_flow_run_id,
        "mlflow_experiment": places.experiment(config),
        "commit": places.commit() or "unknown",
    }

    def keep(role: str, artifact: Artifact[Any], cached: bool) -> None:
        record.add(role, artifact, cached=cached)
        run._note_mlflow()

    tracking.log_recipe(tracker, config, record.folder)
    workspace = wiring.open_workspace(config, tracker, provenance, keep)
    run = ActiveRun(record, tracker, workspace)
    return run


def _rename_flow_run(record: records.RunRecord) -> None:
    attempt = len(record.attempts)
    name = record.run_id if attempt == 1 else f"{record.run_id} (attempt {attempt})"
    with get_client(sync_client=True) as client:
        client.update_flow_run(UUID(record.attempts[-1].prefect_flow_run_id), name=name)
