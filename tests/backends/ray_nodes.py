"""A Ray of somebody else's: nodes that come and go, all on this machine."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_core.backends import process_session
from qlora_core.backends.ray_address import require_ray

_RAY = Path(sys.executable).with_name("ray")
_SIZE = ["--num-cpus=1", "--object-store-memory=80000000", "--block"]


@contextmanager
def ray_head(port: int) -> Iterator[str]:
    """Start a head with one CPU, which leaves with all its processes; yield its address."""
    temp = tempfile.mkdtemp(prefix="rh-", dir="/tmp")
    options = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={temp}"]
    head = _started(options, Path(temp) / "head.log")
    try:
        require_ray(f"127.0.0.1:{port}", patience_s=60)
        yield f"127.0.0.1:{port}"
    finally:
        process_session.end(head.pid, patience_s=5.0)
        head.wait()
        shutil.rmtree(temp, ignore_errors=True)


class Node:
    """One more node with one CPU.

    Args:
        address: Of the head.
        log: Where it says what it does.
    """

    def __init__(self, address: str, log: Path) -> None:
        self._process = _started([f"--address={address}"], log)

    def kill(self) -> None:
        """Take it away, workers and all, without a word."""
        for pid in process_session.members(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


def _started(options: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as said:
        return subprocess.Popen(
            [_RAY, "start", *options, *_SIZE], start_new_session=True, stdout=said, stderr=said
        )
