"""Two nodes in network namespaces of their own, and the cable between them pulled out.

::

    namespace A: head, driver, launcher   10.77.0.1 == veth == 10.77.0.2   namespace B: a node

The disk stays shared, so a worker that is cut off could still write: that is what attempts' tokens
are for (`wake_when_replaced`). All of the trial runs in namespace A, in a process of its own; it
needs root.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from random import Random

import psutil
from pydantic import TypeAdapter

from qlora_core.ports import TrainJob
from qlora_core.training.attempt import read_record
from qlora_core.training.snapshot import FOLDER, snapshots_in
from tests.backends.ray_nodes import Node, RayCluster, ray_cluster
from tests.chaos.nodes import LONG
from tests.chaos.place import NUM_STEPS, Place, train_on_ray
from tests.chaos.processes import verdict
from tests.chaos.trial import CannotBreakError, Trial, Watch, random_step, summary

_HERE, _THERE, _CABLE = "10.77.0.1", "10.77.0.2", "qlv0"
_WITHIN_S = 120.0
_SHORT_S = 6.0
_AWAKE_S = 3.0
"""How long a worker that was cut off is watched; it makes a step in 10 ms."""
_LIMIT_S = 400.0


def cut_for_a_moment(place: Place, random: Random) -> Trial:
    """Cut the network for 6 s: nothing is to be started again."""
    return _in_namespaces(place, random, _SHORT_S)


def cut_for_good(place: Place, random: Random) -> Trial:
    """Cut the network for good: training goes on with one worker within two minutes."""
    return _in_namespaces(place, random, None)


def wake_when_replaced(place: Place, random: Random) -> Trial:
    """Cut the only worker off, asleep; it wakes when another has taken over, and goes on at once.

    It knows nothing of what has happened, and sees the same disk.
    """
    return _in_namespaces(place, random, None, is_alone=True)


def _in_namespaces(
    place: Place, random: Random, seconds: float | None, *, is_alone: bool = False
) -> Trial:
    num_steps, num_workers = (LONG, 1) if is_alone else (NUM_STEPS, 2)
    job = place.job(num_steps=num_steps)
    order = {
        "job": job.model_dump(mode="json"),
        "undisturbed": str(place.undisturbed(num_workers, num_steps)),
        "at_step": random_step(random, NUM_STEPS),
        "seconds": seconds,
        "is_alone": is_alone,
    }
    with _two_namespaces() as (here, there):
        command = ["ip", "netns", "exec", here, sys.executable, "-m", "tests.chaos.network"]
        done = subprocess.run(
            [*command, json.dumps(order | {"here": here, "there": there})],
            capture_output=True,
            text=True,
            check=False,
            timeout=_LIMIT_S,
            env=os.environ | {"GLOO_SOCKET_IFNAME": _CABLE},
        )
    if done.returncode:
        return Trial((f"the trial itself failed: {done.stderr.strip()[-800:]}",))
    return TypeAdapter(Trial).validate_json(done.stdout.strip().splitlines()[-1])


@contextmanager
def _two_namespaces() -> Iterator[tuple[str, str]]:
    """Yield two namespaces that one cable joins, which is called the same at both ends."""
    here, there = (f"ql-{os.getpid()}-{side}" for side in "ab")
    try:
        _ip("netns", "add", here)
        _ip("netns", "add", there)
        cable = ["link", "add", _CABLE, "netns", here, "type", "veth"]
        _ip(*cable, "peer", "name", _CABLE, "netns", there)
        for side, address in ((here, _HERE), (there, _THERE)):
            _ip("-n", side, "address", "add", f"{address}/24", "dev", _CABLE)
            _ip("-n", side, "link", "set", "lo", "up")
            _ip("-n", side, "link", "set", _CABLE, "up")
            # Ray finds its own address by asking which way leads out
            _ip("-n", side, "route", "add", "default", "dev", _CABLE)
        yield here, there
    finally:
        for side in (here, there):
            subprocess.run(["ip", "netns", "delete", side], capture_output=True, check=False)


def _ip(*words: str) -> None:
    try:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise CannotBreakError("ip (iproute2) is not installed") from error
    if done.returncode:
        raise CannotBreakError(f"ip {' '.join(words)} needs root: {done.stderr.strip()}")


def _apart(order: dict[str, object]) -> Trial:
    """What the process in namespace A does."""
    job = TrainJob.model_validate(order["job"])
    if order["is_alone"]:
        return _alone(order, job)
    here, seconds = str(order["here"]), order["seconds"]

    def cut() -> None:
        _cable(here, "down")
        if isinstance(seconds, float):
            threading.Timer(seconds, _cable, [here, "up"]).start()

    watch = Watch(int(str(order["at_step"])), cut)
    with ray_cluster(host=_HERE) as cluster:
        cluster.start_head(f"--node-ip-address={_HERE}")
        _add_node_beyond(cluster, order)
        cluster.wait_for(2)
        train_on_ray(job, watch, workers={"min": 1, "max": 2}, address=cluster.address)
    is_short, undisturbed = seconds is not None, Path(str(order["undisturbed"]))
    return _verdict(job, watch, undisturbed, is_short=is_short, exactly=is_short)


def _add_node_beyond(cluster: RayCluster, order: dict[str, object]) -> Node:
    beyond = ("ip", "netns", "exec", str(order["there"]))
    return cluster.add_node(f"--node-ip-address={_THERE}", before=beyond)


def _alone(order: dict[str, object], job: TrainJob) -> Trial:
    """Train on one worker, beyond the cable, and on another one when that is lost."""
    with ray_cluster(host=_HERE) as cluster:
        cluster.start_head(f"--node-ip-address={_HERE}", num_cpus=0)
        lost = _add_node_beyond(cluster, order)
        cluster.wait_for(2)
        sleeper = _Sleeper(lost, job)

        def cut() -> None:
            sleeper.sleep()
            _cable(str(order["here"]), "down")
            cluster.add_node(f"--node-ip-address={_HERE}")

        watch = Watch(int(str(order["at_step"])), cut)
        train_on_ray(job, watch, workers=1, address=cluster.address)
        problems = tuple(sleeper.problems())
    undisturbed = Path(str(order["undisturbed"]))
    trial = _verdict(job, watch, undisturbed, is_short=False, exactly=True)
    return replace(trial, problems=(*trial.problems, *problems))


class _Sleeper:
    """A node that is stopped, and goes on when its worker has a successor.

    Args:
        node: Where the only worker is.
        job: What it trains.
    """

    def __init__(self, node: Node, job: TrainJob) -> None:
        self._members: list[psutil.Process] = []
        self._node, self._job = node, job
        self._token, self._before, self._accepted = "", set[str](), set[str]()
        self._cpu_s = self._cpu_awake_s = 0.0
        self._watching = threading.Thread(target=self._watch, daemon=True)

    def sleep(self) -> None:
        """Stop all of the node; wake it when there is another attempt."""
        self._members = self._node.members()
        for process in self._members:
            process.suspend()
        self._token = read_record(self._job.scratch).token
        self._cpu_s = _cpu_seconds(self._members)
        self._watching.start()

    def problems(self) -> Iterator[str]:
        """Yield what it did that it should not have done, after training."""
        self._watching.join(_AWAKE_S)
        if self._cpu_awake_s <= self._cpu_s:
            yield "the worker that was cut off did not wake, so nothing is shown"
        for name in sorted(self._accepted):
            yield f"snapshot {name} came of attempt {self._token}, which was over"

    def _watch(self) -> None:
        while read_record(self._job.scratch).token == self._token:
            time.sleep(0.01)
        self._before = self._snapshots()
        for process in self._members:
            process.resume()
        end = time.monotonic() + _AWAKE_S
        while time.monotonic() < end:
            self._accepted |= self._snapshots() - self._before
            time.sleep(0.01)
        self._cpu_awake_s = _cpu_seconds(self._members)

    def _snapshots(self) -> set[str]:
        found = snapshots_in(self._job.scratch / FOLDER)
        return {folder.name for folder in found if folder.name.endswith(self._token)}


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    seconds = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            seconds += sum(process.cpu_times()[:2])
    return seconds


def _verdict(
    job: TrainJob, watch: Watch, undisturbed: Path, *, is_short: bool, exactly: bool
) -> Trial:
    trial = verdict(job, watch, undisturbed, exactly=exactly)
    restarts = summary(job).resumed_at
    if is_short:  # `verdict` complains of a training that nothing interrupted: here that is right
        problems = [each for each in trial.problems if "nothing was interrupted" not in each]
        problems += [f"training was started again, after {restarts}"] if restarts else []
        return Trial(tuple(problems), trial.recovery_s, trial.steps_lost)
    late = (trial.recovery_s or 0.0) > _WITHIN_S
    problems = [*trial.problems, *([f"took more than {_WITHIN_S:.0f} s"] if late else [])]
    remark = f"attempts: {read_record(job.scratch).started_after}"
    return Trial(tuple(problems), trial.recovery_s, trial.steps_lost, (remark,))


def _cable(namespace: str, state: str) -> None:
    _ip("-n", namespace, "link", "set", _CABLE, state)
    if state == "up":  # it went with the cable
        _ip("-n", namespace, "route", "replace", "default", "dev", _CABLE)


if __name__ == "__main__":
    sys.stdout.write(TypeAdapter(Trial).dump_json(_apart(json.loads(sys.argv[1]))).decode() + "\n")
