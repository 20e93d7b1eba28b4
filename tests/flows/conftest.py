"""A home with a Prefect server of its own, made once; the environment that leads to it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows import server


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """QLORAFLOW_HOME for this session, whose servers are ended with it."""
    folder = tmp_path_factory.mktemp("home")
    before = {name: os.environ.pop(name, None) for name in ("PREFECT_API_URL", "QLORAFLOW_HOME")}
    os.environ["QLORAFLOW_HOME"] = str(folder)
    yield folder
    server.stop_server(folder, force=True)
    server.stop_mlflow_ui(folder)
    del os.environ["QLORAFLOW_HOME"]
    os.environ.update({name: value for name, value in before.items() if value is not None})


@pytest.fixture(scope="session")
def connection(home: Path) -> Iterator[server.Connection]:
    """A real Prefect server, in use."""
    found = server.ensure_server(home)
    with found.in_use():
        yield found
