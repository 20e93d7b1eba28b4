"""Clusters of several raylets on this machine, each with a `ray start` of its own, and their loss.

All nodes are ours to break: a node is a session of processes, so that all of it can be killed at
once, as when somebody pulls a plug. Its raylet killed alone, its workers notice and end.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import psutil

from qlora_core.backends import process_session
from qlora_core.backends.ray_address import require_ray
from qlora_core.config import SnapshotConfig
from qlora_core.errors import LaunchError
from qlora_core.ports import TrainJob
from qlora_core.training.incidents import history
from qlora_core.training.snapshot import FOLDER, snapshots_in
from tests.chaos.place import NUM_STEPS, Place, train_on_ray
from tests.chaos.processes import kill_all, verdict
from tests.chaos.trial import Trial, Watch, random_step, summary

_OBJECT_STORE_BYTES = 80_000_000
_START_S = 90.0
_AWAY_S = 5.0
"""How long a node is away that comes back."""
_NOTICE_S = 30
"""Before a node is taken: what clouds give."""
LONG = 2000
"""Steps of a training that must go on while Ray gets word of something: every 5 s."""
ONLY_WHEN_URGENT = SnapshotConfig(every_s=1e9)


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
        found = (psutil.Process(pid) for pid in process_session.members(self.process.pid))
        return [process for process in found if word in " ".join(process.cmdline())]

    def kill_raylet(self) -> None:
        """SIGKILL what answers for the node."""
        kill_all(self.members("raylet/raylet"))

    def end(self, patience_s: float = 5.0) -> None:
        """End all of it."""
        process_session.end(self.process.pid, patience_s=patience_s)
        self.process.wait()


@dataclass
class RayCluster:
    """A Ray of several nodes.

    Args:
        temp: A folder with a short path.
        host: Address of the head.
    """

    temp: Path
    host: str = "127.0.0.1"
    port: int = field(default_factory=free_port)
    nodes: list[Node] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Where the head listens."""
        return f"{self.host}:{self.port}"

    def start_head(self, *more: str, before: tuple[str, ...] = ()) -> Node:
        """Start the node that holds the cluster together, with one core unless told."""
        options = ["--head", f"--port={self.port}", "--include-dashboard=false"]
        options += [f"--temp-dir={self.temp}"]
        head = self._start([*options, *more], before)
        require_ray(self.address, patience_s=_START_S)
        return head

    def add_node(self, *more: str, before: tuple[str, ...] = ()) -> Node:
        """Start one more node, with one core unless told."""
        return self._start([f"--address={self.address}", *more], before)

    def _start(self, options: list[str], before: tuple[str, ...]) -> Node:
        cores = [] if any("--num-cpus" in option for option in options) else ["--num-cpus=1"]
        options = [*options, *cores, "--block", f"--object-store-memory={_OBJECT_STORE_BYTES}"]
        options += [f"--dashboard-agent-listen-port={free_port()}"]
        ray = Path(sys.executable).with_name("ray")
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
            node.end(patience_s=0.0)
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
def ray_cluster(host: str = "127.0.0.1") -> Iterator[RayCluster]:
    """Make an empty cluster that leaves nothing; to be filled with a head and nodes."""
    temp = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))
    wanted = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    cluster = RayCluster(temp, host)
    try:
        yield cluster
    finally:
        cluster.end()
        shutil.rmtree(temp, ignore_errors=True)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def kill_raylet(place: Place, random: Random) -> Trial:
    """SIGKILL one of two nodes' raylet: training goes on with one worker."""
    with ray_cluster() as cluster:
        cluster.start_head()
        node = cluster.add_node()
        cluster.wait_for(2)
        return _interrupted(
            place, random, cluster, node.kill_raylet, exactly=False, workers={"min": 1, "max": 2}
        )


def kill_raylet_that_returns(place: Place, random: Random) -> Trial:
    """SIGKILL one of two nodes' raylet with a fixed number of workers: training waits for it."""
    with ray_cluster() as cluster:
        cluster.start_head()
        node = cluster.add_node()
        cluster.wait_for(2)

        def lose_for_a_while() -> None:
            node.kill_raylet()
            threading.Timer(_AWAY_S, cluster.add_node).start()

        return _interrupted(place, random, cluster, lose_for_a_while, exactly=True, workers=2)


def kill_head(place: Place, random: Random) -> Trial:
    """SIGKILL all of a cluster, start it anew, and give the command again until it is done."""
    with ray_cluster() as cluster:
        cluster.start_head("--num-cpus=2")

        def lose_all() -> None:
            kill_all([process for node in cluster.nodes for process in node.members()])
            threading.Timer(_AWAY_S, cluster.start_head, ["--num-cpus=2"]).start()

        return _interrupted(place, random, cluster, lose_all, exactly=True, workers=2)


def _interrupted(
    place: Place,
    random: Random,
    cluster: RayCluster,
    breaks: Callable[[], None],
    *,
    exactly: bool,
    workers: object,
) -> Trial:
    """Train on ``cluster``; give the command again if it ends with a loss that it says may pass."""
    job, watch = place.job(), Watch(random_step(random, NUM_STEPS), breaks)
    for _ in range(3):
        watch.told.clear()
        try:
            train_on_ray(job, watch, workers=workers, address=cluster.address)
            break
        except LaunchError:
            require_ray(cluster.address, patience_s=_START_S)
    return verdict(job, watch, place.undisturbed(2), exactly=exactly)


def preempt(place: Place, random: Random) -> Trial:
    """Announce that one of two nodes will be taken away; take it once there is a snapshot."""
    with ray_cluster() as cluster:
        cluster.start_head()
        node = cluster.add_node()
        doomed = cluster.wait_for(2)[1]
        job = place.job(num_steps=LONG)
        watch = Watch(random_step(random, NUM_STEPS), lambda: drain(cluster.address, doomed))
        threading.Thread(target=_take_when_saved, args=(node, job), daemon=True).start()
        train_on_ray(
            job, watch, ONLY_WHEN_URGENT, workers={"min": 1, "max": 2}, address=cluster.address
        )
    trial = verdict(job, watch, place.undisturbed(2, LONG), exactly=False, interval=LONG)
    noticed = [each.step for each in history(job.scratch) if each.kind == "preemption"]
    starts = summary(job).resumed_at
    problems = [*trial.problems, *([] if noticed else ["the notice was not heard"])]
    if noticed and noticed[0] not in starts:
        problems.append(f"saved after step {noticed[0]}, but went on after {starts}")
    return replace(trial, problems=tuple(problems))


def _take_when_saved(node: Node, job: TrainJob) -> None:
    while not snapshots_in(job.scratch / FOLDER):
        time.sleep(0.05)
    node.end(patience_s=0.0)


def drain(address: str, node_id: str) -> None:
    """Announce through Ray that a node will be preempted."""
    ray = Path(sys.executable).with_name("ray")
    options = ["--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    options += ["--reason-message", "chaos", "--deadline-remaining-seconds", str(_NOTICE_S)]
    subprocess.run([ray, "drain-node", "--address", address, *options], check=True)
