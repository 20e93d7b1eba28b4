"""A real Ray cluster of one node with its dashboard, for tests of what it does with jobs."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from qlora_core.backends import process_session
from qlora_core.backends.ray_job_order import submission_stem
from qlora_core.backends.ray_jobs_client import JobsClient


def wait_until(condition, timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@dataclass(frozen=True)
class Head:
    address: str
    process: psutil.Process

    def running(self, *texts: str) -> list[str]:
        """The commands of its processes that train: drivers of jobs, and workers."""
        wanted = texts or ("ray_job_entry", "RayTrainWorker", "TrainController")
        return list(self.processes(*wanted).values())

    def processes(self, *texts: str) -> dict[psutil.Process, str]:
        """Its processes with one of ``texts`` in their command, and that."""
        found = {}
        for child in self.process.children(recursive=True):
            with suppress(psutil.Error):  # it ended meanwhile
                command = " ".join(child.cmdline())
                if any(text in command for text in texts):
                    found[child] = command
        return found

    def jobs_of(self, scratch: Path) -> dict[str, str]:
        """The states of the jobs for a scratch folder, by the number of their launch."""
        opening = submission_stem(scratch.resolve())
        known = JobsClient(self.address).jobs()
        return {
            found.submission_id[len(opening) :]: found.status
            for found in sorted(known, key=lambda job: job.submission_id or "")
            if (found.submission_id or "").startswith(opening)
        }


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports


@contextmanager
def jobs_head() -> Iterator[Head]:
    """A Ray of somebody else's with two CPUs, a dashboard and a token; it ends with the block."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "token")
        environment.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        environment.setenv(
            "PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        )
        temp = tempfile.mkdtemp(prefix="rj-", dir="/tmp")
        names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
        names += ("dashboard-agent-grpc-port", "metrics-export-port")
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        options = [f"--{name}={port}" for name, port in ports.items()]
        options += ["--head", "--block", "--num-cpus=2", "--include-dashboard=true"]
        options += [f"--temp-dir={temp}", "--object-store-memory=80000000"]
        with (Path(temp) / "head.log").open("wb") as log:
            started = subprocess.Popen(
                [Path(sys.executable).with_name("ray"), "start", *options],
                start_new_session=True,
                stdout=log,
                stderr=log,
                cwd=temp,
            )
        address = f"http://127.0.0.1:{ports['dashboard-port']}"
        try:
            JobsClient(address).require_usable(patience_s=90)
            yield Head(address, psutil.Process(started.pid))
        finally:
            process_session.end(started.pid, patience_s=5.0)
            started.wait()
            shutil.rmtree(temp, ignore_errors=True)
