"""Writes that outlast a crash: on the disk, and not only with the kernel, when they return.

What is renamed over a file is written under a name that nobody else has: workers meet the same
error at once, and all of them leave it. Whoever is killed in between leaves a file with that name,
which the next to write the same file removes when it is an hour old.
"""

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_core.errors import storing

_HIDDEN = re.compile(r"\..+-\d+-\d+\.tmp")
"""As from `hidden_name`."""
_LEFT_S = 3600.0
"""A write takes seconds, and clocks of nodes differ by less: nobody is still at it."""


def write_durably(path: Path, content: bytes) -> None:
    """Write a file that is on disk when this returns.

    Raises:
        StoreError: There is no room, say.
    """
    with storing(path):
        _write(path, content, "wb")


def replace_durably(path: Path, content: bytes) -> None:
    """Write a file by way of a hidden one and a rename: readers see the old or the new, whole.

    Raises:
        StoreError: There is no room, say; what was there is untouched.
    """
    fresh = hidden_name(path)
    with storing(path):
        _remove_left(path.parent)
        with _removed_on_failure(fresh):
            _write(fresh, content, "wb")
            fresh.replace(path)
        sync(path.parent)


def hidden_name(path: Path) -> Path:
    """Return where this thread, and no other anywhere, writes what will be ``path``."""
    who = f"{socket.gethostname()}-{os.getpid()}-{threading.get_native_id()}"
    return path.with_name(f".{path.name}.{who}.tmp")


@contextmanager
def _removed_on_failure(fresh: Path) -> Iterator[None]:
    try:
        yield
    except OSError:
        with suppress(OSError):
            fresh.unlink()
        raise


def _remove_left(folder: Path) -> None:
    """Remove what writers have left that were killed."""
    now_s = time.time()
    for path in [path for path in folder.iterdir() if _HIDDEN.fullmatch(path.name)]:
        with suppress(FileNotFoundError):  # done with, or another was faster
            if now_s - path.lstat().st_mtime > _LEFT_S:
                path.unlink()


def reserve(path: Path, size_bytes: int = 8192) -> None:
    """Take room now for what `replace_reserved` may have to write when there is none left.

    Raises:
        StoreError: There is no room, say.
    """
    write_durably(_reserved(path), b" " * size_bytes)


def replace_reserved(path: Path, content: bytes) -> None:
    """Write a file into the room that `reserve` took; what is left of it stays blank.

    The room is one writer's: the others find none.

    Raises:
        StoreError: It was too little, or there is none.
    """
    mine = hidden_name(path)
    with storing(path):
        _reserved(path).replace(mine)
        with _removed_on_failure(mine):
            _write(mine, content, "r+b")
            mine.replace(path)


def _write(path: Path, content: bytes, mode: str) -> None:
    with path.open(mode) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _reserved(path: Path) -> Path:
    return path.with_name(f".{path.name}.reserved")


def sync(path: Path) -> None:
    """Make the kernel write a file, or a folder's list of names, to disk.

    Raises:
        StoreError: It cannot.
    """
    with storing(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
