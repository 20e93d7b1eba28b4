import errno
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qlora_core.errors import StoreError
from qlora_core.training import durable


def test_room_that_was_taken_before_holds_a_text_when_there_is_none_left(tmp_path, monkeypatch):
    durable.reserve(tmp_path / "error.json", 64)
    before = (tmp_path / ".error.json.reserved").stat()

    def full_disk(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable, "write_durably", full_disk)
    durable.replace_reserved(tmp_path / "error.json", b'{"what": "full"}')

    now = (tmp_path / "error.json").stat()
    assert (tmp_path / "error.json").read_text().strip() == '{"what": "full"}'
    assert (now.st_ino, now.st_size) == (before.st_ino, before.st_size)  # nothing was allocated
    assert not (tmp_path / ".error.json.reserved").exists()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_writers_of_the_same_file_never_meet_in_a_temporary_one(tmp_path, monkeypatch):
    """Each is stopped where another could have cut its file: written, but not yet renamed."""
    path, texts = tmp_path / "error.json", [json.dumps({"what": "x" * n}) for n in (10, 4000, 1)]
    written, real = threading.Barrier(len(texts)), Path.replace

    def replace(self, target):
        written.wait(timeout=30)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(lambda text: durable.replace_durably(path, text.encode()), texts))

    assert path.read_text() in texts
    assert names(tmp_path) == {"error.json"}


def test_room_that_was_taken_is_one_writers(tmp_path):
    durable.reserve(tmp_path / "error.json", 64)

    durable.replace_reserved(tmp_path / "error.json", b'{"what": "the first"}')
    with pytest.raises(StoreError):
        durable.replace_reserved(tmp_path / "error.json", b'{"what": "2"}')

    assert json.loads((tmp_path / "error.json").read_text()) == {"what": "the first"}


def test_what_a_killed_writer_has_left_goes_when_nobody_can_be_at_it_any_more(tmp_path):
    left, at_work = tmp_path / ".error-0001.json.node-7-8.tmp", tmp_path / ".a.json.other-7-8.tmp"
    for file in (left, at_work, tmp_path / ".hidden.tmp"):
        file.write_bytes(b"half")
    os.utime(left, (0, time.time() - 2 * 3600))
    os.utime(tmp_path / ".hidden.tmp", (0, 0))  # somebody else's

    durable.replace_durably(tmp_path / "error-0002.json", b"{}")

    assert names(tmp_path) == {at_work.name, ".hidden.tmp", "error-0002.json"}


def test_a_write_that_fails_leaves_no_temporary_file(tmp_path, monkeypatch):
    def full_disk(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StoreError):
        durable.replace_durably(tmp_path / "summary.json", b"new")

    assert names(tmp_path) == set()


def test_what_was_not_reserved_is_a_store_error(tmp_path):
    with pytest.raises(StoreError):
        durable.replace_reserved(tmp_path / "error.json", b"text")


def test_what_cannot_be_synced_is_a_store_error(tmp_path, monkeypatch):
    (tmp_path / "adapter").write_bytes(b"1")

    def fails(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(StoreError, match=f"cannot write {tmp_path / 'adapter'}"):
        durable.sync(tmp_path / "adapter")
