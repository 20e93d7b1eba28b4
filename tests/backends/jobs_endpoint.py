"""A Ray Jobs endpoint without a Ray: the HTTP of it is real, jobs do what a test tells them to."""

import itertools
import json
import re
import shlex
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from qlora_core.backends import ray_job_orders, ray_job_watch
from qlora_core.backends.ray_job_order import JobOrder
from qlora_core.backends.ray_job_patience import OutOfReachError
from qlora_core.backends.replies import Replies
from qlora_core.errors import QLoraError
from qlora_core.ports import Batch, Reply
from qlora_core.training.desk import SUMMARY_FILE
from qlora_core.training.journal import JOURNAL_FILE, Journal
from tests.training.steps import step_metrics

LIVE = ("PENDING", "RUNNING")


class CancelledError(Exception):
    """What a run that is cancelled raises."""


def hasten(monkeypatch) -> None:
    """Let nobody pause for seconds, or send a token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for name in ("_ASK_S", "_GRACE_S", "_SHARED_S", "_PAUSE_S"):
        monkeypatch.setattr(ray_job_watch, name, 0.02)
    monkeypatch.setattr(ray_job_orders, "_PAUSE_S", 0.02)
    as_another_process(monkeypatch)


def as_another_process(monkeypatch) -> None:
    """Forget what a process knows of endpoints."""
    monkeypatch.setattr(ray_job_orders, "_LET_IN", set())


def at_check(**actions: Callable[[], object]) -> Callable[[], None]:
    """Return a check that does something when it is called for the n-th time: ``c5=...``."""
    numbers = itertools.count(1)

    def check() -> None:
        actions.get(f"c{next(numbers)}", lambda: None)()

    return check


def throwing(error: BaseException) -> Callable[[], None]:
    """Return what raises an error when it is called."""

    def throw() -> None:
        raise error

    return throw


def raising(error: BaseException, number: int = 6) -> Callable[[], None]:
    """Return a check that ends a run, if nothing else is said soon after its job was submitted."""
    return at_check(**{f"c{number}": throwing(error)})


def death() -> Callable[[], None]:
    """Return a check that ends a run as its process's death would, as far as a thread can."""
    return raising(OutOfReachError("dead"))


@dataclass
class Endpoint:
    """What the cluster knows, and what the test wants of it."""

    token: str | None = None
    answers: int | None = None
    """A status that requests are answered with, and a text that is no JSON."""
    answers_to: str = ""
    """Only to requests that begin so, as `POST /api/jobs`."""
    late_s: float | None = None
    """A submission is answered with 504, and carried out so much later."""
    on_submit: Callable[[JobOrder], None] = lambda _: None
    jobs: dict[str, dict[str, str]] = field(default_factory=dict)
    orders: dict[str, JobOrder] = field(default_factory=dict)
    environments: list[dict] = field(default_factory=list)
    packages: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def set(self, name: str, status: str, message: str = "") -> None:
        self.jobs[name] = {"submission_id": name, "status": status, "message": message}

    def submit(self, asked: dict) -> None:
        name = asked["submission_id"]
        order = JobOrder.model_validate_json(Path(shlex.split(asked["entrypoint"])[-1]).read_text())
        self.orders[name] = order
        self.environments.append(asked["runtime_env"])
        self.set(name, "RUNNING")
        self.on_submit(order)

    def write_steps(self, order: JobOrder, *numbers: int) -> None:
        """Do what a training does while it runs."""
        journal = Journal(order.spec.job.scratch / JOURNAL_FILE, map(step_metrics, numbers))
        journal.close()

    def finish(self, order: JobOrder, num_steps: int = 3) -> None:
        """Do what a training does to the end."""
        self.write_steps(order, *range(1, num_steps + 1))
        order.spec.job.out.mkdir()
        (order.spec.job.out / "adapter").write_text(order.spec.launch)
        (order.spec.job.scratch / SUMMARY_FILE).write_text("{}")
        order.leave_answer(None)
        self.set(order.submission_id, "SUCCEEDED")

    def reply(self, order: JobOrder, *numbers: int) -> None:
        """Do what an evaluation does while it runs: answer batches of one row each."""
        replies = Replies(order.spec.replies_file)
        for number in numbers:
            replies.keep(Reply(batch=Batch(kind="loss", numbers=(number,)), nats=(0.5,)))

    def finish_asking(self, order: JobOrder, *numbers: int) -> None:
        """Do what an evaluation does to the end."""
        self.reply(order, *numbers)
        order.leave_answer(None)
        self.set(order.submission_id, "SUCCEEDED")

    def fail(self, order: JobOrder, error: QLoraError) -> None:
        order.leave_answer(error)
        self.set(order.submission_id, "FAILED")


class Handler(BaseHTTPRequestHandler):
    """One request; the class attribute is set for each server."""

    endpoint: Endpoint

    def handle_all(self) -> None:
        endpoint, length = self.endpoint, int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        endpoint.asked.append(f"{self.command} {self.path}")
        if endpoint.answers and endpoint.asked[-1].startswith(endpoint.answers_to):
            return self.reply(endpoint.answers, "Traceback:\n  RuntimeError: the head is away\n.")
        if (
            endpoint.token
            and (got := self.headers.get("Authorization")) != f"Bearer {endpoint.token}"
        ):
            return self.reply(403 if got else 401, "Unauthorized")
        return self.route(body)

    do_GET = do_POST = do_PUT = handle_all

    def route(self, body: bytes) -> None:
        endpoint, jobs = self.endpoint, self.endpoint.jobs
        asked = re.match(r"/api/(?:jobs|packages/gcs)/([^/]*)/?(.*)", self.path)
        name, what = asked.groups() if asked else ("", "")
        if self.path == "/api/version":
            return self.reply(200, {"ray_version": "2.60.0"})
        if self.path.startswith("/api/packages"):
            if self.command == "PUT":
                endpoint.packages[name] = body
            return self.reply(200 if name in endpoint.packages else 404, "")
        if self.path == "/api/jobs/" and self.command == "GET":
            return self.reply(200, [*jobs.values(), {"submission_id": None, "status": "RUNNING"}])
        if self.path == "/api/jobs/":
            asked = json.loads(body)
            if asked["submission_id"] in jobs:
                return self.reply(500, "ValueError: Job already exists. Use a different id.\n.")
            if endpoint.late_s is not None:
                threading.Timer(endpoint.late_s, endpoint.submit, (asked,)).start()
                return self.reply(504, "the upstream takes its time")
            endpoint.submit(asked)
            return self.reply(200, asked)
        if name not in jobs:
            return self.reply(404, f"Job {name} does not exist")
        if what == "stop" and jobs[name]["status"] in LIVE:
            endpoint.set(name, "STOPPED")
        return self.reply(200, jobs[name])

    def reply(self, status: int, said: object) -> None:
        text = said if isinstance(said, str) else json.dumps(said)
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("Location", "https://elsewhere.example/api")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@contextmanager
def serving(endpoint: Endpoint) -> Iterator[Endpoint]:
    """Answer on a port of this machine until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Handler,), {"endpoint": endpoint}))
    endpoint.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
