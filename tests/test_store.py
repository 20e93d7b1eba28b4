"""The store with a stage that counts its runs: found, built once, sealed, noticed when damaged."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from qlora_core.artifacts import Facts
from qlora_core.config import MergeConfig, SnapshotConfig
from qlora_core.errors import ArtifactError, StoreError, TrainingError
from qlora_core.ports import Context, Services, stage
from qlora_core.sources import find_source
from qlora_core.store import MANIFEST, Store, read_artifact
from tests.training.faulty_disk import FaultyDisk


class Spelled(Facts):
    """What the test stage counts."""

    num_letters: int


class Heard:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def update(self, stage: str, done: float, total: float, note: str = "") -> None:
        pass

    def say(self, stage: str, message: str) -> None:
        self.messages.append(message)


RUNS: list[str] = []


@stage("spell", version=1, facts=Spelled)
def spell(ctx: Context, word: str, merge: MergeConfig | None = None) -> Spelled:
    RUNS.append(word)
    (ctx.out / "letters").mkdir()
    (ctx.out / "letters" / "word.txt").write_text(word)
    return Spelled(num_letters=len(word))


@stage("fail", version=1, facts=Spelled)
def fail(ctx: Context, word: str) -> Spelled:
    (ctx.out / "half.txt").write_text("half")
    (ctx.scratch / "kept.txt").write_text("kept")
    raise TrainingError("it broke")


@pytest.fixture
def heard():
    return Heard()


@pytest.fixture
def services(heard):
    return Services(tracker=None, registry=None, launcher=None, progress=heard)


@pytest.fixture
def store(tmp_path):
    RUNS.clear()
    return Store(tmp_path / "store", {"prefect_run": "abc"})


def test_a_stage_runs_once_and_is_found_ever_after(store, services):
    first = store.produce(spell, services, "hello")
    again = store.produce(spell, services, word="hello")

    assert (first.cached, again.cached) == (False, True)
    assert RUNS == ["hello"]
    assert again.artifact == first.artifact
    assert again.artifact.facts.num_letters == 5
    assert (again.artifact.path / "letters" / "word.txt").read_text() == "hello"


def test_other_inputs_have_another_key_and_runtime_inputs_have_not(store):
    keys = [
        store.key(spell, "a"),
        store.key(spell, "b"),
        store.key(spell, "a", MergeConfig()),
        store.key(spell, "a", MergeConfig(onto="original")),
    ]

    assert len(set(keys)) == 4
    assert SnapshotConfig(every_steps=3).hashed()["every_steps"] == 3


def test_an_edited_source_file_is_another_input_and_a_moved_one_is_not(store, tmp_path):
    @stage("read", version=1, facts=Spelled)
    def read(ctx, source):
        return Spelled(num_letters=1)

    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("one")
    a, moved = (store.key(read, find_source(str(tmp_path / n))) for n in ("a.txt", "b.txt"))
    (tmp_path / "a.txt").write_text("two")
    edited = store.key(read, find_source(str(tmp_path / "a.txt")))

    assert a == moved
    assert edited != a


def test_the_digest_speaks_of_the_files_alone(tmp_path, services):
    digests = {
        Store(tmp_path / name).produce(spell, services, "same").artifact.digest
        for name in ("one", "two")
    }

    assert len(digests) == 1


def test_a_manifest_explains_the_result_and_provenance_lies_beside_it(store, services):
    folder = store.produce(spell, services, "hello").artifact.path

    manifest = json.loads((folder / MANIFEST).read_text())
    provenance = json.loads((folder / "provenance.json").read_text())

    assert manifest["inputs"]["word"] == "hello"
    assert manifest["files"][0]["name"] == "letters/word.txt"
    assert provenance["prefect_run"] == "abc"
    assert provenance["packages"]["torch"]


def test_what_fails_leaves_no_artefact_but_its_scratch(store, services):
    with pytest.raises(TrainingError):
        store.produce(fail, services, "x")

    key = store.key(fail, "x")
    assert store.find(fail, key) is None
    assert not list(store.root.glob("fail/.*.staging"))
    assert (store.scratch(fail, key) / "kept.txt").read_text() == "kept"


def _write(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


DAMAGES = {
    "one byte flipped": lambda folder: _write(folder / "letters/word.txt", b"hellO"),
    "truncated": lambda folder: _write(folder / "letters/word.txt", b"hel"),
    "emptied": lambda folder: _write(folder / "letters/word.txt", b""),
    "deleted": lambda folder: (folder / "letters/word.txt").unlink(),
    "manifest torn": lambda folder: _write(folder / MANIFEST, b'{"schema_version": 1, "st'),
    "manifest emptied": lambda folder: _write(folder / MANIFEST, b""),
    "manifest no text": lambda folder: _write(folder / MANIFEST, b'{"schema_version": "\xff"}'),
    "all but the manifest deleted": lambda folder: shutil.rmtree(folder / "letters"),
    "a file for a folder": lambda folder: (
        shutil.rmtree(folder / "letters"),
        (folder / "letters").touch(),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_noticed_said_set_aside_and_built_anew(store, services, heard, damage):
    folder = store.produce(spell, services, "hello").artifact.path
    damage(folder)

    again = store.produce(spell, services, "hello")

    assert not again.cached
    assert (again.artifact.path / "letters/word.txt").read_text() == "hello"
    assert len(list((store.root / "damaged").iterdir())) == 1
    assert any("Set aside" in message for message in heard.messages)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES])
def test_what_cannot_be_read_just_now_is_told_and_not_built_again(
    store, services, monkeypatch, code
):
    folder = store.produce(spell, services, "hello").artifact.path
    os.utime(folder / "letters/word.txt", (1, 1))  # so that its bytes are read
    disk = FaultyDisk((folder,)).install(monkeypatch)
    store.find(spell, folder.name)
    operations = list(dict.fromkeys(disk.done))
    assert {operation.split()[0] for operation in operations} == {"open", "stat"}

    for operation in operations:
        disk.fail_at(operation, code)
        with pytest.raises(StoreError, match="cannot read") as caught:
            store.produce(spell, services, "hello")
        assert f"move {folder} away" in caught.value.fix

    assert store.produce(spell, services, "hello").cached
    assert not (store.root / "damaged").exists()


def test_who_only_looks_a_damaged_artefact_up_leaves_it_where_it_is(store, services):
    folder = store.produce(spell, services, "hello").artifact.path
    DAMAGES["truncated"](folder)

    assert store.find(spell, folder.name) is None
    assert (folder / MANIFEST).exists()


def test_a_damaged_artefact_is_not_set_aside_while_another_run_has_its_lock(store, services):
    folder = store.produce(spell, services, "hello").artifact.path
    DAMAGES["truncated"](folder)

    def check(stage: str) -> None:
        raise StoppedError

    with folder.with_name(f".{folder.name}.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoppedError):
            store.produce(spell, replace(services, check=check), "hello")

    assert (folder / MANIFEST).exists()


def test_a_file_that_was_only_touched_is_still_whole(store, services):
    folder = store.produce(spell, services, "hello").artifact.path
    os.utime(folder / "letters/word.txt", (1, 1))

    assert store.produce(spell, services, "hello").cached


def test_a_folder_of_another_stage_is_not_taken_for_this_one(store, services):
    folder = store.produce(spell, services, "hello").artifact.path

    with pytest.raises(ArtifactError, match="not a fail"):
        read_artifact(fail, folder)


def test_a_store_in_a_place_that_is_no_folder_is_told_with_a_way_out(tmp_path, services):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "store")

    with pytest.raises((StoreError, NotADirectoryError)):
        store.require_writable()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_told_and_earlier_artefacts_are_intact(store, services):
    earlier = store.produce(spell, services, "hello").artifact

    @stage("fill", version=1, facts=Spelled)
    def fill(ctx):
        Path("/dev/full").write_bytes(b"x" * 100_000)  # the kernel answers ENOSPC
        return Spelled(num_letters=0)

    with pytest.raises(StoreError, match="disk is full"):
        store.produce(fill, services)
    assert store.find(spell, earlier.key) == earlier


# Not forked: a copy of a process in which Prefect ran fails on its way out, in Prefect's own exit.
SPAWN = multiprocessing.get_context("spawn")


def _produce_slowly(root: str, log: str, all_up: Any) -> None:
    @stage("slow", version=1, facts=Spelled)
    def slow(ctx):
        with Path(log).open("a") as file:
            file.write("ran\n")
        time.sleep(0.5)
        return Spelled(num_letters=1)

    services = Services(tracker=None, registry=None, launcher=None, progress=Heard())
    all_up.wait(60)
    Store(Path(root)).produce(slow, services)


def test_of_several_processes_that_ask_at_once_one_builds_and_all_get_it(tmp_path):
    log = tmp_path / "log"
    arguments = (str(tmp_path / "s"), str(log), SPAWN.Barrier(5))
    processes = [SPAWN.Process(target=_produce_slowly, args=arguments) for _ in range(5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)

    assert [process.exitcode for process in processes] == [0] * 5
    assert log.read_text() == "ran\n"


def _hang(root: str) -> None:
    @stage("spell", version=1, facts=Spelled)
    def hang(ctx, word, merge=None):
        (ctx.out / "torn.txt").write_text("torn")
        (ctx.scratch / "kept.txt").write_text("kept")
        time.sleep(60)
        return Spelled(num_letters=1)

    services = Services(tracker=None, registry=None, launcher=None, progress=Heard())
    Store(Path(root)).produce(hang, services, "hello")


def start_hanging(store: Store) -> tuple[BaseProcess, Path]:
    """Return a process in the middle of the stage, and the scratch folder it has written to."""
    process = SPAWN.Process(target=_hang, args=(str(store.root),))
    process.start()
    scratch = store.scratch(spell, store.key(spell, "hello"))
    while not (scratch / "kept.txt").exists():
        assert process.is_alive()
        time.sleep(0.02)
    return process, scratch


def test_a_killed_builder_leaves_no_lock_and_no_rubbish_in_the_artefact(store, services):
    process, scratch = start_hanging(store)
    process.kill()
    process.join()

    produced = store.produce(spell, services, "hello")

    assert not produced.cached
    assert not (produced.artifact.path / "torn.txt").exists()
    assert not scratch.exists()


@contextmanager
def built_elsewhere(store: Store, word: str) -> Iterator[None]:
    """Hold what a run holds while it builds; the kernel tells open files apart, not processes."""
    lock = store.root / "spell" / f".{store.key(spell, word)}.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


class StoppedError(Exception):
    """What a run that is told to stop raises."""


def test_whoever_waits_for_another_run_is_told_once_and_can_be_stopped(store, heard):
    stopping, asked, ended = threading.Event(), [], []

    def check(stage: str) -> None:
        asked.append(stage)
        if stopping.is_set():
            raise StoppedError

    services = Services(None, None, None, progress=heard, check=check)

    def wait() -> None:
        try:
            store.produce(spell, services, "hello")
        except StoppedError:
            ended.append(time.monotonic())

    waiting = threading.Thread(target=wait, daemon=True)
    with built_elsewhere(store, "hello"):
        waiting.start()
        waiting.join(1.5)
        assert waiting.is_alive()
        stopped_at = time.monotonic()
        stopping.set()
        waiting.join(10)

        assert ended
        assert ended[0] - stopped_at < 2.0
    assert heard.messages == ["another run is building this; waiting for it"]
    assert set(asked) == {"spell"}
    assert 3 <= len(asked) <= 8, "not a busy loop"
    stopping.clear()
    assert not store.produce(spell, services, "hello").cached, "nothing is left locked"


def test_whoever_waits_goes_on_soon_after_the_other_run_is_killed(store, services, heard):
    process, _ = start_hanging(store)
    killing = threading.Timer(0.7, process.kill)
    killing.start()

    produced = store.produce(spell, services, "hello")

    assert heard.messages == ["another run is building this; waiting for it"]
    assert not process.is_alive()
    assert not produced.cached
    assert RUNS == ["hello"]


def test_sweep_deletes_what_nobody_builds_and_spares_what_somebody_does(store):
    process, scratch = start_hanging(store)

    spared = store.sweep()
    process.kill()
    process.join()
    swept = store.sweep()

    assert spared == []
    assert len(swept) == 1
    assert (scratch / "kept.txt").exists()
