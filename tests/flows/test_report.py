"""What a person reads at the end of a run, and weeks later."""

import time
from collections.abc import Iterator

import pytest
from rich.console import Console

from flows.records import Attempt, RunRecord
from flows.report import addresses, runs_table, show_record
from qlora_core.config import RunConfig


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
