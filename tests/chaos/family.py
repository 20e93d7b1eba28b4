"""What a trial has started, wherever it has moved.

Children of a killed process get another parent: the nearest ancestor that has asked for them, else
process 1. During a trial we ask (Linux: `PR_SET_CHILD_SUBREAPER`), so everything it has started
stays below this process, whatever sessions and groups Ray makes.
"""

import ctypes
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_PATIENCE_S = 30.0


def started(word: str = "") -> list[psutil.Process]:
    """Return what runs below this process with ``word`` in its command."""
    return [each for each in psutil.Process().children(recursive=True) if word in command(each)]


def command(process: psutil.Process) -> str:
    """Return its command; nothing if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


class Family:
    """What has been started since it was made."""

    def __init__(self) -> None:
        self._before = set(started())

    def alive(self) -> list[psutil.Process]:
        """Return what still runs; what has ended is let go of."""
        young = [each for each in started() if each not in self._before]
        return [each for each in young if not _has_ended(each)]

    def left_over(self, patience_s: float = _PATIENCE_S) -> Iterator[str]:
        """Wait for all to end; name what has not, and kill it."""
        deadline = time.monotonic() + patience_s
        while (alive := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.5)
        for process in alive:
            yield f"still running after {patience_s:.0f} s: {command(process)[:100]}"
            with suppress(psutil.NoSuchProcess):
                process.kill()


@contextmanager
def family() -> Iterator[Family]:
    """Gather what is started within the block."""
    _adopt_orphans(True)
    try:
        yield Family()
    finally:
        _adopt_orphans(False)


def _adopt_orphans(wanted: bool) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0)


def _has_ended(process: psutil.Process) -> bool:
    try:
        if process.status() != psutil.STATUS_ZOMBIE:
            return False
        with suppress(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)
    except psutil.NoSuchProcess:
        pass
    return True
