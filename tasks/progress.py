"""How far a run is: shown to a person, told to Prefect's log, and the place where it is stopped.

Stages run in threads, and Python cannot end a thread from outside. But every stage reports its
progress every few tenths of a second; so when a run is told to stop, the next report raises, and
the stage unwinds through its own `finally` blocks.
"""

import logging
import threading
import time

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from qlora_core.errors import QLoraError
from qlora_core.ports import Progress


class StoppedError(QLoraError):
    """The run was cancelled, or another of its stages failed; this stage was asked to end."""


_LOG_EVERY_S = 60.0


class RunProgress:
    """Forwards to what a person sees and to the run's log; raises once the run shall stop.

    Args:
        shown: What a person sees, who may be told several times a second.
        log_every_s: How often the log is told how far a stage is [seconds].
    """

    def __init__(self, shown: Progress, log_every_s: float = _LOG_EVERY_S) -> None:
        self._shown = shown
        self._log_every_s = log_every_s
        self._logged_at: dict[str, float] = {}
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Make the next report of every stage raise `StoppedError`."""
        self._stopping.set()

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping.is_set()

    def check(self, stage: str) -> None:
        """Raise if the run shall stop.

        Raises:
            StoppedError: It shall.
        """
        if self._stopping.is_set():
            raise StoppedError(f"{stage} was stopped before it was done.")

    def update(self, stage: str, done: float, total: float, note: str = "") -> None:
        """Show ``done`` of ``total``; now and then the run's log hears it, too."""
        self.check(stage)
        self._shown.update(stage, done, total, note)
        now = time.monotonic()
        if now - self._logged_at.setdefault(stage, now) >= self._log_every_s:
            self._logged_at[stage] = now
            ending = f", {note}" if note else ""
            _run_log().info("%s: %s of %s%s", stage, _plain(done), _plain(total), ending)

    def say(self, stage: str, message: str) -> None:
        """Show a message and keep it in the run's log."""
        self._shown.say(stage, message)
        _run_log().info("%s: %s", stage, message)


def _plain(amount: float) -> str:
    """Write a number of rows, steps or bytes; where there are parts of one, two digits."""
    return f"{amount:.0f}" if float(amount).is_integer() else f"{amount:.2f}"


def _run_log() -> "logging.Logger | logging.LoggerAdapter[logging.Logger]":
    try:
        return get_run_logger()
    except MissingContextError:  # from a thread that a stage started by itself
        return logging.getLogger(__name__)
