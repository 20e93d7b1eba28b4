"""How we talk to MLflow: a client for one address, and nothing global.

MLflow's fluent API keeps the address and the active run in globals and in the environment, where
two runs in one process would meet; so only `MlflowClient(tracking_uri=...)` is used. What cannot be
given to a client (patience, telemetry) are environment variables: set here at the first connection,
and only where the user has not set them. Importing mlflow takes seconds, so it happens here too, in
whichever thread connects.
"""

import getpass
import logging
import os
import re
from pathlib import Path
from typing import Any

from qlora_core.artifacts import Frozen
from qlora_core.backends.masking import mask_credentials
from qlora_core.backends.mlflow_database import ensure_database
from qlora_core.errors import LaunchError

PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # MLflow's own 7 block for 4 minutes
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_REASON = re.compile(r"(?<=\d\] )[\w ]+|timed out|too many \d+ error responses")  # [Errno 111] ...
_QUIET = ("mlflow.store.db.utils", "alembic", "urllib3.connectionpool")


class Place(Frozen):
    """Where runs and models are kept."""

    tracking_uri: str
    artifact_location: str | None = None
    """Where a new experiment keeps its files; none: the server says."""


def local_place(store: Path) -> Place:
    """Return the default: SQLite and files inside ``store``, wherever the process was started."""
    store = store.expanduser().resolve()
    return Place(
        tracking_uri=f"sqlite:///{store / 'mlflow.db'}",
        artifact_location=(store / "mlartifacts").as_uri(),
    )


def connect(tracking_uri: str) -> Any:
    """Return an `MlflowClient`; the first call in a process takes seconds."""
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    if tracking_uri.startswith("sqlite:///"):
        ensure_database(Path(tracking_uri.removeprefix("sqlite:///")))
    from mlflow.tracking.client import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri)


def find_experiment(client: Any, name: str, artifact_location: str | None) -> str:
    """Return the id of an experiment, making it, or taking it out of the bin, if need be."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_location))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process was quicker
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def source_tags() -> dict[str, str]:
    """Return the tags that MLflow's pages show as a run's source; nothing is guessed from git."""
    return {
        "mlflow.source.name": "qlora",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user(),
    }


def is_absent(error: Exception) -> bool:
    """Say whether MLflow answered that there is no such thing."""
    return getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST"


def is_refused(error: Exception) -> bool:
    """Say whether MLflow will answer the same however often it is asked: the content is wrong."""
    return getattr(error, "error_code", "") in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


def unreachable(tracking_uri: str, error: Exception) -> LaunchError:
    """Say in our words that MLflow did not do what was asked."""
    said = mask_credentials(str(error))
    reason = _REASON.search(said)
    if "failed with exception" in said and reason:  # of urllib3's page of text, what happened
        how = f"does not answer: {reason[0]}."
    else:
        how = f"did not answer as it should: {said.splitlines()[0][:300]}"
    return LaunchError(
        f"MLflow at {mask_credentials(tracking_uri)} {how}",
        why="What was built until then is kept.",
        fix="Start that server, or correct workspace.tracking_uri (or MLFLOW_TRACKING_URI); the "
        "same command then goes on from here.",
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container user without a name
        return "unknown"
