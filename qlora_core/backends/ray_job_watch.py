"""One Ray job from the flow's side: start it, follow it, stop it.

What happens is read from the store: journal, notes, log, answer. The endpoint is asked only every
few seconds whether the job still runs, so it may be away for minutes and nothing is lost but
knowledge; patience with it counts from the last step that was seen.
"""

import os
import re
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from qlora_core.backends.ray_job_order import JobOrder, found_last_word, order_file
from qlora_core.backends.ray_job_patience import EndpointPatience, OutOfReachError
from qlora_core.backends.ray_jobs_client import (
    ClusterAwayError,
    JobsClient,
    RayJob,
    RefusedError,
)
from qlora_core.backends.ray_package import package
from qlora_core.backends.ray_process import TRAIN_SETTINGS
from qlora_core.backends.ray_voice import Voice, last_lines
from qlora_core.backends.triage import LostDriverError
from qlora_core.errors import (
    QLoraError,
    ResourceError,
    StoreAwayError,
    TrainingError,
    UserError,
    from_json,
)
from qlora_core.training.journal import Patience

STOP_S = 15.0
"""How long a job that was told to stop is watched."""
_POLL_S = 0.1
_ASK_S = 2.0
_PAUSE_S = 1.0
_GRACE_S = 3.0  # from the end of a job to its answer, where the store is a network's
_SHARED_S = 60.0  # such a file system may hide a new file that long
_UNUSABLE = re.compile(r"ModuleNotFoundError: .*|ImportError: .*|\S+: (?:command )?not found")


@dataclass
class JobWatch:
    """Follows one order."""

    order: JobOrder
    client: JobsClient
    voice: Voice
    say: Callable[[str], None]
    check: Callable[[], None]
    patience_s: float
    _patience: EndpointPatience = field(init=False)
    _ask_at: float = field(default=0.0, init=False)
    _over_since: float | None = field(default=None, init=False)
    _looks: Patience = field(default_factory=Patience, init=False)
    _may_run: bool = field(default=False, init=False)
    """It was asked for, be it that nobody knows whether that was heard."""
    _is_known: bool = field(default=False, init=False)
    """The cluster has said that there is such a job."""

    def __post_init__(self) -> None:
        about = f"Ray job {self.order.submission_id}"
        self._patience = EndpointPatience(self.client.address, about, self.say, self.patience_s)

    def run(self, *, is_new: bool) -> None:
        """Follow the job until its result is there.

        Args:
            is_new: Nobody has submitted it yet.

        Raises:
            OutOfReachError: The endpoint stayed away, or odd; the job is left alone.
            StoreAwayError: The store was out of reach for long; the job is left alone as well.
            LostDriverError: The job is over, and nobody knows why.
            QLoraError: What the job ended with, or what ``check`` raises; the job is stopped.
        """
        self._may_run = self._is_known = not is_new
        try:
            if is_new:
                self._submit()
            else:
                self.voice.recall()
            self._follow()
        except (OutOfReachError, StoreAwayError):  # ours: of the job, the next launch takes care
            raise
        except BaseException:
            self._stop()
            raise
        finally:
            self.voice.catch_up(is_end=True)

    def _submit(self) -> None:
        while True:
            self.check()
            try:
                self._send([self.client.upload(*package())])
                self.say(f"Ray job {self.order.submission_id} does it, at {self.client.address}")
                return
            except ClusterAwayError as error:
                self._be_patient(error)
                time.sleep(_PAUSE_S)

    def _send(self, modules: list[str]) -> None:
        """Ask for the job; whatever interrupts that, the request may be on its way."""
        spec, before = self.order.spec, self._may_run
        entry = "exec python -P -m qlora_core.backends.ray_job_entry "
        file = order_file(spec.job.scratch, spec.launch)
        environment = {"py_modules": modules, "env_vars": environment_of_jobs()}
        self._may_run = True
        try:
            name = self.order.submission_id
            self.client.submit(name, entry + shlex.quote(str(file)), environment)
        except (UserError, RefusedError):  # this request has started nothing; one before may have
            self._may_run = before
            raise
        self._is_known = True

    def _follow(self) -> None:
        while not self._is_answered():
            self.check()
            self.voice.catch_up()
            if time.monotonic() >= self._ask_at:
                self._ask_at = time.monotonic() + _ASK_S
                self._require_alive()
            time.sleep(_POLL_S)

    def _is_answered(self) -> bool:
        """Say whether the job is done.

        Raises:
            QLoraError: It is, and this is how.
        """
        if error := self._looks.look(self.order.final_error):
            raise error
        answer = self._looks.look(self.order.answer)
        if answer is None:
            return False
        self.voice.catch_up()
        if self.voice.is_behind:
            return False  # with the next look, all steps
        if answer:
            raise from_json(answer)
        return True

    def _require_alive(self) -> None:
        """Raise if the job is over without an answer, or if nobody has known for too long."""
        try:
            job = self.client.job(self.order.submission_id)
        except QLoraError as error:  # a token that ran out, a proxy's page: the job knows nothing
            self._be_patient(error)
            return
        self._patience.rest()
        is_over = job is None or job.is_over
        if not is_over or self._looks.is_behind or self.voice.is_behind:
            self._over_since = None  # as long as the store is away, it may hold an answer
            return
        self._over_since = self._over_since or time.monotonic()
        is_done = job is not None and job.status == "SUCCEEDED"
        if time.monotonic() - self._over_since >= (_SHARED_S if is_done else _GRACE_S):
            raise _end_of(self.order, job)

    def _be_patient(self, error: QLoraError) -> None:
        self._patience.bear(error, self.voice.heard_at)

    def _stop(self) -> None:
        if self._may_run:
            stop_job(self.order.submission_id, self.client, self.say, is_known=self._is_known)


def stop_job(name: str, client: JobsClient, say: Callable[[str], None], *, is_known: bool) -> None:
    """Stop a job, and see it end; say so if it does not.

    Args:
        name: Its submission id.
        client: A line to where it runs.
        say: Told how to stop it by hand.
        is_known: The cluster has said that there is such a job. Where it has not, a request that
            nobody answered may start it seconds later: it is looked for until then.
    """
    deadline, reason = time.monotonic() + STOP_S, "it does not end"
    while time.monotonic() < deadline:
        try:
            job = client.job(name)
            if job.is_over if job else is_known:
                return
            if job:
                is_known = True
                client.stop(name)
        except QLoraError as error:  # what ended the run is told, not this
            reason = str(error)
        time.sleep(_PAUSE_S / 2)
    by_hand = f"ray job stop {name} --address {client.address}"
    if is_known:
        say(
            f"Ray job {name} was told to stop, but may still run after {STOP_S:.0f} s "
            f"({reason}). By hand: {by_hand}"
        )
    else:
        say(
            f"Ray job {name} was asked for, and nobody knows whether that was heard: after "
            f"{STOP_S:.0f} s there is none. If `ray job list` shows it later: {by_hand}"
        )


def environment_of_jobs() -> dict[str, str]:
    """Return the variables that jobs and their workers run with; no secret is among them."""
    wanted = {name: os.environ[name] for name in ("HF_HUB_OFFLINE",) if name in os.environ}
    return wanted | TRAIN_SETTINGS


def _end_of(order: JobOrder, job: RayJob | None) -> QLoraError:
    """Return the error of a job that ended without an answer; None: the cluster forgot it."""
    name, said = order.submission_id, (job.message if job else None) or ""
    if job and job.status == "STOPPED":
        return TrainingError(
            f"Ray job {name} was stopped by somebody else than this run.",
            fix="Run again to go on from the last snapshot.",
        )
    if job and job.status == "SUCCEEDED":
        return UserError(
            f"Ray job {name} says that it is done, but there is no {order.answer_file}.",
            why="The store must be one folder, at one path, for the flow and all of the cluster.",
            fix="Mount it on every node, the head included (workspace.store, or QLORAFLOW_HOME).",
        )
    if error := found_last_word(said):
        return error
    if unusable := _UNUSABLE.search(said):
        return ResourceError(
            f"the cluster at {order.cluster.address} cannot run Ray job {name}: {unusable[0]}",
            why="qlora_core is sent there, but not what it imports.",
            fix="Use an image with the packages of this environment, as infra/Dockerfile makes it.",
        )
    return _lost(order, said)


def _lost(order: JobOrder, said: str) -> LostDriverError:
    log = order.spec.log
    with suppress(OSError), log.open("a", encoding="utf-8") as file:
        file.write(f"{said}\n")
    return LostDriverError(
        f"Ray jobs were lost more than cluster.max_failures={order.cluster.max_failures} times. "
        f"The last words of {order.submission_id}:\n{last_lines(log)}",
        fix=f"Run again to go on from the last snapshot. The log: {log}",
    )
