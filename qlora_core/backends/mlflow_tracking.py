"""Track a run in MLflow without ever waiting for MLflow.

Every call writes one line to the run's local journal (see `journal`) and returns. A daemon thread
imports mlflow, continues or creates the run, and sends what waits (see `mlflow_delivery`), more and
more patiently while the server is away. `close` waits a while for the rest and says how much is
left; `replay` sends that later, from any process.

System metrics are sampled here and go the same way, as steps of whole seconds since the run began.
"""

import importlib.metadata
import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from qlora_core.backends.journal import (
    DatasetRecord,
    EndRecord,
    FileRecord,
    Journal,
    MetricsRecord,
    ParamsRecord,
    Record,
    RunStatus,
    StartRecord,
    TagsRecord,
)
from qlora_core.backends.masking import mask_credentials, mask_secrets
from qlora_core.backends.mlflow_client import connect, local_place, source_tags
from qlora_core.backends.mlflow_delivery import Delivery
from qlora_core.backends.mlflow_replay import BUSY, TrackingReport, replay, report_of, waiting
from qlora_core.backends.mlflow_run import Destination, continued, new_journal_id
from qlora_core.backends.system_metrics import sample_system
from qlora_core.errors import storage_error

__all__ = ["MlflowTracker", "TrackingReport", "flatten", "replay", "try_out", "waiting"]

_SEND_EVERY_S = 1.0
_SAMPLE_EVERY_S = 10.0
_LONGEST_PAUSE_S = 30.0
_LAST_TRIES = 2


class MlflowTracker:
    """A `Tracker` that journals at once and forwards to MLflow in the background.

    Args:
        journal_folder: The run's own folder; a successor given the same one continues the run.
        tracking_uri: MLflow server or database.
        experiment: Name of the MLflow experiment.
        run_name: Name of the MLflow run.
        run_id: An MLflow run to continue; one that the folder remembers goes before it.
        tags: Of the run, from its start.
        artifact_location: Where a new experiment keeps its files; none: the server says.
        sample_every_s: Seconds between samples of CPU and memory; none: no samples.

    Raises:
        StoreError: ``journal_folder`` cannot be written.
    """

    def __init__(
        self,
        journal_folder: Path,
        tracking_uri: str,
        experiment: str,
        run_name: str,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        artifact_location: str | None = None,
        sample_every_s: float | None = _SAMPLE_EVERY_S,
    ) -> None:
        wanted = source_tags() | dict(tags or {})
        clean = {name: mask_credentials(text) for name, text in wanted.items()}
        try:
            self._journal = Journal(journal_folder)
            destination = continued(
                journal_folder,
                Destination(
                    tracking_uri=tracking_uri,
                    experiment=experiment,
                    run_name=run_name,
                    tags=clean,
                    artifact_location=artifact_location,
                    journal_id=new_journal_id(),
                    created_s=time.time(),
                    run_id=run_id,
                ),
            )
        except OSError as error:
            raise storage_error(error, journal_folder) from error
        self._delivery = Delivery(self._journal, destination)
        self._num_lost, self._reason = 0, ""
        self._sample_every_s = sample_every_s
        self._sampled_s = time.monotonic()
        self._closing = threading.Event()
        self._append(StartRecord())
        self.set_tags(clean)
        self._thread = threading.Thread(target=self._forward, name="mlflow-forwarder", daemon=True)
        self._thread.start()

    # -- Tracker ---------------------------------------------------------------------------------

    def log_params(self, params: Mapping[str, str | int | float | bool]) -> None:
        """Write-once parameters of the run; one that changes on resume is kept as a tag."""
        values = {name: mask_credentials(str(value)) for name, value in params.items()}
        self._append(ParamsRecord(values=values))

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Numbers at a step; of the same name and step the first counts."""
        values = {name: float(value) for name, value in metrics.items()}
        self._append(MetricsRecord(values=values, step=step))

    def log_dataset(self, name: str, digest: str, source: str, context: str, num_rows: int) -> None:
        """A dataset that went in; ``context`` is `training` or `heldout`."""
        self._append(
            DatasetRecord(
                name=name,
                digest=digest,
                source=mask_credentials(source),
                context=context,
                num_rows=num_rows,
            )
        )

    def log_file(self, path: Path, folder: str = "") -> None:
        """A file (or a folder) to keep with the run; it is copied now, so keep large ones out."""
        self._keep(folder, lambda: self._journal.copy_in(path))

    def log_text(self, place: str, text: str) -> None:
        """Text to keep with the run as a file at a relative place; secrets in it are masked."""
        folder, _, name = place.rpartition("/")
        self._keep(folder, lambda: self._journal.write_in(name, mask_secrets(text)))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Text to find the run by; the last value counts."""
        values = {name: mask_credentials(str(text)) for name, text in tags.items()}
        self._append(TagsRecord(values=values))

    # -- life ------------------------------------------------------------------------------------

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run; none while no server has answered yet."""
        return self._delivery.run_id

    def wait_for_run_id(self, timeout_s: float) -> str | None:
        """Return the id of the MLflow run, waiting for it if need be; none after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while self.run_id is None and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(0.05)
        return self.run_id

    def close(self, status: RunStatus, timeout_s: float = 30.0) -> TrackingReport:
        """End the run and send the rest; return after ``timeout_s`` at the latest.

        What could not be sent stays in the journal. Calling it again changes nothing.
        """
        if not self._closing.is_set():
            self._append(EndRecord(status=status))
            self._closing.set()
        self._thread.join(timeout_s)
        return report_of(self._delivery, self._num_lost, self._reason)

    # -- inside ----------------------------------------------------------------------------------

    def _append(self, record: Record) -> None:
        try:
            self._journal.append(record)
        except OSError as error:
            self._lose(error)

    def _keep(self, folder: str, copy: Callable[[], str]) -> None:
        try:
            copy_at = copy()
        except OSError as error:
            self._lose(error)
        else:
            self._append(FileRecord(copy_at=copy_at, folder=folder))

    def _lose(self, error: OSError) -> None:
        self._num_lost += 1
        self._reason = str(error)

    def _forward(self) -> None:
        while True:
            with self._journal.sending() as alone:
                if alone:
                    return self._send_until_closed()
            self._reason = BUSY
            if self._closing.wait(_SEND_EVERY_S):
                return None

    def _send_until_closed(self) -> None:
        failures, last_tries = 0, 0
        while True:
            closing = self._closing.is_set()
            self._sample()
            failures = 0 if self._try_to_send() else failures + 1
            last_tries += closing
            if closing and (failures == 0 or last_tries >= _LAST_TRIES):
                return
            self._pause(failures, closing)

    def _pause(self, failures: int, closing: bool) -> None:
        if closing:
            time.sleep(_SEND_EVERY_S / 2)
        else:
            self._closing.wait(min(_LONGEST_PAUSE_S, _SEND_EVERY_S * 2**failures))

    def _try_to_send(self) -> bool:
        try:
            self._delivery.deliver()
        except Exception as error:  # whatever tracking suffers from, training must not notice
            self._reason = mask_credentials(f"{type(error).__name__}: {error}")[:500]
            return False
        return True

    def _sample(self) -> None:
        now_s = time.monotonic()
        if self._sample_every_s is None or now_s - self._sampled_s < self._sample_every_s:
            return
        self._sampled_s = now_s
        created_s = self._delivery.destination.created_s
        self.log_metrics(sample_system(), step=int(time.time() - created_s))


def flatten(config: BaseModel) -> dict[str, str | int | float | bool]:
    """Return a nested config as parameters: `{"training.learning_rate": 0.0002, ...}`.

    What is not set is `none`; a list is JSON text.
    """
    flat: dict[str, str | int | float | bool] = {}
    _flatten(config.model_dump(mode="json"), "", flat)
    return flat


def _flatten(value: Any, name: str, flat: dict[str, str | int | float | bool]) -> None:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            _flatten(inner, f"{name}.{key}" if name else str(key), flat)
    elif isinstance(value, list | dict):
        flat[name] = json.dumps(value, ensure_ascii=False)
    else:
        flat[name] = "none" if value is None else value


def try_out(folder: Path) -> str:
    """Track one number in a new MLflow in ``folder``, read it back, and say so in one line.

    Raises:
        RuntimeError: It did not come back.
    """
    place = local_place(folder)
    tracker = MlflowTracker(
        folder / "journal",
        place.tracking_uri,
        "doctor",
        "doctor",
        artifact_location=place.artifact_location,
        sample_every_s=None,
    )
    tracker.log_metrics({"answer": 42.0}, step=1)
    report = tracker.close("FINISHED", timeout_s=120)
    if not report.is_complete() or report.run_id is None:
        raise RuntimeError(report.sentence() or "no MLflow run was made")
    history = connect(place.tracking_uri).get_metric_history(report.run_id, "answer")
    if [(point.step, point.value) for point in history] != [(1, 42.0)]:
        raise RuntimeError(f"a metric came back as {history}")
    return f"{importlib.metadata.version('mlflow')}: a metric went to SQLite and back"
