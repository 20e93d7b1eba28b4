"""Which order is being carried out for a scratch folder: found in the store and on the cluster.

The store knows the last order and its answer, the cluster which jobs live. An order whose job runs
is followed, one that was answered is taken for done, and any other job for the folder is of an
attempt that is over: it is stopped. Where an order was given, a job may be at it, so an endpoint
that is away or odd is waited for; where none was, its refusal is told at once.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from qlora_core.backends.ray_job_order import JobOrder, order_file, submission_stem
from qlora_core.backends.ray_job_patience import EndpointPatience
from qlora_core.backends.ray_jobs_client import ClusterAwayError, JobsClient, RayJob
from qlora_core.config import ClusterConfig
from qlora_core.errors import QLoraError, from_json, storing
from qlora_core.training.attempt import next_launch, read_record
from qlora_core.training.durable import replace_durably

T = TypeVar("T")
_PAUSE_S = 1.0


def open_line(cluster: ClusterConfig, scratch: Path) -> JobsClient:
    """Return a line to the endpoint that is ``cluster.address``, and make the folder for orders.

    Raises:
        UserError: Nobody answers at the address, or not to our token.
        StoreError: The folder cannot be made.
    """
    client = JobsClient(str(cluster.address))
    client.require_usable()
    with storing(scratch):
        scratch.mkdir(parents=True, exist_ok=True)
    return client


@dataclass(frozen=True)
class Orders:
    """Finds the order that is being carried out for a scratch folder, or writes a new one."""

    scratch: Path
    client: JobsClient
    make: Callable[[str], JobOrder]
    """Returns the order of a launch, by its name."""
    say: Callable[[str], None]
    check: Callable[[], None]
    """Called while the endpoint is waited for."""
    patience_s: float

    def found(self) -> JobOrder | None:
        """Return the order whose job runs or has finished; stop jobs of any other.

        Raises:
            OutOfReachError: The endpoint stayed away, or odd; jobs are left alone.
            QLoraError: It will not answer, and no order was given yet.
            StoreError: It cannot be seen which that is; none is stopped.
        """
        known = self._known()
        order = self._last()
        for name, job in known.items():
            if not job.is_over and not _is_carried_out_by(order, name):
                self.say(f"Ray job {name} is of an attempt that is over; stopping it.")
                self._patiently(partial(self.client.stop, name))
        if order is None:
            return None
        answer = order.answer()
        if answer is None:
            return self._running(order, known.get(order.submission_id))
        if answer:
            self.say(f"Ray job {order.submission_id} has failed: {from_json(answer).what}")
            return None
        if not order.has_result:
            self.say(f"Ray job {order.submission_id} has finished, but its result is gone.")
            return None
        self.say(f"Ray job {order.submission_id} has finished meanwhile; its result is used.")
        return order

    def written(self) -> JobOrder:
        """Write a new order, under an id that the cluster has not seen."""
        known = self._known()
        order = self.make(next_launch(self.scratch))
        while order.submission_id in known:  # the store forgets what it sealed, the cluster not
            order = self.make(next_launch(self.scratch))
        file = order_file(self.scratch, order.spec.launch)
        replace_durably(file, order.model_dump_json(indent=1).encode())
        return order

    def _known(self) -> dict[str, RayJob]:
        """Return the jobs for our scratch folder, by id."""
        ids = {job.submission_id or "": job for job in self._patiently(self.client.jobs)}
        opening = submission_stem(self.scratch)
        return {name: job for name, job in ids.items() if name.startswith(opening)}

    def _patiently(self, ask: Callable[[], T]) -> T:
        about = f"the jobs for {self.scratch}"
        patience = EndpointPatience(self.client.address, about, self.say, self.patience_s)
        while True:
            try:
                answer = ask()
                patience.rest()
                return answer
            except QLoraError as error:
                if self._last() is None and not isinstance(error, ClusterAwayError):
                    raise
                patience.bear(error)
            self.check()
            time.sleep(_PAUSE_S)

    def _last(self) -> JobOrder | None:
        file = order_file(self.scratch, read_record(self.scratch).launch)
        with storing(file, "read"):  # its job would be taken for one of an attempt that is over
            try:
                return JobOrder.model_validate_json(file.read_text("utf-8"))
            except (FileNotFoundError, ValueError):  # none, or of another version of this project
                return None

    def _running(self, order: JobOrder, job: RayJob | None) -> JobOrder | None:
        if job is None or job.is_over or not _is_carried_out_by(order, order.submission_id):
            return None
        self.say(f"Ray job {order.submission_id} is {job.status.lower()}; attached to it.")
        made = self.make(order.spec.launch)
        if (made.cluster, made.spec) != (order.cluster, order.spec):
            self.say(
                "It goes by the cluster and snapshot settings it was started with; those of this "
                "recipe count from the next attempt."
            )
        return order


def _is_carried_out_by(order: JobOrder | None, name: str) -> bool:
    """Say whether that job is the one to follow, if it lives; one with an error only winds up."""
    if order is None or name != order.submission_id:
        return False
    return order.final_error() is None
