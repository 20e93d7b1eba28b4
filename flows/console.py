"""What a person sees while a run works: one bar a stage, or plain lines where there is no terminal.

Stages report from several threads at once (the base model is evaluated beside training); Rich's
display is safe for that, and the plain writer holds a lock. A plain line is written when a stage
begins, at most every few seconds after that, and when it ends, so a log file stays short.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PLAIN_EVERY_S = 10.0
_NAME_WIDTH = 17


class RichProgress:
    """Progress bars on a terminal; a `qlora_core.ports.Progress`."""

    def __init__(self, display: Progress) -> None:
        self._display = display
        self._bars: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def update(self, stage: str, done: float, total: float, note: str = "") -> None:
        """Show ``done`` of ``total``."""
        with self._lock:
            if stage not in self._bars:
                self._bars[stage] = self._display.add_task(title(stage), total=total, note="")
            bar = self._bars[stage]
        self._display.update(bar, completed=done, total=total, note=escape(note))

    def say(self, stage: str, message: str) -> None:
        """Print a line above the bars."""
        self._display.console.print(f"[dim]{title(stage)}:[/] {escape(message)}", highlight=False)


class PlainProgress:
    """One line now and then, for logs and pipes; a `qlora_core.ports.Progress`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: dict[str, float] = {}
        self._lock = threading.Lock()

    def update(self, stage: str, done: float, total: float, note: str = "") -> None:
        """Write a line if the stage begins or ends, or if the last one is some seconds old."""
        now = time.monotonic()
        with self._lock:
            is_due = now - self._last.get(stage, -PLAIN_EVERY_S) >= PLAIN_EVERY_S
            if not (is_due or done >= total):
                return
            self._last[stage] = now
            share = f"{done / total:4.0%}" if total else "    "
            self._write(f"{title(stage):<{_NAME_WIDTH}} {share}  {note}")

    def say(self, stage: str, message: str) -> None:
        """Write a line."""
        with self._lock:
            self._write(f"{title(stage):<{_NAME_WIDTH}}       {message}")

    def _write(self, line: str) -> None:
        self._console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress_on(console: Console) -> Iterator[RichProgress | PlainProgress]:
    """Show progress on this console until the block ends."""
    if not console.is_terminal:
        yield PlainProgress(console)
        return
    display = Progress(
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}", style="bold"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>4.0f} %"),
        _TimeColumn(),
        TextColumn("{task.fields[note]}", style="cyan"),
        console=console,
    )
    with display:
        yield RichProgress(display)


def title(stage: str) -> str:
    """Return a stage's name for people: ``prepare_dataset`` is "prepare dataset"."""
    return stage.replace("_", " ")


class _TimeColumn(ProgressColumn):
    """Time left while a stage works, time taken once it is done."""

    def __init__(self) -> None:
        super().__init__()
        self._left, self._taken = TimeRemainingColumn(compact=True), TimeElapsedColumn()

    def render(self, task: Task) -> Text:
        """Choose by whether the task is done."""
        return self._taken.render(task) if task.finished else self._left.render(task)
