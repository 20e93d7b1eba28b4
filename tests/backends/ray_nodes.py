"""A Ray of somebody else's: a head and nodes on this machine, each a process that can be killed."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_core.backends import process_session
from qlora_core.backends.ray_address import require_ray

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
_SHARED = ["--object-store-memory=80000000", "--block"]


class RayNodes:
    """A running cluster; ``address`` is what a recipe names."""

    def __init__(self, temp: Path) -> None:
        self._temp, self._processes = temp, list[subprocess.Popen]()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"

    def start_head(self, *, num_cpus: int) -> None:
        port = self.address.rpartition(":")[2]
        self._start("--head", f"--port={port}", f"--num-cpus={num_cpus}",
                    "--include-dashboard=false", f"--temp-dir={self._temp / 'r'}")  # fmt: skip
        require_ray(self.address, patience_s=60)

    def add(self, *, num_cpus: int, hides: Path | None = None) -> int:
        """Start one more node; it sees an empty disk where others see the folder ``hides``."""
        private = []
        if hides is not None:
            mounted = f'mount -t tmpfs none "{hides}" && exec "$@"'
            private = ["unshare", "--mount", "sh", "-c", mounted, "sh"]
        address, known = f"--address={self.address}", self.count()
        process = self._start(address, f"--num-cpus={num_cpus}", within=private)
        self._wait_for(known + 1)
        return process.pid

    def count(self) -> int:
        """How many nodes the head knows of, alive."""
        script = (
            "import ray, sys\n"
            "ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR')\n"
            "print(sum(node['Alive'] for node in ray.nodes()))\n"
        )
        asked = subprocess.run(
            [sys.executable, "-c", script, self.address],
            env=os.environ | TOKEN, capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        return int(asked.stdout.split()[-1])

    def end(self) -> None:
        for process in reversed(self._processes):
            process_session.end(process.pid, patience_s=5.0)
            process.wait()

    def _start(self, *options: str, within: list[str] = []) -> subprocess.Popen:  # noqa: B006
        ray = str(Path(sys.executable).with_name("ray"))
        with (self._temp / f"{len(self._processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [*within, ray, "start", *options, *_SHARED],
                start_new_session=True, stdout=log, stderr=log, env=os.environ | TOKEN,
            )  # fmt: skip
        self._processes.append(process)
        return process

    def _wait_for(self, num_nodes: int) -> None:
        deadline = time.monotonic() + 60
        while self.count() < num_nodes:
            assert time.monotonic() < deadline, "the node did not come up"
            time.sleep(0.5)


@contextmanager
def ray_nodes(*, head_cpus: int) -> Iterator[RayNodes]:
    temp = Path(tempfile.mkdtemp(prefix="rn-", dir="/tmp"))  # a socket's path must be short
    nodes = RayNodes(temp)
    try:
        nodes.start_head(num_cpus=head_cpus)
        yield nodes
    finally:
        nodes.end()
        shutil.rmtree(temp, ignore_errors=True)


def may_unshare() -> bool:
    """Whether this user may have mounts of its own."""
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True)
    return tried.returncode == 0
