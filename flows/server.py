"""The Prefect server that the command line owns, and the MLflow UI on this machine's store.

Prefect can start a server for each process by itself, but six runs at once then fail at each
other's migrations; so there is one per home, for all runs. It is uvicorn on Prefect's app and not
`prefect server start`: the same server without the command line on top of it, ready in 4 s and
not in 10. It listens on loopback and wants a password, which lies beside it for its owner alone.

MLflow needs no server to be written to (SQLite), so its own is started only to look at. It has no
password: it listens on loopback, serves no uploads, and runs no jobs.
"""

import base64
import fcntl
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flows import local_server
from flows.local_server import LOOPBACK, Running, ServerKind
from qlora_core.errors import LaunchError, UserError

_ASK_TIMEOUT_S = 5.0
_NO_PROXY = ("NO_PROXY", "no_proxy")  # some clients read the one first, some the other
_USERS = "users.lock"  # shared by the runs that go on
_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "VIRTUAL_ENV", "PYTHONPATH")


@dataclass(frozen=True)
class Connection:
    """How to reach a Prefect server."""

    api_url: str
    auth: str | None = field(default=None, repr=False)
    """`user:password`, if it wants one; never logged."""

    @property
    def ui_url(self) -> str:
        """Address for a browser."""
        return self.api_url.removesuffix("/").removesuffix("/api")

    def environment(self) -> dict[str, str]:
        """Return the variables with which another process reaches the same server."""
        auth = {"PREFECT_API_AUTH_STRING": self.auth} if self.auth else {}
        given = ",".join(os.environ.get(name, "") for name in _NO_PROXY).split(",")
        hosts = ",".join(dict.fromkeys([*filter(None, given), LOOPBACK, "localhost"]))
        return {"PREFECT_API_URL": self.api_url, **dict.fromkeys(_NO_PROXY, hosts), **auth}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Talk to this server, in this process and in what it starts, until the block ends."""
        variables = self.environment()
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        from prefect.settings import (
            PREFECT_API_AUTH_STRING,
            PREFECT_API_URL,
            PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
            temporary_settings,
        )

        settings = {
            PREFECT_API_URL: self.api_url,
            PREFECT_API_AUTH_STRING: self.auth,
            PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: False,
        }
        try:
            with temporary_settings(settings):
                yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def ensure_server(home: Path) -> Connection:
    """Return a Prefect server that answers: `PREFECT_API_URL`'s, or this home's own.

    Raises:
        LaunchError: None answers and none could be started.
    """
    if url := os.environ.get("PREFECT_API_URL"):
        if not _responds(f"{url.removesuffix('/')}/health"):
            raise LaunchError(
                f"PREFECT_API_URL={url} does not answer.",
                fix="Start that server, or unset PREFECT_API_URL to use one of this machine's own.",
            )
        return Connection(url, os.environ.get("PREFECT_API_AUTH_STRING"))
    auth = _auth(home)
    running = local_server.ensure(_prefect(home, auth), home / "server")
    return Connection(f"{running.url}/api", auth)


def server_status(home: Path) -> Connection | None:
    """Return this home's own Prefect server if it runs."""
    if not (home / "server" / "prefect.json").exists():
        return None
    auth = _auth(home)
    running = local_server.status(_prefect(home, auth), home / "server")
    return Connection(f"{running.url}/api", auth) if running else None


@contextmanager
def server_kept(home: Path) -> Iterator[None]:
    """Keep `stop_server` from ending this home's own server until the block, or the process, ends.

    The kernel remembers who is inside, so a killed process is not.
    """
    if not (home / "server" / "prefect.json").exists():
        yield  # it is somebody else's server
        return
    with (home / "server" / _USERS).open("a") as handle:
        fcntl.flock(handle.fileno(), fcntl.LOCK_SH)
        yield


def stop_server(home: Path, *, force: bool = False) -> bool:
    """End this home's own Prefect server; say whether there was one.

    Raises:
        UserError: A run goes on, and is not to be broken by ``force``.
    """
    if not force and _is_kept(home):
        raise UserError(
            "a run is going on, on this Prefect server.",
            why="Without its server it would fail.",
            fix="Wait for it, or end it with Ctrl-C. To end the server all the same: "
            "qlora ui --stop --force",
        )
    return local_server.stop("prefect", home / "server")


def _is_kept(home: Path) -> bool:
    path = home / "server" / _USERS
    if not path.exists():
        return False
    with path.open("a") as handle:
        try:
            fcntl.flock(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def ensure_mlflow_ui(home: Path, tracking_uri: str) -> str:
    """Return an address where MLflow's UI shows ``tracking_uri``, starting a server if need be.

    Raises:
        LaunchError: None could be started.
    """
    if tracking_uri.startswith(("http://", "https://")):
        return tracking_uri
    return local_server.ensure(_mlflow(tracking_uri), home / "server").url


def mlflow_ui_status(home: Path, tracking_uri: str) -> Running | None:
    """Return this home's MLflow UI if it runs."""
    return local_server.status(_mlflow(tracking_uri), home / "server")


def stop_mlflow_ui(home: Path) -> bool:
    """End this home's MLflow UI; say whether there was one."""
    return local_server.stop("mlflow", home / "server")


def _auth(home: Path) -> str:
    return "qlora:" + local_server.secret(home / "server" / "prefect.secret")


def _prefect(home: Path, auth: str) -> ServerKind:
    app = "prefect.server.api.server:create_app"
    uvicorn = [sys.executable, "-m", "uvicorn", "--factory", app, "--host", LOOPBACK]
    quiet = ["--log-level", "warning", "--timeout-keep-alive", "5"]
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_API_AUTH_STRING": auth,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "PREFECT__SERVER_FINAL": "1",
        "DO_NOT_TRACK": "1",
    }
    return ServerKind(
        name="prefect",
        first_port=4200,
        command=lambda port: [*uvicorn, "--port", str(port), *quiet],
        environment=environment,
        answers=lambda url: _responds(f"{url}/api/admin/version", auth, only=200),
    )


def _mlflow(tracking_uri: str) -> ServerKind:
    server = [sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--workers", "1"]
    store = ["--backend-store-uri", tracking_uri, "--no-serve-artifacts"]
    environment = dict(os.environ) | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    return ServerKind(
        name="mlflow",
        first_port=5000,
        command=lambda port: [*server, "--port", str(port), *store],
        environment=environment,
        answers=lambda url: _responds(f"{url}/version", only=200),
    )


def _responds(url: str, auth: str | None = None, only: int | None = None) -> bool:
    request = urllib.request.Request(url)  # noqa: S310  # http to a server that we or the user named
    if auth:
        request.add_header("Authorization", f"Basic {base64.b64encode(auth.encode()).decode()}")
    direct = [urllib.request.ProxyHandler({})] if LOOPBACK in url or "localhost" in url else []
    try:
        with urllib.request.build_opener(*direct).open(request, timeout=_ASK_TIMEOUT_S) as reply:
            return only is None or reply.status == only
    except urllib.error.HTTPError:
        return only is None
    except OSError:
        return False
