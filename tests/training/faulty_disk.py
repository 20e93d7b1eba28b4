"""A disk that can be told to fail: once, at one operation on the files below some folders.

It stands in Python's own doors to the file system, so it sees whatever Python code does there. A
write into an open file is seen when the file is synced.
"""

import builtins
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_READING = ("stat", "listdir", "scandir")
_CHANGING = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")


@dataclass
class FaultyDisk:
    """Keeps what was done below ``folders``, and fails what it is told to."""

    folders: tuple[Path, ...]
    done: list[str] = field(default_factory=list)
    """Operation and path, each number in it replaced by `#`, in order."""
    _fault: tuple[str, int] | None = None
    _num_left: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "FaultyDisk":
        doors = [(os, name) for name in ("open", *_READING, *_CHANGING)]
        for module, name in [(builtins, "open"), (io, "open"), *doors]:
            monkeypatch.setattr(module, name, self._watched(name, getattr(module, name)))
        return self

    def fail_at(self, operation: str, code: int, num_times: int = 1) -> None:
        """Fail ``operation`` when it is next asked for, and as often in all."""
        self._fault, self._num_left = (operation, code), num_times

    def mend(self) -> None:
        self._fault = None

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **keywords: Any) -> Any:
            if operation := self._operation(name, *args):
                self.done.append(operation)
                if self._fault and self._fault[0] == operation:
                    code = self._fault[1]
                    self._num_left -= 1
                    if not self._num_left:
                        self.mend()
                    raise OSError(code, os.strerror(code), str(args[0]))
            return real(*args, **keywords)

        return watched

    def _operation(self, name: str, given: Any = ".", mode: Any = None, *_: Any) -> str | None:
        path = _path_of(given)
        for folder in self.folders:
            if path is not None and path.is_relative_to(folder):
                place = numberless(str(path.relative_to(folder.parent)))
                return f"{name} {place} {mode}" if isinstance(mode, str) else f"{name} {place}"
        return None


def numberless(text: str) -> str:
    """Return ``text`` as `FaultyDisk.done` has it."""
    return re.sub(r"\d+", "#", text)


def reads(operation: str) -> bool:
    """Say whether an operation of `FaultyDisk.done` changes nothing on the disk."""
    return operation.startswith(_READING) or operation.endswith((" r", " rb"))


def _path_of(given: Any) -> Path | None:
    if isinstance(given, int):
        try:
            return Path(f"/proc/self/fd/{given}").readlink()
        except OSError:
            return None
    return Path(os.fspath(given)) if isinstance(given, str | os.PathLike) else None
