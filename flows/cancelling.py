"""Hear that a run was cancelled in Prefect, where no worker of Prefect's listens.

Cancelling in Prefect's UI, or with `prefect flow-run cancel`, only writes `Cancelling` down at the
server; whoever owns the run's process has to act on it. Prefect's workers and runners do, for runs
of a deployment. But nobody owns a process that calls a flow, as `qlora run` does, and the flow
engine never looks; after some minutes the server writes `Cancelled`, and the run goes on. So here
a thread reads the run's state every few seconds.

What it then does is what SIGTERM does, for that has a way out already. A signal to the main thread
wakes it whatever it waits for, which an exception set from another thread would not; Prefect has a
handler for SIGTERM while a flow runs, and unlike SIGINT it is not ignored by what a shell started
in the background. A flow in another thread hears no signals: its stages are told to stop, and the
first that does ends it.
"""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

_POLL_S = 2.0
_ASK_TIMEOUT_S = 5.0


class CancelledInPrefect(KeyboardInterrupt):
    """A person cancelled the run in Prefect: no error, and whoever knows Ctrl-C knows it."""

    def __init__(self) -> None:
        super().__init__("Cancelled in Prefect.")


@contextmanager
def heeding_prefect(stop: Callable[[], None]) -> Iterator[None]:
    """End the block when the flow run it is part of is cancelled in Prefect.

    A deployed run has an owner who does that.

    Args:
        stop: Makes every stage end soon.

    Raises:
        CancelledInPrefect: It was cancelled, whatever else that has brought about.
    """
    if runtime.deployment.id is not None:
        yield
        return
    flow_run_id = UUID(str(runtime.flow_run.id))
    # By itself the client tries again for minutes, further and further apart, and hears late of it.
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        impatient = copy_context()
    with (
        get_client(sync_client=True, httpx_settings={"timeout": _ASK_TIMEOUT_S}) as client,
        ended_when(lambda: impatient.run(_is_cancelled, client, flow_run_id), stop),
    ):
        yield


@contextmanager
def ended_when(
    is_cancelled: Callable[[], bool], stop: Callable[[], None], poll_s: float = _POLL_S
) -> Iterator[None]:
    """End the block when ``is_cancelled`` says so; what it raises is no answer.

    Args:
        is_cancelled: Asked in a thread.
        stop: Makes the block end, where it is not in the main thread.
        poll_s: How often to ask [seconds].

    Raises:
        CancelledInPrefect: It said so.
    """
    watch = _Watch(is_cancelled, _signals_main_thread() or stop)
    threading.Thread(target=watch.follow, args=(poll_s,), daemon=True).start()
    try:
        yield
        watch.end()
    except BaseException as error:
        if watch.end():
            raise CancelledInPrefect from error
        raise
    if watch.end():
        raise CancelledInPrefect


class _Watch:
    """Asks until it is answered or told to end; then it interrupts nobody any more."""

    def __init__(self, is_cancelled: Callable[[], bool], interrupt: Callable[[], None]) -> None:
        self._is_cancelled, self._interrupt = is_cancelled, interrupt
        self._acting = threading.Lock()  # who leaves the block waits for a signal on its way there
        self._over = threading.Event()
        self._heard = False

    def follow(self, poll_s: float) -> None:
        while not self._over.wait(poll_s):
            if self._asked():
                self._act()

    def end(self) -> bool:
        """Say whether the run was cancelled before this."""
        with self._acting:
            self._over.set()
            return self._heard

    def _act(self) -> None:
        with self._acting:
            if not self._over.is_set():
                self._over.set()
                self._heard = True
                self._interrupt()

    def _asked(self) -> bool:
        try:
            return self._is_cancelled()
        except Exception as error:  # the server is away, say: neither is that a reason to end
            logging.getLogger(__name__).debug("cannot ask whether to go on: %s", error)
            return False


def _signals_main_thread() -> Callable[[], None] | None:
    """Return what interrupts this thread; None: it is not the one that hears signals."""
    if threading.current_thread() is not threading.main_thread():
        return None
    main = threading.get_ident()
    return lambda: signal.pthread_kill(main, signal.SIGTERM)


def _is_cancelled(client: SyncPrefectClient, flow_run_id: UUID) -> bool:
    state = client.read_flow_run(flow_run_id).state
    return state is not None and (state.is_cancelling() or state.is_cancelled())
