"""What a person reads at the end of a run, and weeks later."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from flows import run
from flows.ahead import Ahead
from flows.cancelling import CancelledInPrefect
from flows.records import Attempt, RunRecord, open_record
from flows.report import addresses, runs_table, show_record
from flows.result import RunResult
from qlora_core.artifacts import Artifact, EvalReport, Metric
from qlora_core.backends.ray_process import WaitingDriver
from qlora_core.config import RunConfig, WorkspaceConfig
from qlora_core.errors import LaunchError


@pytest.fixture
def in_tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def record() -> RunRecord:
    config = {"name": "r", "model": {"source": "org/m"}, "dataset": {"source": "org/d"}}
    started = "2026-06-01T22:30:00.000+00:00"
    return RunRecord(
        run_id="r-1",
        config=RunConfig.model_validate(config),
        recipe="0" * 64,
        state="completed",
        attempts=(Attempt(prefect_flow_run_id="f", host="h", pid=1, started=started),),
    )


def printed(*things: object) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(*things)
    return capture.get()


def test_the_next_commands_name_the_store_where_it_is_not_the_one_they_look_in(tmp_path, record):
    store, home = tmp_path / "my store", tmp_path / "home"

    there = printed(addresses(store, home, record, None))
    at_home = printed(addresses(home, home, record, None))

    for command in ("qlora ui", "qlora show r-1", "qlora chat r-1"):
        assert f"{command} --store '{store}'" in there
        assert command in at_home
    assert "--store" not in at_home


def test_when_a_run_began_is_told_by_the_clock_on_the_wall(record, in_tokyo):
    console = Console(width=200)

    with console.capture() as capture:
        show_record(console, record)
        console.print(runs_table([record]))

    assert capture.get().count("2026-06-02 07:30:00") == 2


def test_a_run_that_fails_after_it_was_measured_still_shows_what_was_measured(
    tmp_path, record, monkeypatch
):
    def fails_at_the_end(config: RunConfig, *_: object) -> RunResult:
        opened = open_record(tmp_path, config, "flow-1")
        opened.add("tuned_report", report_of(tmp_path), cached=False)
        opened.close("failed", "MLflow is away")
        raise LaunchError("MLflow is away")

    monkeypatch.setattr(run, "run_recipe", fails_at_the_end)
    config = record.config.model_copy(update={"workspace": WorkspaceConfig(store=str(tmp_path))})
    console = Console(width=200)

    with console.capture() as capture, pytest.raises(LaunchError):
        run.run_and_report(config, console, Ahead(lambda: None, WaitingDriver()))

    assert "exact_match" in capture.get()
    assert "0.750" in capture.get()
    assert "MLflow is away" not in capture.get()  # the command says it, below


def test_a_run_that_was_cancelled_in_prefect_says_so_to_whoever_watches_it(
    tmp_path, record, monkeypatch
):
    def cancelled(*_: object) -> RunResult:
        raise CancelledInPrefect

    monkeypatch.setattr(run, "run_recipe", cancelled)
    config = record.config.model_copy(update={"workspace": WorkspaceConfig(store=str(tmp_path))})
    console = Console(width=200)

    with console.capture() as capture, pytest.raises(KeyboardInterrupt):
        run.run_and_report(config, console, Ahead(lambda: None, WaitingDriver()))

    assert capture.get().strip() == "Cancelled in Prefect."


def report_of(folder: Path) -> Artifact[EvalReport]:
    facts = EvalReport(
        subject="tuned",
        dataset_digest="a" * 64,
        metrics={"exact_match": Metric(value=0.75, num_rows=4)},
        num_truncated=0,
        samples=(),
        seconds=1.0,
    )
    return Artifact(stage="evaluate", key="k", digest="d", path=folder, facts=facts)
