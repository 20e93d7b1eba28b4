"""MLflow's database is whole or not there, whenever its maker is killed."""

import multiprocessing
import os
import signal
import sqlite3
import time
from pathlib import Path

from qlora_core.backends.mlflow_client import connect
from qlora_core.backends.mlflow_database import ensure_database


def test_a_maker_killed_among_the_migrations_leaves_the_place_free_for_the_next(tmp_path):
    database = tmp_path / "mlflow.db"
    maker = multiprocessing.get_context("spawn").Process(target=ensure_database, args=(database,))
    maker.start()
    unfinished = tmp_path / ".mlflow.db.new"
    while not (unfinished.exists() and _num_tables(unfinished) > 3):
        time.sleep(0.01)
    os.kill(maker.pid, signal.SIGKILL)
    maker.join()
    was_whole = database.exists()

    client = connect(f"sqlite:///{database}")

    assert not was_whole
    assert client.create_experiment("after") == "1"


def _num_tables(path: Path) -> int:
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            return database.execute("select count(*) from sqlite_master").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def test_a_database_that_is_there_is_left_as_it_is(tmp_path):
    database = tmp_path / "mlflow.db"
    connect(f"sqlite:///{database}").create_experiment("mine")
    before = database.stat().st_mtime_ns

    ensure_database(database)

    assert database.stat().st_mtime_ns == before
