"""Ask a model on the workers of a cluster: start a driver process, follow the replies it keeps.

As in training, three layers catch faults: the driver replaces lost workers, this replaces a lost
driver, and running the same recipe again replaces a lost launcher. All go on from the replies that
are in the stage's scratch folder. Nothing of Ray is imported here.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from qlora_core.backends.ray_address import reach_ray
from qlora_core.backends.ray_asker import AskSpec
from qlora_core.backends.ray_process import DriverProcess, start_driver
from qlora_core.backends.replies import parsed
from qlora_core.backends.triage import LostDriverError
from qlora_core.config import ClusterConfig
from qlora_core.errors import HeadLostError, LaunchError, from_json
from qlora_core.ports import AskJob, Batch, Reply
from qlora_core.training.journal import LOG_FILE, Tail

_POLL_S = 0.1
_PATIENCE_S = 60.0  # until a person is told that nothing has come yet


def has_crew(cluster: ClusterConfig) -> bool:
    """Say whether a cluster evaluates: a running one, which may have GPUs that are not here."""
    return cluster.address is not None


@dataclass(frozen=True)
class RayCrew:
    """Workers on a running cluster."""

    cluster: ClusterConfig
    say: Callable[[str], None]
    """Told what a person should know, once."""
    check: Callable[[], None] = lambda: None
    """Called several times a second; what it raises ends the evaluation and frees its workers."""

    def ask(self, job: AskJob, on_reply: Callable[[Reply], None]) -> None:
        """Ask everything, calling ``on_reply`` once for each batch, in any order.

        Raises:
            UserError: Nobody answers at the address of the cluster, and nobody ever has.
            HeadLostError: Nobody answers there any more.
            ClusterError: Nodes are not ready for it.
            ResourceError: The cluster has not what was asked for.
            StoreError: There is no room for replies, say.
            LaunchError: Workers or drivers were lost more often than `cluster.max_failures`.
            QLoraError: What a worker met.
        """
        job = job.absolute()
        job.scratch.mkdir(parents=True, exist_ok=True)
        spec = AskSpec(job=job, log=job.scratch / LOG_FILE)
        follower = ReplyFollower(Tail(spec.replies_file), on_reply)
        for _ in range(self.cluster.max_failures + 1):
            reach_ray(self.cluster, job.scratch, self.say, self.check)
            if self._launch(spec, follower):
                return
            self.say("Ray's driver process was lost; starting again with what is not answered yet.")
        raise LaunchError(
            f"Ray's driver was lost more than cluster.max_failures={self.cluster.max_failures} "
            "times.",
            fix=f"Run again: what was answered is kept. The log: {spec.log}",
        )

    def _launch(self, spec: AskSpec, follower: "ReplyFollower") -> bool:
        """Run one driver; return whether it finished, False if it was lost."""
        driver = start_driver(self.cluster, spec.log)
        try:
            driver.give(spec)
            return self._watch(driver, follower)
        except (LostDriverError, HeadLostError):  # it says so itself: its line to Ray broke
            return False
        finally:
            driver.end()

    def _watch(self, driver: DriverProcess, follower: "ReplyFollower") -> bool:
        impatient_at = time.monotonic() + _PATIENCE_S
        is_over = False
        while not is_over or follower.tail.patience.is_behind:
            is_over = driver.has_answered()
            self.check()
            follower.catch_up()
            if time.monotonic() > impatient_at and not follower.heard:
                self.say(f"no worker of {self.cluster.address} has answered yet; still waiting")
                impatient_at = float("inf")
            time.sleep(_POLL_S)
        outcome = driver.outcome()
        if outcome:
            raise from_json(outcome)
        return outcome is not None


@dataclass(frozen=True)
class ReplyFollower:
    """Passes replies on, each batch once."""

    tail: Tail
    on_reply: Callable[[Reply], None]
    heard: set[Batch] = field(default_factory=set)

    def catch_up(self) -> None:
        """Pass on what is new."""
        for line in self.tail.lines():
            reply = parsed(line)
            if reply is not None and reply.batch not in self.heard:
                self.heard.add(reply.batch)
                self.on_reply(reply)
