"""A Ray of somebody else's on this machine: nodes that come and go.

A node is a session of processes with a `ray start` of its own, so that all of it can be killed at
once, as when somebody pulls a plug. Its raylet killed alone, its workers notice and end.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from qlora_core.backends import process_session
from qlora_core.backends.ray_address import require_ray

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
_OBJECT_STORE_BYTES = 80_000_000
_START_S = 90.0


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass
class Node:
    """One `ray start` and all it has started."""

    process: subprocess.Popen[bytes]

    def members(self, word: str = "") -> list[psutil.Process]:
        """Return its processes with ``word`` in their command."""
        found = []
        for pid in process_session.members(self.process.pid):
            with suppress(psutil.Error):  # it ended meanwhile
                process = psutil.Process(pid)
                if word in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def raylet(self) -> psutil.Process:
        """Return what answers for the node."""
        (raylet,) = self.members("raylet/raylet")
        return raylet

    def kill_raylet(self) -> None:
        """Kill what answers for the node, and nothing else."""
        self.raylet().kill()

    def kill(self) -> None:
        """Take it away, workers and all, without a word."""
        for process in self.members():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """End all of it, asked first."""
        process_session.end(self.process.pid, patience_s=5.0)
        self.process.wait()


@dataclass
class RayCluster:
    """A Ray of several nodes.

    Args:
        temp: A folder with a short path, as sockets need one.
        host: Address of the head.
    """

    temp: Path
    host: str = "127.0.0.1"
    port: int = field(default_factory=free_port)
    nodes: list[Node] = field(default_factory=list)

    @property
    def address(self) -> str:
        """What a recipe names."""
        return f"{self.host}:{self.port}"

    def start_head(self, *more: str, before: tuple[str, ...] = (), num_cpus: int = 1) -> Node:
        """Start the node that holds the cluster together; ``before`` stands before its command."""
        options = ["--head", f"--port={self.port}", "--include-dashboard=false"]
        options += [f"--temp-dir={self.temp / 'r'}", *more]
        head = self._start(options, before, num_cpus)
        require_ray(self.address, patience_s=_START_S)
        return head

    def add_node(self, *more: str, before: tuple[str, ...] = (), num_cpus: int = 1) -> Node:
        """Start one more node; it may take seconds until others know of it."""
        return self._start([f"--address={self.address}", *more], before, num_cpus)

    def _start(self, options: list[str], before: tuple[str, ...], num_cpus: int) -> Node:
        options = [*options, f"--num-cpus={num_cpus}", "--block"]
        options += [f"--object-store-memory={_OBJECT_STORE_BYTES}"]
        options += [f"--dashboard-agent-listen-port={free_port()}"]
        ray = str(Path(sys.executable).with_name("ray"))
        with (self.temp / f"node-{len(self.nodes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [*before, ray, "start", *options], start_new_session=True, stdout=log, stderr=log
            )
        node = Node(process)
        self.nodes.append(node)
        return node

    def wait_for(self, num_nodes: int) -> list[str]:
        """Wait until so many nodes are alive; return their ids, the head's first."""
        deadline = time.monotonic() + _START_S
        while len(found := alive_nodes(self.address)) != num_nodes:
            assert time.monotonic() < deadline, f"{len(found)} nodes instead of {num_nodes}"
            time.sleep(0.5)
        return found

    def end(self) -> None:
        """End all nodes, at once."""
        for node in reversed(self.nodes):
            node.kill()
        self.nodes.clear()


def alive_nodes(address: str) -> list[str]:
    """Return the ids of a cluster's nodes, the head's first; asked in a process of its own."""
    script = (
        "import sys; import ray\n"
        "ray.init(address=sys.argv[1], logging_level='ERROR', log_to_driver=False)\n"
        "alive = [n for n in ray.nodes() if n['Alive']]\n"
        "alive.sort(key=lambda n: 'node:__internal_head__' not in n['Resources'])\n"
        "print(' '.join(n['NodeID'] for n in alive))\n"
    )
    asked = subprocess.run(
        [sys.executable, "-c", script, address], capture_output=True, text=True, check=False
    )
    return asked.stdout.split()


@contextmanager
def place_taken(address: str) -> Iterator[None]:
    """Have a core of a cluster used by somebody else."""
    script = (
        "import sys; import ray\n"
        "ray.init(address=sys.argv[1], logging_level='ERROR', log_to_driver=False)\n"
        "taken = ray.util.placement_group([{'CPU': 1}])\n"
        "ray.get(taken.ready())\n"
        "print('taken', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as somebody:
        assert somebody.stdout is not None
        assert somebody.stdout.readline() == b"taken\n"
        yield  # it ends when its stdin closes


@contextmanager
def ray_cluster(host: str = "127.0.0.1") -> Iterator[RayCluster]:
    """Make an empty cluster that leaves nothing; to be filled with a head and nodes."""
    temp = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))
    before = {name: os.environ.get(name) for name in TOKEN}
    os.environ.update(TOKEN)
    cluster = RayCluster(temp, host)
    try:
        yield cluster
    finally:
        cluster.end()
        shutil.rmtree(temp, ignore_errors=True)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def may_unshare() -> bool:
    """Say whether this user may have mounts of its own."""
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True)
    return tried.returncode == 0


def hides(folder: Path) -> tuple[str, ...]:
    """Return what stands before the command of a node that sees an empty disk at ``folder``."""
    mounted = f'mount -t tmpfs none "{folder}" && exec "$@"'
    return ("unshare", "--mount", "sh", "-c", mounted, "sh")
