"""Snapshots that are damaged, a store without room, a store that can only be read.

Room is taken away with a small file system in memory, writing with a read-only mount of the
snapshots' folder over itself: both need root, and are undone at the end.
"""

import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from qlora_core.backends.in_process import InProcessLauncher
from qlora_core.errors import StoreError
from qlora_core.ports import StepMetrics, TrainJob
from qlora_core.training.desk import job_fingerprint
from qlora_core.training.snapshot import FOLDER, damage, snapshots_in
from tests.chaos.family import started
from tests.chaos.place import INTERVAL, NUM_STEPS, SNAPSHOTS, Place, train_on_ray
from tests.chaos.processes import verdict
from tests.chaos.trial import (
    CannotBreakError,
    Trial,
    Watch,
    curve_problems,
    random_step,
    summary,
    told_problems,
)

_RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
_ROOM_BYTES = 32_000_000
_SHORT_S = 10.0
"""How long there is no room, unless the run ends before."""


class _KilledError(BaseException):
    """Stands for SIGKILL, at a step known exactly."""


def truncate(path: Path, random: Random) -> None:
    """Leave only the beginning of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: random.randrange(len(content))])


def flip_a_bit(path: Path, random: Random) -> None:
    """Change one byte of a file by one bit."""
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def damage_snapshot(place: Place, random: Random) -> Trial:
    """Stop dead, damage one file of the newest snapshot, and give the command again."""
    job, stop_at = place.job(), random_step(random, NUM_STEPS) + INTERVAL

    def stop(metrics: StepMetrics) -> None:
        if metrics.step == stop_at:
            raise _KilledError

    try:
        InProcessLauncher(SNAPSHOTS).train(job, stop)
    except _KilledError:
        newest = snapshots_in(job.scratch / FOLDER)[0]
        victim = random.choice(sorted(newest.iterdir()))
        random.choice([truncate, flip_a_bit])(victim, random)
    watch = Watch(NUM_STEPS + 1, lambda: None)
    InProcessLauncher(SNAPSHOTS).train(job, watch)

    facts = summary(job)
    expected = stop_at // INTERVAL * INTERVAL - INTERVAL
    problems = [
        *curve_problems(job, place.undisturbed_here(), exactly=True),
        *told_problems(watch.told, NUM_STEPS),
    ]
    if facts.resumed_at != (expected,):
        problems.append(f"went on after {facts.resumed_at}, not {expected}: {victim.name}")
    if newest.name not in " ".join(facts.notes):
        problems.append(f"nothing was said of a damaged {victim.name}")
    return Trial(tuple(problems), None, stop_at - expected)


def damage_ray_snapshot(place: Place, random: Random) -> Trial:
    """Damage what Ray Train itself has saved of its run, and kill the driver."""
    job = place.job()

    def harm() -> None:
        driver = started("ray_driver")[0]
        temp = Path(json.loads(driver.cmdline()[3])["temp"])
        for run in (temp / "train").iterdir():
            _harm_json(run / _RAY_SNAPSHOT, random)
        driver.kill()

    watch = Watch(random_step(random, NUM_STEPS), harm)
    train_on_ray(job, watch, workers=2)
    return verdict(job, watch, place.undisturbed(2), exactly=True)


def _harm_json(file: Path, random: Random) -> None:
    """Truncate it, empty it, or let it be another version's; where there is none, put one."""
    text = file.read_text("utf-8") if file.exists() else '{"ray_version": "2.60.0", "a": []}'
    harmed = (text[: len(text) // 2], "", '{"ray_version": "0.0.1"}')
    file.write_text(random.choice(harmed), "utf-8")


def fill_store(place: Place, random: Random) -> Trial:
    """Take all room away from the snapshots and the journal while they are written."""
    with _small_disk() as disk:
        job = place.job(scratch=disk / "scratch")
        filler = disk / "filler"
        return _without_room(
            place, random, job, lambda: _fill(filler), lambda: filler.unlink(missing_ok=True)
        )


def make_store_read_only(place: Place, random: Random) -> Trial:
    """Let snapshots be read but not written."""
    job = place.job()
    with _frozen(job.scratch / FOLDER) as (freeze, thaw):
        return _without_room(place, random, job, freeze, thaw)


def _without_room(
    place: Place,
    random: Random,
    job: TrainJob,
    breaks: Callable[[], None],
    mends: Callable[[], None],
) -> Trial:
    """Train while storage fails for a while; give the command again if it ends with that."""
    later = threading.Timer(_SHORT_S, mends)

    def break_for_a_while() -> None:
        breaks()
        later.start()

    watch = Watch(random_step(random, NUM_STEPS), break_for_a_while)
    said, damaged = "", []
    try:
        said = train_on_ray(job, watch, workers=1)
    except StoreError as error:
        said = str(error)
        damaged = [d for f in snapshots_in(job.scratch / FOLDER) if (d := _damage(f, job))]
        later.cancel()
        mends()
        watch.told.clear()
        train_on_ray(job, watch, workers=1)
    trial = verdict(job, watch, place.undisturbed(1), exactly=True)
    problems = [*trial.problems, *damaged]
    notes = said + " ".join(summary(job).notes)
    if "disk is full" not in notes and "read-only" not in notes:
        problems.append(f"it was not said what is wrong with the store: {said}")
    return Trial(tuple(problems), trial.recovery_s, trial.steps_lost)


def _damage(folder: Path, job: TrainJob) -> str | None:
    problem = damage(folder, job_fingerprint(job))
    return problem and f"{folder.name}: {problem}"


def _fill(filler: Path) -> None:
    descriptor = os.open(filler, os.O_CREAT | os.O_WRONLY)
    try:
        while True:
            os.write(descriptor, bytes(4096))
    except OSError:
        return  # that is what was wanted
    finally:
        os.close(descriptor)


@contextmanager
def _small_disk() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="chaos-disk-"))
    _as_root("mount", "-t", "tmpfs", "-o", f"size={_ROOM_BYTES}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        _as_root("umount", "--lazy", str(folder))
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _frozen(folder: Path) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Yield what makes ``folder`` read-only, and what lets it be written again."""
    folder.mkdir(parents=True, exist_ok=True)
    _as_root("mount", "--bind", str(folder), str(folder))

    def remount(how: str) -> None:
        # nothing of a snapshot is open between two of them; while one is written it is "busy"
        for _ in range(200):
            if _run("mount", "-o", f"remount,bind,{how}", str(folder)).returncode == 0:
                return
        raise CannotBreakError(f"{folder} cannot be mounted {how}")

    try:
        yield (lambda: remount("ro")), (lambda: remount("rw"))
    finally:
        _as_root("umount", "--lazy", str(folder))


def _as_root(*command: str) -> None:
    done = _run(*command)
    if done.returncode:
        raise CannotBreakError(f"{' '.join(command[:3])} needs root: {done.stderr.strip()}")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise CannotBreakError(f"{command[0]} is not installed") from error
