"""Make MLflow's SQLite database whole or not at all.

A new database takes MLflow some fifty migrations, and SQLite cannot take a table's change back. A
process killed among them leaves a file that no MLflow opens again ("duplicate column name"). So the
database is made beside its place and moved there when it is whole, by one process at a time.
"""

import fcntl
from pathlib import Path


def ensure_database(path: Path) -> None:
    """Make an MLflow database at ``path`` unless there is one."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _make(path, path.with_name(f".{path.name}.new"))


def _make(path: Path, unfinished: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for left in unfinished.parent.glob(f"{unfinished.name}*"):  # SQLite's journal among them
        left.unlink()
    artifacts = (path.parent / "mlartifacts").as_uri()
    store = SqlAlchemyStore(f"sqlite:///{unfinished}", artifacts)
    store.engine.dispose()
    unfinished.rename(path)
