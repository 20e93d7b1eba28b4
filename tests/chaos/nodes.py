"""The loss of nodes: one of two, all at once with the head, and with notice."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

from qlora_core.backends.ray_address import require_ray
from qlora_core.config import SnapshotConfig
from qlora_core.errors import LaunchError
from qlora_core.ports import TrainJob
from qlora_core.training.incidents import history
from qlora_core.training.snapshot import FOLDER, snapshots_in
from tests.backends.ray_nodes import Node, RayCluster, ray_cluster
from tests.chaos.place import NUM_STEPS, Place, train_on_ray
from tests.chaos.processes import kill_all, verdict
from tests.chaos.trial import Trial, Watch, random_step, summary

_START_S = 90.0
_AWAY_S = 5.0
"""How long a node is away that comes back."""
_NOTICE_S = 30
"""Before a node is taken: what clouds give."""
MEDIUM = 600
"""Steps of a training that must go on until the workers of a dead raylet have noticed."""
LONG = 2000
"""Steps of a training that must go on while Ray gets word of something: every 5 s."""
ONLY_WHEN_URGENT = SnapshotConfig(every_s=1e9)
_MOST_LOST = 20
"""Steps after a notice: each is saved, but that may take half of the time, and these take 10 ms."""


def kill_raylet(place: Place, random: Random) -> Trial:
    """SIGKILL one of two nodes' raylet: training goes on with one worker."""
    with ray_cluster() as cluster:
        cluster.start_head()
        node = cluster.add_node()
        cluster.wait_for(2)
        return _interrupted(
            place,
            random,
            cluster,
            node.kill_raylet,
            exactly=False,
            num_steps=MEDIUM,
            workers={"min": 1, "max": 2},
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

        return _interrupted(
            place, random, cluster, lose_for_a_while, exactly=True, num_steps=MEDIUM, workers=2
        )


def kill_head(place: Place, random: Random) -> Trial:
    """SIGKILL all of a cluster, start it anew, and give the command again until it is done."""
    with ray_cluster() as cluster:
        cluster.start_head(num_cpus=2)

        def lose_all() -> None:
            kill_all([process for node in cluster.nodes for process in node.members()])
            threading.Timer(_AWAY_S, cluster.start_head, kwargs={"num_cpus": 2}).start()

        return _interrupted(place, random, cluster, lose_all, exactly=True, workers=2)


def _interrupted(
    place: Place,
    random: Random,
    cluster: RayCluster,
    breaks: Callable[[], None],
    *,
    exactly: bool,
    workers: object,
    num_steps: int = NUM_STEPS,
) -> Trial:
    """Train on ``cluster``; give the command again if it ends with a loss that it says may pass."""
    job = place.job(num_steps=num_steps)
    watch = Watch(random_step(random, NUM_STEPS), breaks)
    for _ in range(3):
        watch.told.clear()
        try:
            train_on_ray(job, watch, workers=workers, address=cluster.address)
            break
        except LaunchError:
            require_ray(cluster.address, patience_s=_START_S)
    return verdict(job, watch, place.undisturbed(2, num_steps), exactly=exactly)


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
    trial = verdict(job, watch, place.undisturbed(2, LONG), exactly=False, interval=_MOST_LOST)
    noticed = [each.step or 0 for each in history(job.scratch) if each.kind == "preemption"]
    starts = summary(job).resumed_at
    problems = [*trial.problems, *([] if noticed else ["the notice was not heard"])]
    if noticed and max(starts, default=0) < noticed[0]:
        problems.append(f"saved after step {noticed[0]}, but went on after {starts}")
    return replace(trial, problems=tuple(problems))


def _take_when_saved(node: Node, job: TrainJob) -> None:
    while not snapshots_in(job.scratch / FOLDER):
        time.sleep(0.05)
    node.kill()


def drain(address: str, node_id: str) -> None:
    """Announce through Ray that a node will be preempted."""
    ray = Path(sys.executable).with_name("ray")
    options = ["--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    options += ["--reason-message", "chaos", "--deadline-remaining-seconds", str(_NOTICE_S)]
    subprocess.run([ray, "drain-node", "--address", address, *options], check=True)
