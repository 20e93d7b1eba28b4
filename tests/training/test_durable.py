import errno
import os

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
