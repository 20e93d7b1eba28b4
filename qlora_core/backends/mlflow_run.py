"""The MLflow run that a journal belongs to: found again whoever made it, and made once.

The run's id is on the disk as soon as it exists, and the run carries the journal's id as a tag, so
that a process that died between the two does not leave a second run behind. A run that somebody
deleted, or that another server has never heard of, is made anew.
"""

import uuid
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qlora_core.artifacts import Frozen
from qlora_core.backends.journal import replace_file
from qlora_core.backends.masking import mask_credentials
from qlora_core.backends.mlflow_client import find_experiment, is_absent

JOURNAL_TAG = "qlora.journal"


class Destination(Frozen):
    """Which MLflow run a journal belongs to; kept beside the journal for its successors."""

    tracking_uri: str
    """Credentials in it are masked on the disk."""
    experiment: str
    run_name: str
    tags: dict[str, str]
    artifact_location: str | None
    journal_id: str
    created_s: float
    """When the run began, Unix time."""
    run_id: str | None = None


def save_destination(folder: Path, destination: Destination) -> None:
    """Keep ``destination`` beside the journal, without passwords."""
    masked = mask_credentials(destination.tracking_uri)
    text = destination.model_copy(update={"tracking_uri": masked}).model_dump_json(indent=2)
    replace_file(folder / "destination.json", text)


def load_destination(folder: Path) -> Destination | None:
    """Return what an earlier process kept, or None."""
    try:
        return Destination.model_validate_json((folder / "destination.json").read_text())
    except (FileNotFoundError, ValidationError):
        return None


def new_journal_id() -> str:
    """Return an id that no other journal has."""
    return uuid.uuid4().hex


def continued(folder: Path, wanted: Destination) -> Destination:
    """Keep ``wanted`` in ``folder`` as the continuation of what an earlier process left there."""
    kept = load_destination(folder)
    if kept is not None:
        same_server = kept.tracking_uri == mask_credentials(wanted.tracking_uri)
        run_id = kept.run_id if same_server and kept.run_id else wanted.run_id
        update = {"journal_id": kept.journal_id, "created_s": kept.created_s, "run_id": run_id}
        wanted = wanted.model_copy(update=update)
    save_destination(folder, wanted)
    return wanted


def find_run(client: Any, destination: Destination) -> Any:
    """Return the MLflow run of ``destination``, or None where there is none to go on with."""
    from mlflow.exceptions import MlflowException

    run_id = destination.run_id or _run_of_a_dead_process(client, destination)
    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if is_absent(error):
            return None
        raise
    return None if run.info.lifecycle_stage == "deleted" else run


def create_run(client: Any, destination: Destination) -> Any:
    """Make the MLflow run of ``destination``."""
    return client.create_run(
        _experiment(client, destination),
        start_time=int(destination.created_s * 1000),
        tags=destination.tags | {JOURNAL_TAG: destination.journal_id},
        run_name=destination.run_name,
    )


def _run_of_a_dead_process(client: Any, destination: Destination) -> str | None:
    wanted = f"tags.`{JOURNAL_TAG}` = '{destination.journal_id}'"
    experiment_id = _experiment(client, destination)
    found = client.search_runs([experiment_id], filter_string=wanted, max_results=1)
    return str(found[0].info.run_id) if found else None


def _experiment(client: Any, destination: Destination) -> str:
    return find_experiment(client, destination.experiment, destination.artifact_location)
