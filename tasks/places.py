"""Where things are kept and where work is done, from a recipe and the environment.

QLORAFLOW_HOME        the store and the local servers' files (default ~/.qloraflow)
RAY_ADDRESS           a running Ray, if the recipe names none
MLFLOW_TRACKING_URI   an MLflow, if the recipe names none (default: SQLite in the store)
"""

import os
import subprocess
from pathlib import Path

from qlora_core.backends.mlflow_client import Place, local_place
from qlora_core.config import ClusterConfig, RunConfig


def home() -> Path:
    """Return the folder of this user's store and local servers."""
    given = os.environ.get("QLORAFLOW_HOME")
    return Path(given).expanduser().resolve() if given else Path.home() / ".qloraflow"


def store_root(config: RunConfig) -> Path:
    """Return the folder of this recipe's artefacts and run records."""
    given = config.workspace.store
    return Path(given).expanduser().resolve() if given else home()


def tracking_place(config: RunConfig) -> Place:
    """Return where this recipe's runs and models are kept."""
    given = config.workspace.tracking_uri
    return Place(tracking_uri=given) if given else default_tracking_place(store_root(config))


def default_tracking_place(store: Path) -> Place:
    """Return where runs on this store are kept whose recipe does not say."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return Place(tracking_uri=given) if given else local_place(store)


def default_tracking_uri(store: Path) -> str:
    """Return the address of `default_tracking_place`."""
    return default_tracking_place(store).tracking_uri


def experiment(config: RunConfig) -> str:
    """Return the name of this recipe's MLflow experiment."""
    return config.workspace.experiment or config.name


def cluster(config: RunConfig) -> ClusterConfig:
    """Return where training runs.

    A running cluster is taken to have GPUs unless the recipe says otherwise. Its nodes may not be
    there yet, and neither they nor the machine that starts the run may decide what a recipe means.
    """
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    gpus = config.cluster.gpus_per_worker
    if address and gpus is None and config.quantization.compute_dtype != "float32":
        gpus = 1.0
    return config.cluster.model_copy(update={"address": address, "gpus_per_worker": gpus})


def commit() -> str | None:
    """Return the git commit of this project, if it runs from a checkout of its own."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return None
    git = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        asked = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.strip()
