"""Evaluate as a job of a remote Ray cluster, as `ray_jobs` trains there.

The job shares the batches out among the cluster's workers (`ray_asking`) and keeps their replies in
the stage's scratch folder, where this follows them. Whoever has the same recipe and store finds the
same job, and what was answered once is not asked again.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from qlora_core.backends.node_probe import own_installation
from qlora_core.backends.ray_asker import AskSpec
from qlora_core.backends.ray_crew import ReplyFollower
from qlora_core.backends.ray_job_order import JobOrder
from qlora_core.backends.ray_job_orders import Orders
from qlora_core.backends.ray_job_patience import PATIENCE_S
from qlora_core.backends.ray_job_watch import JobWatch
from qlora_core.backends.ray_jobs_client import JobsClient
from qlora_core.backends.ray_voice import LogTeller
from qlora_core.backends.replies import REPLIES_FILE
from qlora_core.backends.triage import LostDriverError
from qlora_core.config import ClusterConfig
from qlora_core.ports import AskJob, Reply
from qlora_core.training.journal import LOG_FILE, Tail


@dataclass(frozen=True)
class RayJobsCrew:
    """Workers of the cluster behind a Ray Jobs endpoint."""

    cluster: ClusterConfig
    say: Callable[[str], None]
    """Told what a person should know, and in doses what the cluster says."""
    check: Callable[[], None] = lambda: None
    """Called several times a second; what it raises ends the evaluation and stops the job."""
    patience_s: float = PATIENCE_S
    """How long the cluster may be away while no reply comes."""

    def ask(self, job: AskJob, on_reply: Callable[[Reply], None]) -> None:
        """Ask everything, calling ``on_reply`` once for each batch, in any order.

        Raises:
            UserError: Nobody answers at the address, or not to our token, and no job may run there;
                or the cluster does not see the store, or works for another one at its path.
            ClusterError: Nodes are not ready for it.
            ResourceError: The cluster has not what was asked for.
            StoreError: There is no room for replies, say.
            LaunchError: Workers or jobs were lost more often than `cluster.max_failures`, or the
                cluster stayed away.
            QLoraError: What a worker met.
        """
        job = job.absolute()
        client = JobsClient(str(self.cluster.address))
        orders = self._orders(job, client)
        voice = ReplyVoice.of(job, on_reply, self.say)
        num_lost = 0
        while True:
            found = orders.found()
            watch = JobWatch(
                found or orders.written(), client, voice, self.say, self.check, self.patience_s
            )
            try:
                return watch.run(is_new=found is None)
            except LostDriverError:
                num_lost += 1
                if num_lost > self.cluster.max_failures:
                    raise
            self.say("The Ray job was lost; starting again with what is not answered yet.")

    def _orders(self, job: AskJob, client: JobsClient) -> Orders:
        flow = own_installation()

        def make(launch: str) -> JobOrder:
            return JobOrder(cluster=self.cluster, spec=self._spec(job, launch), flow=flow)

        return Orders(job.scratch, client, make, self.say, self.check, self.patience_s)

    def _spec(self, job: AskJob, launch: str) -> AskSpec:
        return AskSpec(job=job, launch=launch, log=job.scratch / LOG_FILE)


@dataclass
class ReplyVoice:
    """All that an evaluation writes down, from each of its attempts in turn."""

    follower: ReplyFollower
    log: LogTeller
    heard_at: float = field(default_factory=time.monotonic, init=False)
    """When the last reply came; at first, when listening began."""

    @classmethod
    def of(
        cls, job: AskJob, on_reply: Callable[[Reply], None], say: Callable[[str], None]
    ) -> "ReplyVoice":
        """Listen to ``job``: all of its replies, and of its log what comes from now on."""
        follower = ReplyFollower(Tail(job.scratch / REPLIES_FILE), on_reply)
        return cls(follower, LogTeller(job.scratch / LOG_FILE, say))

    @property
    def is_behind(self) -> bool:
        """Whether there may be more replies than could be read."""
        return self.follower.tail.patience.is_behind

    def catch_up(self, *, is_end: bool = False) -> None:
        """Pass on what is new; at the end, what was kept back, too."""
        known = len(self.follower.heard)
        self.follower.catch_up()
        if len(self.follower.heard) > known:
            self.heard_at = time.monotonic()
        self.log.catch_up(is_end=is_end)

    def recall(self) -> None:
        """Tell the end of the log as it was."""
        self.log.recall()
