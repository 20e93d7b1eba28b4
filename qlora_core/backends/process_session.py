"""A child process and everything it starts, as one thing that can be ended.

Process groups are not enough: Ray moves some of its processes into groups of their own. But they
stay in the *session* of the child that started them, even when that child is gone, so a session is
what we start, look through and end.
"""

import os
import signal
import time
from collections.abc import Iterator

import psutil


def members(session: int) -> Iterator[int]:
    """Yield the processes of a session that are still running, our own process last."""
    for pid in sorted(psutil.pids(), key=lambda pid: pid == os.getpid()):
        try:
            if os.getsid(pid) == session and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                yield pid
        except (ProcessLookupError, PermissionError, psutil.Error):
            continue


def send(session: int, number: signal.Signals) -> bool:
    """Send a signal to every process of a session; say whether there was any."""
    found = False
    for pid in members(session):
        found = True
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
    return found


def end(session: int, *, patience_s: float) -> None:
    """End a session: ask, wait at most ``patience_s``, then kill what is left."""
    deadline = time.monotonic() + patience_s
    is_alive = send(session, signal.SIGTERM)
    while is_alive and time.monotonic() < deadline:
        time.sleep(0.1)
        is_alive = any(True for _ in members(session))
    while is_alive:
        is_alive = send(session, signal.SIGKILL)
        time.sleep(0.05)
