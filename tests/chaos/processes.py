"""Processes that are killed: a worker, the driver that talks to Ray, whoever gave the command."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import psutil

from qlora_core.ports import TrainJob
from qlora_core.training.journal import JOURNAL_FILE
from tests.chaos.family import started
from tests.chaos.place import INTERVAL, NUM_STEPS, Place, train_on_ray
from tests.chaos.trial import (
    Trial,
    Watch,
    curve_problems,
    loss_problems,
    lost_steps,
    random_step,
    summary,
    told_problems,
)

_BY_ITSELF = (
    "import sys; from pathlib import Path; from qlora_core.ports import TrainJob\n"
    "from tests.chaos.place import ignore, train_on_ray\n"
    "job = TrainJob.model_validate_json(Path(sys.argv[1]).read_text())\n"
    "train_on_ray(job, ignore, workers=2)\n"
)
"""The command, in a process that can be killed."""


def kill_worker(place: Place, random: Random) -> Trial:
    """SIGKILL one of two workers."""
    return _interrupted(place, random, lambda: random.choice(started("RayTrainWorker")).kill())


def kill_driver(place: Place, random: Random) -> Trial:
    """SIGKILL the process that talks to Ray; its Ray dies with it."""
    return _interrupted(place, random, lambda: started("ray_driver")[0].kill())


def _interrupted(place: Place, random: Random, breaks: Callable[[], None]) -> Trial:
    """Train on two workers and break something that the launcher gets over by itself."""
    job, watch = place.job(), Watch(random_step(random, NUM_STEPS), breaks)
    train_on_ray(job, watch, workers=2)
    return verdict(job, watch, place.undisturbed(2), exactly=True)


def verdict(
    job: TrainJob, watch: Watch, undisturbed: Path, *, exactly: bool, interval: int = INTERVAL
) -> Trial:
    """Return what a training has come to that lost its workers once."""
    recovery_s, last_done = watch.silence()
    lost = lost_steps(job, last_done)
    problems = [
        *curve_problems(job, undisturbed, exactly=exactly),
        *told_problems(watch.told, job.training.max_steps or 0),
        *loss_problems(lost, interval),
    ]
    if not summary(job).resumed_at:
        problems.append("nothing was interrupted, so nothing is shown")
    return Trial(tuple(problems), recovery_s, lost)


def kill_launcher(place: Place, random: Random) -> Trial:
    """SIGKILL the process that gave the command, and give it again."""
    job, at_step = place.job(), random_step(random, NUM_STEPS)
    last_done = _killed_by_itself(job, at_step)
    watch = Watch(1, lambda: None)
    begun = time.monotonic()
    train_on_ray(job, watch, workers=2)
    lost = lost_steps(job, last_done)
    problems = (
        *curve_problems(job, place.undisturbed(2), exactly=True),
        *told_problems(watch.told, NUM_STEPS),
        *loss_problems(lost, INTERVAL),
    )
    new = min(last_done + 1, NUM_STEPS)
    return Trial(problems, watch.first_told[new] - begun, lost)


def _killed_by_itself(job: TrainJob, at_step: int) -> int:
    """Train in another process until it is killed after ``at_step``; return the last step done."""
    order = job.scratch.parent / "job.json"
    order.write_text(job.model_dump_json())
    launcher = subprocess.Popen([sys.executable, "-c", _BY_ITSELF, str(order)])
    try:
        while _last_step(job) < at_step:
            assert launcher.poll() is None, "training ended before it was killed"
            time.sleep(0.02)
    finally:
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
    time.sleep(2.0)  # its workers may do a few more steps before they notice
    return _last_step(job)


def _last_step(job: TrainJob) -> int:
    return max(_steps(job.scratch / JOURNAL_FILE), default=0)


def _steps(journal: Path) -> Iterator[int]:
    if journal.exists():
        for line in journal.read_text("utf-8").splitlines():
            try:
                yield int(json.loads(line)["step"])
            except (ValueError, KeyError):  # it is being written
                continue


def kill_all(processes: list[psutil.Process]) -> None:
    """SIGKILL processes, whichever of them still run."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
