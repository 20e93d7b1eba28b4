"""Two nodes in network namespaces of their own, and the cable between them pulled out.

::

    namespace A: head, driver, launcher   10.77.0.1 == veth == 10.77.0.2   namespace B: a node

The disk stays shared, so a worker that is cut off could still write: that is what attempts' tokens
are for. All of the trial runs in namespace A, in a process of its own; it needs root.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from pydantic import TypeAdapter

from qlora_core.ports import TrainJob
from qlora_core.training.attempt import read_record
from tests.backends.ray_nodes import ray_cluster
from tests.chaos.place import NUM_STEPS, Place, train_on_ray
from tests.chaos.processes import verdict
from tests.chaos.trial import CannotBreakError, Trial, Watch, random_step, summary

_HERE, _THERE, _CABLE = "10.77.0.1", "10.77.0.2", "qlv0"
_WITHIN_S = 120.0
_SHORT_S = 6.0
_LIMIT_S = 400.0


def cut_for_a_moment(place: Place, random: Random) -> Trial:
    """Cut the network for 6 s: nothing is to be started again."""
    return _in_namespaces(place, random, _SHORT_S)


def cut_for_good(place: Place, random: Random) -> Trial:
    """Cut the network for good: training goes on with one worker within two minutes."""
    return _in_namespaces(place, random, None)


def _in_namespaces(place: Place, random: Random, seconds: float | None) -> Trial:
    job = place.job()
    undisturbed = place.undisturbed(2)
    order = {
        "job": job.model_dump(mode="json"),
        "undisturbed": str(undisturbed),
        "at_step": random_step(random, NUM_STEPS),
        "seconds": seconds,
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
    here, seconds = str(order["here"]), order["seconds"]

    def cut() -> None:
        _cable(here, "down")
        if isinstance(seconds, float):
            threading.Timer(seconds, _cable, [here, "up"]).start()

    watch = Watch(int(str(order["at_step"])), cut)
    beyond = ("ip", "netns", "exec", str(order["there"]))
    with ray_cluster(host=_HERE) as cluster:
        cluster.start_head(f"--node-ip-address={_HERE}")
        cluster.add_node(f"--node-ip-address={_THERE}", before=beyond)
        cluster.wait_for(2)
        train_on_ray(job, watch, workers={"min": 1, "max": 2}, address=cluster.address)
    return _verdict(job, watch, Path(str(order["undisturbed"])), is_short=seconds is not None)


def _verdict(job: TrainJob, watch: Watch, undisturbed: Path, *, is_short: bool) -> Trial:
    trial = verdict(job, watch, undisturbed, exactly=is_short)
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
