"""Train as a job of a remote Ray cluster, which goes on when the flow that asked for it is gone.

The endpoint (`ray_jobs_client`) is asked to start, to stop, and now and then how the job is. All
else goes through the store, which flow and cluster share (`ray_job_order`).

**One training.** A job's id is made from the stage's key, so the same recipe on the same store
finds its own job: one that runs is attached to, one that has finished is taken for done, and after
one that failed comes the next number, from the last snapshot. The cluster refuses a second job of
one id, so two flows at once make one.

**Death and cancelling.** What ends `train` early by an exception (Ctrl-C, a run cancelled in
Prefect, another stage's error) stops the job. SIGKILL, a lost machine or a lost line runs no code
here, so the job goes on. One exception leaves it alone: that nobody can be reached.
"""

import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from qlora_core.backends.ray_job_log import JobVoice
from qlora_core.backends.ray_job_order import JobOrder, order_file, submission_stem
from qlora_core.backends.ray_job_watch import JobWatch
from qlora_core.backends.ray_jobs_client import JobsClient, RayJob
from qlora_core.backends.ray_train import _absolute, _log_file
from qlora_core.backends.ray_worker import RaySpec
from qlora_core.backends.triage import PAUSES_S, Triage
from qlora_core.config import ClusterConfig, SnapshotConfig
from qlora_core.errors import QLoraError, from_json, storing
from qlora_core.ports import StepMetrics, TrainJob
from qlora_core.training.attempt import next_launch, read_record
from qlora_core.training.desk import SUMMARY_FILE
from qlora_core.training.durable import replace_durably
from qlora_core.training.journal import JOURNAL_FILE

_POLL_S = 0.1
_PATIENCE_S = 600.0  # a head that moves to another machine takes minutes


@dataclass(frozen=True)
class RayJobsLauncher:
    """Runs jobs on the cluster behind a Ray Jobs endpoint."""

    cluster: ClusterConfig
    snapshots: SnapshotConfig
    say: Callable[[str], None]
    """Told what a person should know, and in doses what the cluster says."""
    check: Callable[[], None] = lambda: None
    """Called several times a second; what it raises ends training and stops the job."""
    patience_s: float = _PATIENCE_S
    """How long the cluster may be away while there is no sign of training."""
    pauses_s: tuple[float, ...] = PAUSES_S
    """Before each further try, where the store cannot be written [seconds]."""

    def awake(self) -> AbstractContextManager[None]:
        """Do nothing: the cluster is awake."""
        return nullcontext()

    def train(self, job: TrainJob, on_step: Callable[[StepMetrics], None]) -> None:
        """Run ``job`` to its end, or follow the job that does; call ``on_step`` for each step.

        Raises:
            TrainingError: Training cannot go on, or somebody stopped the job.
            UserError: Nobody answers at the address, or not to our token; or the cluster does not
                see the store.
            ResourceError: The cluster has not what was asked for.
            StoreError: There is no room for snapshots, say.
            LaunchError: Workers or jobs were lost more often than ``cluster.max_failures``, or
                the cluster stayed away.
        """
        assert self.cluster.address is not None  # noqa: S101  # that is why we are asked
        client = JobsClient(self.cluster.address)
        client.require_usable()
        job = _absolute(job)
        with storing(job.scratch):
            job.scratch.mkdir(parents=True, exist_ok=True)
        orders = Orders(job, client, self.cluster, self.snapshots, self.say)
        voice = JobVoice.of(job, on_step, self.say)
        triage = Triage(job.scratch, self.cluster.max_failures, self.pauses_s)
        while True:
            launch = ""
            try:
                found = orders.found()
                order = found or orders.written()
                launch = order.spec.launch
                watch = JobWatch(order, client, voice, self.say, self.check, self.patience_s)
                watch.run(is_new=found is None)
                return _hand_over(order, job.out)
            except QLoraError as error:
                incident, pause_s = triage.remedy(error, voice.follower.last_step, launch)
            self.say(incident.sentence())
            self._pause(pause_s)

    def _pause(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            self.check()
            time.sleep(_POLL_S)


@dataclass(frozen=True)
class Orders:
    """Finds the order that is being carried out for a scratch folder, or writes a new one."""

    job: TrainJob
    client: JobsClient
    cluster: ClusterConfig
    snapshots: SnapshotConfig
    say: Callable[[str], None]

    def found(self) -> JobOrder | None:
        """Return the order whose job runs or has finished; stop jobs of any other."""
        known = self._known()
        order = self._last()
        for name, job in known.items():
            if not job.is_over and not _is_carried_out_by(order, name):
                self.say(f"Ray job {name} is of an attempt that is over; stopping it.")
                self.client.stop(name)
        if order is None:
            return None
        answer = order.answer()
        if answer is None:
            return self._running(order, known.get(order.submission_id))
        if answer:
            self.say(f"Ray job {order.submission_id} has failed: {from_json(answer).what}")
            return None
        if not order.spec.job.out.is_dir():
            self.say(f"Ray job {order.submission_id} has finished, but its result is gone.")
            return None
        self.say(f"Ray job {order.submission_id} has finished meanwhile; its result is used.")
        return order

    def written(self) -> JobOrder:
        """Write a new order, under an id that the cluster has not seen."""
        scratch, known = self.job.scratch, self._known()
        order = self._order(next_launch(scratch))
        while order.submission_id in known:  # the store forgets what it sealed, the cluster not
            order = self._order(next_launch(scratch))
        for stale in (JOURNAL_FILE, SUMMARY_FILE):  # snapshots hold the journal's truth
            (scratch / stale).unlink(missing_ok=True)
        file = order_file(scratch, order.spec.launch)
        replace_durably(file, order.model_dump_json(indent=1).encode())
        return order

    def _known(self) -> dict[str, RayJob]:
        """Return the jobs for our scratch folder, by id."""
        ids = {job.submission_id or "": job for job in self.client.jobs()}
        opening = submission_stem(self.job.scratch)
        return {name: job for name, job in ids.items() if name.startswith(opening)}

    def _last(self) -> JobOrder | None:
        launch = read_record(self.job.scratch).launch
        try:
            text = order_file(self.job.scratch, launch).read_text("utf-8")
            return JobOrder.model_validate_json(text)
        except (OSError, ValueError):  # none, or of another version of this project
            return None

    def _running(self, order: JobOrder, job: RayJob | None) -> JobOrder | None:
        if job is None or job.is_over or not _is_carried_out_by(order, order.submission_id):
            return None
        self.say(f"Ray job {order.submission_id} is {job.status.lower()}; attached to it.")
        if (self.cluster, self.snapshots) != (order.cluster, order.spec.snapshots):
            self.say(
                "It goes by the cluster and snapshot settings it was started with; those of this "
                "recipe count from the next attempt."
            )
        return order

    def _order(self, launch: str) -> JobOrder:
        result = self.job.scratch / f"result-{launch}"
        spec = RaySpec(
            job=self.job.model_copy(update={"out": result}),
            snapshots=self.snapshots,
            launch=launch,
            log=_log_file(self.job),
        )
        return JobOrder(cluster=self.cluster, spec=spec)


def _is_carried_out_by(order: JobOrder | None, name: str) -> bool:
    """Say whether that job is the one to follow, if it lives; one with an error only winds up."""
    if order is None or name != order.submission_id:
        return False
    return not order.spec.error_file.exists()


def _hand_over(order: JobOrder, out: Path) -> None:
    """Copy, not move: whoever is killed before the result is sealed finds it again."""
    with storing(out):
        shutil.copytree(order.spec.job.out, out, dirs_exist_ok=True)
