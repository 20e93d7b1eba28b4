"""Writes that outlast a crash: on the disk, and not only with the kernel, when they return."""

import os
from pathlib import Path

from qlora_core.errors import storing


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
    fresh = path.with_name(f".{path.name}.tmp")
    with storing(path):
        _write(fresh, content, "wb")
        fresh.replace(path)
        sync(path.parent)


def reserve(path: Path, size_bytes: int = 8192) -> None:
    """Take room now for what `replace_reserved` may have to write when there is none left.

    Raises:
        StoreError: There is no room, say.
    """
    write_durably(_reserved(path), b" " * size_bytes)


def replace_reserved(path: Path, content: bytes) -> None:
    """Write a file into the room that `reserve` took; what is left of it stays blank.

    Raises:
        StoreError: It was too little, or there is none.
    """
    with storing(path):
        _write(_reserved(path), content, "r+b")
        _reserved(path).replace(path)


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
