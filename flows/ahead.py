"""What a run needs and what takes seconds to start, started beside seconds of imports.

torch, transformers, Prefect and MLflow take a core ten seconds to import; Ray and a Prefect server
take others as long. So this module imports none of them, and starts both.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from flows.records import has_adapter
from flows.server import Connection, ensure_server
from qlora_core.backends.ray_process import WaitingDriver
from qlora_core.backends.ray_resources import require_local_room
from qlora_core.config import RunConfig
from qlora_core.errors import ResourceError
from tasks import places

R = TypeVar("R")


@dataclass(frozen=True)
class Ahead:
    """What was started."""

    connect: Callable[[], Connection]
    """Waits for the Prefect server, and raises why there is none."""
    driver: WaitingDriver
    """Ray's, where training seems due."""


@contextmanager
def started_ahead(config: RunConfig) -> Iterator[Ahead]:
    """Start what a run of ``config`` will need; end the Ray that nobody came to use."""
    connection = _begun(lambda: ensure_server(places.home()))
    driver = WaitingDriver()
    if _is_training_due(config):
        driver.start(places.cluster(config))
    try:
        yield Ahead(connection.result, driver)
    finally:
        driver.end()


def _is_training_due(config: RunConfig) -> bool:
    """Guess it: what is in the store can be told for sure only when all is imported."""
    try:
        require_local_room(places.cluster(config))
    except ResourceError:
        return False  # the run will tell
    return not has_adapter(places.store_root(config), config)


def _begun(call: Callable[[], R]) -> "Future[R]":
    """Begin ``call`` in a thread that does not keep the process from ending."""
    future: Future[R] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
