"""Ask a Ray Jobs endpoint over HTTP: which jobs there are, one more, one less.

Ray's own client waits without end for an answer that does not come, says by text alone what went
wrong, and lets RAY_ADDRESS overrule the address it is given. A flow that must notice a cut network,
and stop a job within seconds, needs none of this; so these are the seven requests of Ray's
documented REST interface, each with a time limit, and no Ray is imported.

The token is read from where Ray reads it, at each request, and kept nowhere: not in an attribute,
not in an error. Redirects are refused, because they would take it to another host.

Source: the OpenAPI description in Ray's documentation of job submission.
"""

import http.client
import json
import os
import socket
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qlora_core.artifacts import Frozen
from qlora_core.backends.ray_address import require_jobs_address
from qlora_core.errors import LaunchError, UserError

T = TypeVar("T")
Status = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]

_TIMEOUT_S = 5.0
_UPLOAD_S = 60.0
_PATIENCE_S = 10.0  # a cluster that was started a moment ago
_PAUSE_S = 0.5
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_AWAY = (408, 425, 429, 500, 502, 503, 504, *range(520, 531))
"""The dashboard or a proxy answers, but not who is behind it; 520 to 530 are Cloudflare's."""
_WHO_WE_ARE = (
    "Give the cluster's token through the environment of whoever runs the flow: "
    "RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, or with RAY_AUTH_TOKEN_PATH naming a file that "
    "holds it. It belongs into no recipe."
)


class ClusterAwayError(LaunchError):
    """The endpoint does not answer, or answers that it cannot at the moment."""


class RefusedError(LaunchError):
    """The endpoint answers that it will not."""


class RayJob(Frozen):
    """What the endpoint says of a job."""

    model_config = ConfigDict(extra="ignore")

    submission_id: str | None = None
    """None for drivers that nobody submitted."""
    status: Status
    message: str | None = None
    """Of a job that failed: its last words."""

    @property
    def is_over(self) -> bool:
        """Whether it will do nothing more."""
        return self.status not in ("PENDING", "RUNNING")


@dataclass(frozen=True)
class JobsClient:
    """A line to one endpoint."""

    address: str
    """As in https://head:8265."""
    timeout_s: float = _TIMEOUT_S

    def require_usable(self, patience_s: float = _PATIENCE_S) -> None:
        """Return once the endpoint lets us in.

        Raises:
            UserError: It is no address of an endpoint, nobody answers there, or not to our token.
        """
        require_jobs_address(self.address)
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return self._require_endpoint()
            except ClusterAwayError as error:
                if time.monotonic() >= deadline:
                    raise UserError(
                        f"no Ray Jobs endpoint answers at {self.address}: {error.why}",
                        why="The address is cluster.address of the recipe, or RAY_ADDRESS.",
                        fix="Start that cluster with its dashboard where this machine can reach "
                        "it (`ray start --head --dashboard-host=0.0.0.0`, port 8265), forward "
                        "the port, or correct the address.",
                    ) from error
            time.sleep(_PAUSE_S)

    def jobs(self) -> list[RayJob]:
        """Return all jobs that the cluster remembers.

        Raises:
            ClusterAwayError: No answer.
            QLoraError: An answer that is none: of a proxy, say.
        """
        return self._read(list[RayJob], "/api/jobs/")

    def job(self, submission_id: str) -> RayJob | None:
        """Return one job; None if the cluster does not know it (any more).

        Raises:
            ClusterAwayError: No answer.
            QLoraError: An answer that is none: of a proxy, say.
        """
        try:
            return self._read(RayJob, f"/api/jobs/{submission_id}")
        except _NotFoundError:
            self._require_endpoint()  # a proxy without a cluster behind it finds nothing, either
            return None

    def submit(self, submission_id: str, entrypoint: str, runtime_env: dict[str, Any]) -> None:
        """Start a job, unless one of this name is there already.

        Raises:
            ClusterAwayError: No answer; the job may have been started all the same.
        """
        order = {
            "submission_id": submission_id,
            "entrypoint": entrypoint,
            "runtime_env": runtime_env,
        }
        try:
            self._ask("POST", "/api/jobs/", json.dumps(order).encode())
        except (ClusterAwayError, RefusedError):
            if self.job(submission_id) is None:
                raise

    def stop(self, submission_id: str) -> None:
        """Ask a job to end; one that is over or unknown stays so.

        Raises:
            ClusterAwayError: No answer.
        """
        try:
            self._ask("POST", f"/api/jobs/{submission_id}/stop", b"")
        except _NotFoundError:
            return

    def upload(self, name: str, package: bytes) -> str:
        """Keep a package with the cluster, unless it has it; return its URI.

        Args:
            name: Of the file; it says what is in it, as two of one name are taken for the same.
            package: A zip file.

        Raises:
            ClusterAwayError: No answer.
        """
        place = f"/api/packages/gcs/{name}"
        try:
            self._ask("GET", place)
        except _NotFoundError:
            self._ask("PUT", place, package)
        return f"gcs://{name}"

    def _require_endpoint(self) -> None:
        try:
            if isinstance(self._ask("GET", "/api/version"), dict):
                return
        except _NotFoundError:
            pass
        raise _other_service(self.address)

    def _read(self, kind: type[T], path: str) -> T:
        try:
            return TypeAdapter(kind).validate_python(self._ask("GET", path))
        except ValidationError as error:
            raise _other_service(self.address) from error

    def _ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        """Return the answer, read as JSON if there is any."""
        kind = "application/json" if method == "POST" else "application/octet-stream"
        request = urllib.request.Request(  # noqa: S310  # http(s), see require_jobs_address
            self.address.rstrip("/") + path,
            method=method,
            data=body,
            headers=_token_headers() | ({"Content-Type": kind} if body is not None else {}),
        )
        timeout_s = _UPLOAD_S if method == "PUT" else self.timeout_s
        try:
            with _opener(self.address).open(request, timeout=timeout_s) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None  # the request in it holds the token
        except (OSError, http.client.HTTPException) as error:
            raise self._silence(error) from None
        return _parsed(text, self.address)

    def _refusal(self, error: urllib.error.HTTPError) -> LaunchError | UserError:
        said = _said(error)
        if error.code in (401, 403):
            sent = "the token that was sent" if _token_headers() else "a request without a token"
            return UserError(
                f"{self.address} refuses {sent} ({error.code}).", why=said, fix=_WHO_WE_ARE
            )
        if 300 <= error.code < 400:
            return UserError(
                f"{self.address} sends us elsewhere ({error.code}), and the token goes nowhere "
                "but to the address that was given.",
                fix=f"Name the right one: {_host_of(error.headers.get('Location', ''))}",
            )
        if error.code == 404:
            return _NotFoundError(f"{self.address} does not know it.", why=said)
        if error.code in _AWAY:
            return ClusterAwayError(f"{self.address} answers {error.code}.", why=said)
        return RefusedError(f"{self.address} answers {error.code}.", why=said)

    def _silence(self, error: Exception) -> LaunchError | UserError:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            return UserError(
                f"the certificate of {self.address} cannot be verified: {reason.verify_message}.",
                fix="Name the authority that signed it: SSL_CERT_FILE=/path/to/ca.pem",
            )
        if isinstance(reason, socket.gaierror):
            reason = f"its host is not known ({reason.strerror})"
        return ClusterAwayError(f"{self.address} does not answer.", why=f"{reason}.")


class _NotFoundError(LaunchError):
    pass


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow none; the answer becomes an HTTPError."""


def _opener(address: str) -> urllib.request.OpenerDirector:
    is_here = urlsplit(address).hostname in _LOOPBACK
    direct = [urllib.request.ProxyHandler({})] if is_here else []
    return urllib.request.build_opener(_NoRedirect(), *direct)


def _token_headers() -> dict[str, str]:
    """Return what proves to the cluster who we are; nothing where Ray would send nothing."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "") or _token_in_file()
    token = token.strip()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise UserError("the token in RAY_AUTH_TOKEN or its file is not one word of plain ASCII.")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _token_in_file() -> str:
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(given or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if given is None:
            return ""
        reason = getattr(error, "strerror", None) or "it holds no text"
        raise UserError(
            f"the token's file {given} cannot be read: {reason}.",
            fix="Correct RAY_AUTH_TOKEN_PATH.",
        ) from error


def _parsed(text: bytes, address: str) -> Any:
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise _other_service(address) from error


def _other_service(address: str) -> UserError:
    return UserError(
        f"something answers at {address}, but no Ray Jobs endpoint.",
        fix="Give the address of Ray's dashboard, as in http://head:8265.",
    )


def _said(error: urllib.error.HTTPError) -> str:
    """Return the last line of the answer that says something: of a traceback, what happened."""
    try:
        lines = error.read().decode("utf-8", "replace").splitlines()
    except (OSError, http.client.HTTPException):
        return ""
    return next((line.strip()[:500] for line in reversed(lines) if line.strip(" .")), "")


def _host_of(location: str) -> str:
    parts = urlsplit(location)
    return f"{parts.scheme}://{parts.hostname}" if parts.hostname else "ask whoever runs it"
