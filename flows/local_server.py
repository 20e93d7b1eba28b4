"""One detached web server per home: found if it runs, started if it does not, stopped by its pid.

Six commands may ask at the same moment, and any of them may be killed at any moment. So the
question is asked under `flock` (the kernel lets go of it when its holder dies), the answer is a
small file, written as soon as the server's process exists so that none is ever lost sight of, and
a recorded pid is believed only together with the moment its process started: pids are used again.

A port is kept for the next start, so an address in a browser's history stays good; when somebody
else has it by then, the next free one is taken. Seconds pass between looking for a free port and
listening there, so another home's server may be quicker: then it is theirs, and we look again.
"""

import errno
import fcntl
import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import ValidationError

from qlora_core.artifacts import Frozen
from qlora_core.errors import LaunchError, storage_error, storing

LOOPBACK = "127.0.0.1"
_PORTS_TRIED = 100
_STARTS_TRIED = 5
_PATIENCE_S = 60.0  # with a recorded server that runs but does not answer: still starting, or stuck
_TAIL_CHARS = 1500
_IN_USE = os.strerror(errno.EADDRINUSE).lower()


class Running(Frozen):
    """A server that was started, as its record says."""

    pid: int
    process_started: float
    """Seconds since 1970, as the system says; tells this process from a later one of that pid."""
    port: int

    @property
    def url(self) -> str:
        """Address on this machine."""
        return f"http://{LOOPBACK}:{self.port}"


@dataclass(frozen=True)
class ServerKind:
    """How a kind of server is started, and how it is known to be ours and well."""

    name: str
    first_port: int
    command: Callable[[int], list[str]]
    """Port to command line."""
    environment: Mapping[str, str]
    answers: Callable[[str], bool]
    """Address to: our own server answers there."""
    timeout_s: float = 180.0


def ensure(kind: ServerKind, folder: Path) -> Running:
    """Return the running server of this kind, starting it if none answers.

    Raises:
        LaunchError: It did not come up; the end of its log is in the message.
        StoreError: ``folder`` cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(folder / f"{kind.name}.lock"):
            last = _recorded(kind, folder)
            if last and _comes_up(kind, last, _PATIENCE_S):
                return last
            if last:
                _end(last)
            return _start(kind, folder, last.port if last else kind.first_port)
    except OSError as error:
        raise storage_error(error, folder) from error


def status(kind: ServerKind, folder: Path) -> Running | None:
    """Return the recorded server if it runs and answers."""
    last = _recorded(kind, folder)
    return last if last and _is_well(kind, last) else None


def stop(name: str, folder: Path) -> bool:
    """End the recorded server of that name; say whether there was one."""
    path = folder / f"{name}.json"
    if not path.exists():
        return False
    with _locked(folder / f"{name}.lock"):
        running = _read(path)
        path.unlink(missing_ok=True)
        return _end(running) if running else False


def secret(path: Path) -> str:
    """Return the secret kept in ``path``, made on the first call; only its owner can read it.

    Raises:
        StoreError: Its folder cannot be written.
    """
    with storing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(path.with_suffix(".lock")):
            if not path.exists():
                _write_private(path, secrets.token_urlsafe(24))
            return path.read_text(encoding="utf-8")


def _start(kind: ServerKind, folder: Path, port: int) -> Running:
    log = folder / f"{kind.name}.log"
    for _ in range(_STARTS_TRIED):
        port = _free_port(port)
        process, running = _launch(kind, folder, port, log)
        if _comes_up(kind, running, kind.timeout_s):
            return running
        code = process.poll()
        _end(running)
        if not _was_taken(port, log):
            break  # the server failed for a reason of its own
    raise LaunchError(
        f"the local {kind.name} server "
        + ("never answered." if code is None else f"ended with code {code}."),
        why=log.read_text(errors="replace")[-_TAIL_CHARS:].strip(),
        fix=f"Its whole log is {log}; `qlora doctor` tries it out by itself.",
    )


def _launch(
    kind: ServerKind, folder: Path, port: int, log: Path
) -> tuple[subprocess.Popen[bytes], Running]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            kind.command(port),
            env=dict(kind.environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    started = psutil.Process(process.pid).create_time()
    running = Running(pid=process.pid, process_started=started, port=port)
    _write_private(folder / f"{kind.name}.json", running.model_dump_json())
    return process, running


def _was_taken(port: int, log: Path) -> bool:
    """Say whether somebody was quicker; they may have gone since, so the log is asked as well."""
    return _free_port(port) != port or _IN_USE in log.read_text(errors="replace").lower()


def _comes_up(kind: ServerKind, running: Running, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while _process(running) and time.monotonic() < deadline:
        if _is_well(kind, running):
            return True
        time.sleep(0.1)
    return False


def _is_well(kind: ServerKind, running: Running) -> bool:
    return kind.answers(running.url) and _listens(running)


def _listens(running: Running) -> bool:
    """Say whether it is this server that has the port: another home's may answer just as well."""
    leader = _process(running)
    try:
        family = [leader, *leader.children(recursive=True)] if leader else []
        connections = [c for process in family for c in process.net_connections(kind="tcp")]
    except psutil.NoSuchProcess:  # it ended while it was asked
        return False
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == running.port for c in connections)


def _process(running: Running) -> psutil.Process | None:
    try:
        process = psutil.Process(running.pid)
        same = abs(process.create_time() - running.process_started) < 1.0
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _end(running: Running) -> bool:
    leader = _process(running)
    if leader is None:
        return False
    family = [leader, *leader.children(recursive=True)]
    for process in family:
        _signal(process.terminate)
    for process in psutil.wait_procs(family, timeout=10)[1]:
        _signal(process.kill)
    psutil.wait_procs(family, timeout=5)
    return True


def _signal(send: Callable[[], None]) -> None:
    try:
        send()
    except psutil.NoSuchProcess:
        return  # it went by itself


def _recorded(kind: ServerKind, folder: Path) -> Running | None:
    return _read(folder / f"{kind.name}.json")


def _read(path: Path) -> Running | None:
    try:
        return Running.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError, ValidationError):
        return None


def _free_port(first: int) -> int:
    for port in range(first, first + _PORTS_TRIED):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    raise LaunchError(f"no free port between {first} and {first + _PORTS_TRIED - 1}.")


def _write_private(path: Path, text: str) -> None:
    made = path.with_name(f"{path.name}.{os.getpid()}.new")
    with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    made.replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as handle:
        fcntl.flock(handle.fileno(), fcntl.LOCK_EX)
        yield
