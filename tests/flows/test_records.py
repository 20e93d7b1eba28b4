"""Run records: continued after a kill, never after success, found by how their id begins."""

import errno
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from flows.chat import can_talk
from flows.records import OpenRecord, bury_interrupted, load_record, open_record, records
from qlora_core.artifacts import Artifact, RegisteredModel
from qlora_core.config import RunConfig
from qlora_core.errors import StoreError, UserError
from tests.training.faulty_disk import FaultyDisk, numberless


def recipe(name="cron", rank=16):
    return RunConfig.model_validate(
        {
            "name": name,
            "model": {"source": "org/model"},
            "dataset": {"source": "org/rows"},
            "adapter": {"rank": rank},
        }
    )


def registered(tmp_path: Path) -> Artifact[RegisteredModel]:
    facts = RegisteredModel(
        name="cron",
        adapter_version="1",
        merged_version=None,
        aliases=("challenger",),
        promoted=False,
        reasons=(),
    )
    return Artifact(stage="register", key="k", digest="d", path=tmp_path, facts=facts)


def abandon(record: OpenRecord) -> None:
    """End as SIGKILL does: the kernel closes the lock, nobody writes a word."""
    record._lock.close()


def test_a_killed_run_is_continued_by_the_same_recipe_with_what_it_knew(tmp_path):
    first = open_record(tmp_path, recipe(), "flow-1")
    first.track("mlflow-1")
    first.add("registered", registered(tmp_path), cached=False)
    abandon(first)

    second = open_record(tmp_path, recipe(), "flow-2")

    assert second.record.run_id == first.record.run_id
    assert second.record.mlflow_run_id == "mlflow-1"
    assert second.record.artifacts["registered"].facts["adapter_version"] == "1"
    assert [a.prefect_flow_run_id for a in second.record.attempts] == ["flow-1", "flow-2"]
    assert second.record.state == "running"


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_run_that_failed_or_was_cancelled_is_continued_as_well(tmp_path, state):
    first = open_record(tmp_path, recipe(), "flow-1")
    first.close(state, "the disk is full")

    second = open_record(tmp_path, recipe(), "flow-2")

    assert second.record.run_id == first.record.run_id
    assert second.record.error is None


def test_a_completed_run_is_never_continued(tmp_path):
    first = open_record(tmp_path, recipe(), "flow-1")
    first.close("completed")

    second = open_record(tmp_path, recipe(), "flow-2")

    assert second.record.run_id != first.record.run_id


def test_another_recipe_does_not_continue_a_killed_run(tmp_path):
    first = open_record(tmp_path, recipe(), "flow-1")
    abandon(first)

    second = open_record(tmp_path, recipe(rank=8), "flow-2")

    assert second.record.run_id != first.record.run_id


def test_the_same_recipe_twice_at_once_is_two_runs(tmp_path):
    first = open_record(tmp_path, recipe(), "flow-1")

    second = open_record(tmp_path, recipe(), "flow-2")

    assert second.record.run_id != first.record.run_id
    assert {r.state for r in records(tmp_path)} == {"running"}


def test_how_a_run_ended_is_written_once(tmp_path):
    opened = open_record(tmp_path, recipe(), "flow-1")

    opened.close("cancelled")
    opened.close("failed", "an afterthought")

    record = load_record(tmp_path)
    assert (record.state, record.error) == ("cancelled", None)
    assert record.attempts[-1].ended is not None


def test_a_process_that_let_go_of_its_run_writes_nothing_over_its_successors_word(tmp_path):
    first = open_record(tmp_path, recipe(), "flow-1")
    first.close("cancelled")
    second = open_record(tmp_path, recipe(), "flow-2")

    first.add("registered", registered(tmp_path), cached=False)
    first.track("mlflow-1")

    record = load_record(tmp_path)
    assert record == second.record
    assert record.state == "running"


def fail_to_write(record: OpenRecord, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next word into a record meet a store that is full, say."""
    disk = FaultyDisk((record.folder,)).install(monkeypatch)
    disk.fail_at(numberless(f"open {record.folder.name}/.record.json.new w"), code)


def test_a_record_that_cannot_be_written_is_told_and_let_go_of(tmp_path, monkeypatch):
    first = open_record(tmp_path, recipe(), "flow-1")

    fail_to_write(first, errno.EROFS, monkeypatch)
    with pytest.raises(StoreError, match=r"record\.json: the file system is read-only"):
        first.add("registered", registered(tmp_path), cached=False)
    fail_to_write(first, errno.ENOSPC, monkeypatch)
    with pytest.raises(StoreError, match=r"record\.json: the disk is full"):
        first.close("failed")

    assert load_record(tmp_path).state == "interrupted"
    assert open_record(tmp_path, recipe(), "flow-2").record.run_id == first.record.run_id


def _hold(store: Path, ready) -> None:
    held = open_record(store, recipe(), "flow-1")
    ready.set()
    signal.pause()
    held.close("completed")


def test_a_record_of_a_process_killed_for_good_reads_as_interrupted_and_is_buried_once(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    process = spawn.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    alive = load_record(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.join()

    dead = load_record(tmp_path)

    assert (alive.state, dead.state) == ("running", "interrupted")
    assert bury_interrupted(tmp_path) == ["flow-1"]
    assert bury_interrupted(tmp_path) == []
    assert load_record(tmp_path).state == "interrupted"


def test_a_run_is_found_by_how_its_id_begins_and_the_newest_without_one(tmp_path):
    old = open_record(tmp_path, recipe("alpha"), "1").close("completed")
    new = open_record(tmp_path, recipe("beta"), "2").close("completed")

    assert load_record(tmp_path).run_id == new.run_id
    assert load_record(tmp_path, "alp").run_id == old.run_id
    assert load_record(tmp_path, new.run_id).run_id == new.run_id


def test_an_unknown_run_is_told_with_the_known_ones(tmp_path):
    known = open_record(tmp_path, recipe("alpha"), "1").close("completed")

    with pytest.raises(UserError, match=known.run_id):
        load_record(tmp_path, "gamma")


def test_a_beginning_that_fits_several_runs_is_refused(tmp_path):
    open_record(tmp_path, recipe("alpha-1"), "1").close("completed")
    open_record(tmp_path, recipe("alpha-2"), "2").close("completed")

    with pytest.raises(UserError, match="2 runs begin with 'alpha'"):
        load_record(tmp_path, "alpha")


def test_a_beginning_that_fits_very_many_runs_names_the_newest_and_counts_the_others(tmp_path):
    for number in range(10):
        open_record(tmp_path, recipe(f"alpha-{number}"), "1").close("completed")

    with pytest.raises(UserError, match="10 runs begin") as caught:
        load_record(tmp_path, "alpha")

    assert "alpha-9" in caught.value.fix
    assert "2 more (qlora show --all)" in caught.value.fix


def test_without_a_name_the_newest_run_that_has_a_model_to_talk_to_is_taken(tmp_path):
    tuned = open_record(tmp_path, recipe("tuned"), "1")
    for role in ("base", "adapter"):
        tuned.add(role, registered(tmp_path), cached=False)
    tuned.close("completed")
    open_record(tmp_path, recipe("failed"), "2").close("failed", "no rows")

    assert load_record(tmp_path).run_id.startswith("failed")
    assert load_record(tmp_path, None, lambda r: can_talk(r, None)).run_id.startswith("tuned")
    with pytest.raises(UserError, match="none of the 2 runs"):
        load_record(tmp_path, None, lambda r: can_talk(r, "merged"))


def test_without_any_run_the_way_to_start_one_is_told(tmp_path):
    with pytest.raises(UserError, match="qlora run FILE"):
        load_record(tmp_path)


def test_a_store_that_is_a_file_is_refused_with_its_path(tmp_path):
    store = tmp_path / "afile"
    store.touch()

    for use in (bury_interrupted, lambda folder: open_record(folder, recipe(), "1")):
        with pytest.raises(StoreError, match=r"cannot write .*afile/runs: a file is in the way"):
            use(store)


def test_a_file_that_is_no_record_is_passed_over(tmp_path):
    good = open_record(tmp_path, recipe(), "1").close("completed")
    (tmp_path / "runs" / "torn").mkdir()
    (tmp_path / "runs" / "torn" / "record.json").write_text('{"run_id": "to')

    assert [r.run_id for r in records(tmp_path)] == [good.run_id]


def test_a_record_is_plain_json_with_a_schema_version(tmp_path):
    record = open_record(tmp_path, recipe(), "1").close("completed")

    data = json.loads((tmp_path / "runs" / record.run_id / "record.json").read_text())

    assert data["schema_version"] == 1
    assert data["config"]["adapter"]["rank"] == 16
