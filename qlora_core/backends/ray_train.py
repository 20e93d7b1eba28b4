"""Train on Ray: start a driver process, follow the journal, survive what can be survived.

Three layers catch faults, each what the one below cannot: Ray restarts lost *workers*; this
launcher restarts a lost *driver* (it ends without a word when Ray's head dies), and others that
`triage` has a remedy for; running the same recipe again restarts a lost *launcher*. All of them go
on from the newest verified snapshot.

Nothing of Ray is imported here; the driver is a process of its own (`ray_process`).
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from qlora_core.backends.local_room import require_memory
from qlora_core.backends.ray_address import reach_ray, tell_if_silent
from qlora_core.backends.ray_process import DriverProcess, WaitingDriver, start_driver
from qlora_core.backends.ray_resources import require_local_room
from qlora_core.backends.ray_voice import TrainingVoice, last_lines
from qlora_core.backends.ray_work import await_room
from qlora_core.backends.ray_worker import RaySpec
from qlora_core.backends.triage import PAUSES_S, LostDriverError, Triage
from qlora_core.config import ClusterConfig, SnapshotConfig
from qlora_core.errors import QLoraError, from_json, storing
from qlora_core.ports import StepMetrics, TrainJob
from qlora_core.training.attempt import next_launch
from qlora_core.training.desk import SUMMARY_FILE
from qlora_core.training.durable import reserve
from qlora_core.training.journal import JOURNAL_FILE, LOG_FILE, Patience

_POLL_S = 0.1


@dataclass(frozen=True)
class RayTrainLauncher:
    """Runs jobs with Ray Train, on a Ray of its own or a running cluster."""

    cluster: ClusterConfig
    snapshots: SnapshotConfig
    say: Callable[[str], None]
    """Told what a person should know, once: a resume, a damaged snapshot, a lost driver. Of a
    running cluster also, in doses, what it says."""
    check: Callable[[], None] = lambda: None
    """Called several times a second; what it raises ends training and all of Ray's processes."""
    waiting: WaitingDriver = field(default_factory=WaitingDriver, repr=False, compare=False)
    """A driver that was started ahead of the first job."""
    pauses_s: tuple[float, ...] = PAUSES_S
    """Before each further try, where the store cannot be written [seconds]."""

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Start a Ray of our own now, for the training that is to come within the block.

        Of a running one that is silent, a person should know before the stages in between.
        """
        if self.cluster.address is not None:
            tell_if_silent(self.cluster.address, self.say)
        self.waiting.start(self.cluster)
        try:
            yield
        finally:
            self.waiting.end()

    def train(self, job: TrainJob, on_step: Callable[[StepMetrics], None]) -> None:
        """Run ``job`` to its end, calling ``on_step`` once for each step, in order.

        Raises:
            TrainingError: Training cannot go on.
            UserError: Nobody answers at the address of the cluster, and nobody ever has.
            HeadLostError: Nobody answers there any more.
            ResourceError: The cluster has not what was asked for.
            StoreError: There is no room for snapshots, say.
            LaunchError: Workers or drivers were lost more often than ``cluster.max_failures``.
        """
        if self.cluster.address is None:
            require_local_room(self.cluster)
        else:
            self.say(f"connecting to Ray at {self.cluster.address}")
        job = job.absolute()
        with storing(job.scratch):
            job.scratch.mkdir(parents=True, exist_ok=True)
            for stale in (JOURNAL_FILE, SUMMARY_FILE):  # snapshots hold the journal's truth
                (job.scratch / stale).unlink(missing_ok=True)
        voice = TrainingVoice.of(job, on_step, self.say, self._aside)
        triage = Triage(job.scratch, self.cluster.max_failures, self.pauses_s)
        while True:
            launch = ""
            try:
                if self.cluster.address is not None:
                    reach_ray(self.cluster, job.scratch, self.say, self.check)
                triage.look()
                launch = next_launch(job.scratch)
                self._await_memory(job)
                return self._launch(job, launch, voice)
            except QLoraError as error:
                incident, pause_s = triage.remedy(error, voice.follower.last_step, launch)
            self.say(incident.sentence())
            self._pause(pause_s)

    def _pause(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            self.check()
            time.sleep(_POLL_S)

    def _aside(self, message: str) -> None:
        """Tell what workers of a running cluster say; those of this machine need not be watched."""
        if self.cluster.address is not None:
            self.say(message)

    def _await_memory(self, job: TrainJob) -> None:
        """Return once a Ray of our own has the memory; a running cluster is asked by the driver.

        Raises:
            ResourceError: This machine is too small.
            NoRoomError: Others use its memory.
        """
        if self.cluster.address is None:
            waits = self.waiting.is_here
            await_room(
                lambda: require_memory(job, self.cluster, is_waiting=waits),
                self.cluster.wait_for_nodes_s,
                self.say,
                self._pause,
            )

    def _launch(self, job: TrainJob, launch: str, voice: TrainingVoice) -> None:
        """Run one driver to the end of the job."""
        spec = RaySpec(
            job=job,
            snapshots=self.snapshots,
            launch=launch,
            log=job.scratch / LOG_FILE,
            cluster=self.cluster,
        )
        reserve(spec.error_file)  # so that a full store can be told, too
        driver = self.waiting.take() or start_driver(self.cluster, spec.log)
        try:
            driver.give(spec)
            if not _watch(driver, spec, voice, self.check):
                raise LostDriverError(
                    f"Ray's driver was lost more than cluster.max_failures="
                    f"{self.cluster.max_failures} times. Its last words:\n{last_lines(spec.log)}",
                    fix=f"Run again to go on from the last snapshot. The log: {spec.log}",
                )
        finally:
            driver.end()
            voice.log.catch_up(is_end=True)
            shutil.rmtree(job.scratch / "ray", ignore_errors=True)


def _watch(
    driver: DriverProcess, spec: RaySpec, voice: TrainingVoice, check: Callable[[], None]
) -> bool:
    """Follow a driver to its end; return whether it finished, False if it was lost."""
    is_over, looks = False, Patience()
    while not is_over or voice.is_behind or looks.is_behind:
        is_over = driver.has_answered()  # first: then what it has written is there
        check()
        voice.catch_up()
        if error := looks.look(spec.final_error):
            voice.catch_up()  # steps that were done just before
            raise error
        time.sleep(_POLL_S)
    outcome = driver.outcome()
    if outcome:
        raise from_json(outcome)
    return outcome is not None
