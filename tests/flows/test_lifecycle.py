"""How a run ends when what it would write its end to is away, or its stages take their time."""

import errno
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from flows import lifecycle
from flows.lifecycle import _closed_at_end, _stages_ended
from flows.records import OpenRecord, load_record, open_record
from qlora_core.artifacts import Facts
from qlora_core.backends.memory import MemoryRegistry, MemoryTracker, RecordingProgress
from qlora_core.backends.mlflow_replay import TrackingReport
from qlora_core.errors import DataError, StoreError
from qlora_core.ports import Services, stage
from qlora_core.store import Store
from tasks.progress import RunProgress, StoppedError
from tasks.wiring import Surroundings, Workspace, surrounded_by
from tests.flows.scenes import tiny_recipe
from tests.flows.test_records import fail_to_write, recipe


class Tracker:
    """Keeps how it was closed; the disk with its journal may be away."""

    def __init__(self, *, is_away: bool = False, num_waiting: int = 0) -> None:
        self.closed: list[str] = []
        self._is_away, self._num_waiting = is_away, num_waiting

    def close(self, status: str, timeout_s: float) -> TrackingReport:
        self.closed.append(status)
        if self._is_away:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return TrackingReport(
            run_id="1",
            folder=Path("journal"),
            num_waiting=self._num_waiting,
            num_refused=0,
            num_lost=0,
            reason="",
        )


@pytest.fixture
def record(tmp_path) -> OpenRecord:
    return open_record(tmp_path, recipe(), "flow-1")


@pytest.fixture
def watcher():
    shown = RecordingProgress()
    with surrounded_by(Surroundings(shown)):
        yield shown


def test_what_ended_a_run_is_told_though_its_store_cannot_be_written_any_more(
    record, watcher, monkeypatch, tmp_path
):
    tracker = Tracker(is_away=True)
    fail_to_write(record, errno.EROFS, monkeypatch)

    with pytest.raises(StoreError, match="disk quota"), _closed_at_end(record, tracker):
        raise StoreError("your disk quota is used up")

    assert tracker.closed == ["FAILED"]
    assert load_record(tmp_path).state == "interrupted", "nobody holds it"
    said = [message for _, message in watcher.said]
    assert "record does not say how it ended: cannot write" in said[0]
    assert "MLflow does not know how the run ended" in said[1]


def test_a_run_that_fails_says_what_mlflow_has_not_got(record, watcher):
    tracker = Tracker(num_waiting=7)

    with pytest.raises(DataError), _closed_at_end(record, tracker):
        raise DataError("row 3")

    (said,) = watcher.said
    assert said == ("finetune", "7 tracking entries wait in journal")


@pytest.fixture
def workspace(tmp_path, watcher) -> Workspace:
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").touch()
    progress = RunProgress(watcher)
    services = Services(MemoryTracker(), MemoryRegistry(), None, progress, check=progress.check)
    config = tiny_recipe(tmp_path, tmp_path / "model", tmp_path / "rows.jsonl")
    return Workspace(config, Store(tmp_path), services, progress, lambda *_: None)


def start(workspace: Workspace, last_act: Callable[[], object]) -> None:
    """Start a stage that hears that it shall end when ``last_act`` is done."""
    begun = threading.Event()

    @stage("slow", version=1, facts=Facts)
    def slow(ctx) -> Facts:
        begun.set()
        while not workspace.progress.is_stopping:
            time.sleep(0.01)
        last_act()
        ctx.progress.check("slow")
        return Facts()

    def work() -> None:
        with suppress(StoppedError):
            workspace.produce("one", slow)

    threading.Thread(target=work, daemon=True).start()
    assert begun.wait(30)


def test_a_run_is_over_for_record_and_mlflow_when_its_stages_have_ended(
    record, watcher, workspace, tmp_path
):
    tracker, logged = Tracker(), []

    def last_act() -> None:
        time.sleep(0.3)
        record.track("mlflow-1")
        logged.append(list(tracker.closed))

    start(workspace, last_act)
    ended = pytest.raises(KeyboardInterrupt)
    with ended, _closed_at_end(record, tracker), _stages_ended(workspace):
        raise KeyboardInterrupt

    found = load_record(tmp_path)
    assert (found.state, found.mlflow_run_id) == ("cancelled", "mlflow-1")
    assert (logged, tracker.closed) == ([[]], ["KILLED"])
    assert watcher.said == []


def test_a_stage_that_does_not_end_is_named_and_not_waited_for_for_ever(
    watcher, workspace, monkeypatch
):
    monkeypatch.setattr(lifecycle, "_STAGES_END_S", 0.1)
    may_end = threading.Event()

    start(workspace, lambda: may_end.wait(30))
    with pytest.raises(DataError), _stages_ended(workspace):
        raise DataError("row 3")

    may_end.set()
    ((_, said),) = watcher.said
    assert "being told to: slow." in said
    assert "qlora sync" in said
