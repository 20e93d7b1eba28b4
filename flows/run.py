"""``qlora run`` and ``qlora sync``: a run with somebody watching it."""

import os
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from flows.ahead import Ahead
from flows.cancelling import CancelledInPrefect
from flows.console import progress_on
from flows.finetune import run_recipe
from flows.records import RunRecord, load_record, records
from flows.report import addresses, show_record
from flows.server import server_status
from qlora_core.backends.mlflow_tracking import replay, waiting
from qlora_core.config import RunConfig
from qlora_core.errors import QLoraError
from tasks import places
from tasks.wiring import Surroundings


def run_and_report(config: RunConfig, console: Console, ahead: Ahead) -> RunRecord:
    """Run a recipe with progress on ``console``, ending in what was built and where to look.

    Args:
        config: The recipe.
        console: Where a person watches.
        ahead: What was started before.

    Raises:
        QLoraError: What went wrong; the same command continues from there.
        KeyboardInterrupt: A person cancelled it.
    """
    store = places.store_root(config)
    begun = datetime.now(UTC).isoformat(timespec="milliseconds")
    try:
        with progress_on(console) as progress:
            result = run_recipe(config, Surroundings(progress, waiting=ahead.driver), ahead.connect)
    except QLoraError:
        _show_measured(store, begun, console)
        raise
    except CancelledInPrefect as cancelled:  # whoever watches here may not have done it
        console.print(f"[yellow]{cancelled}[/]")
        raise
    record = load_record(store, result.run_id)
    console.print()
    show_record(console, record)
    if result.tracking_note:
        console.print(f"[yellow]{escape(result.tracking_note)}[/]")
    home = places.home()
    server = server_status(home)
    console.print(addresses(store, home, record, server.ui_url if server else None))
    return record


def _show_measured(store: Path, begun: str, console: Console) -> None:
    """Print the report of this process's run, if it failed after there were numbers to report."""
    for record in records(store):
        attempt = record.attempts[-1]
        if (
            attempt.pid == os.getpid()
            and attempt.started >= begun
            and "tuned_report" in record.artifacts
        ):
            console.print()
            show_record(console, record.model_copy(update={"error": None}))  # it is told last
            return


def sync_runs(store: Path, console: Console) -> None:
    """Send what MLflow has not yet, of every run that is not at work."""
    folders = waiting(store / "runs")
    for folder in folders:
        left = replay(folder).sentence()
        console.print(f"{folder.parent.name}: {escape(left or 'sent')}", highlight=False)
    if not folders:
        console.print("MLflow has everything.")
