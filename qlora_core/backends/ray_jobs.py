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

from qlora_core.backends.node_probe import own_installation
from qlora_core.backends.ray_address import tell_if_silent
from qlora_core.backends.ray_job_order import JobOrder
from qlora_core.backends.ray_job_orders import Orders
from qlora_core.backends.ray_job_patience import PATIENCE_S
from qlora_core.backends.ray_job_watch import JobWatch
from qlora_core.backends.ray_jobs_client import JobsClient
from qlora_core.backends.ray_voice import TrainingVoice
from qlora_core.backends.ray_worker import RaySpec
from qlora_core.backends.triage import PAUSES_S, Triage
from qlora_core.config import ClusterConfig, SnapshotConfig
from qlora_core.errors import QLoraError, storing
from qlora_core.ports import StepMetrics, TrainJob
from qlora_core.training.desk import SUMMARY_FILE
from qlora_core.training.journal import JOURNAL_FILE, LOG_FILE

_POLL_S = 0.1


@dataclass(frozen=True)
class RayJobsLauncher:
    """Runs jobs on the cluster behind a Ray Jobs endpoint."""

    cluster: ClusterConfig
    snapshots: SnapshotConfig
    say: Callable[[str], None]
    """Told what a person should know, and in doses what the cluster says."""
    check: Callable[[], None] = lambda: None
    """Called several times a second; what it raises ends training and stops the job."""
    patience_s: float = PATIENCE_S
    """How long the cluster may be away while there is no sign of training."""
    pauses_s: tuple[float, ...] = PAUSES_S
    """Before each further try, where the store cannot be written [seconds]."""

    def awake(self) -> AbstractContextManager[None]:
        """Do nothing but say if the endpoint is silent, before the stages in between."""
        tell_if_silent(str(self.cluster.address), self.say)
        return nullcontext()

    def train(self, job: TrainJob, on_step: Callable[[StepMetrics], None]) -> None:
        """Run ``job`` to its end, or follow the job that does; call ``on_step`` for each step.

        Raises:
            TrainingError: Training cannot go on, or somebody stopped the job.
            UserError: Nobody answers at the address, or not to our token, and no job may run there;
                or the cluster does not see the store, or works for another one at its path.
            ResourceError: The cluster has not what was asked for.
            StoreError: There is no room for snapshots, say.
            LaunchError: Workers or jobs were lost more often than ``cluster.max_failures``, or
                the cluster stayed away.
        """
        job = job.absolute()
        client = JobsClient(str(self.cluster.address))
        orders = self._orders(job, client)
        voice = TrainingVoice.of(job, on_step, self.say, self.say)
        triage = Triage(job.scratch, self.cluster.max_failures, self.pauses_s)
        while True:
            launch = ""
            try:
                triage.look()
                found = orders.found()
                order = found or self._new(orders, job)
                launch = order.spec.launch
                watch = JobWatch(order, client, voice, self.say, self.check, self.patience_s)
                watch.run(is_new=found is None)
                return _hand_over(job.scratch / f"result-{launch}", job.out)
            except QLoraError as error:
                incident, pause_s = triage.remedy(error, voice.follower.last_step, launch)
            self.say(incident.sentence())
            with orders.abandoning():
                self._pause(pause_s)

    def _new(self, orders: Orders, job: TrainJob) -> JobOrder:
        with storing(job.scratch):
            for stale in (JOURNAL_FILE, SUMMARY_FILE):  # snapshots hold the journal's truth
                (job.scratch / stale).unlink(missing_ok=True)
        return orders.written()

    def _orders(self, job: TrainJob, client: JobsClient) -> Orders:
        flow = own_installation()

        def make(launch: str) -> JobOrder:
            return JobOrder(cluster=self.cluster, spec=self._spec(job, launch), flow=flow)

        return Orders(job.scratch, client, make, self.say, self.check, self.patience_s)

    def _spec(self, job: TrainJob, launch: str) -> RaySpec:
        return RaySpec(
            job=job.model_copy(update={"out": job.scratch / f"result-{launch}"}),
            snapshots=self.snapshots,
            launch=launch,
            log=job.scratch / LOG_FILE,
            cluster=self.cluster,
        )

    def _pause(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            self.check()
            time.sleep(_POLL_S)


def _hand_over(result: Path, out: Path) -> None:
    """Copy, not move: whoever is killed before the result is sealed finds it again."""
    with storing(out):
        shutil.copytree(result, out, dirs_exist_ok=True)
