"""Ask whether anybody listens where Ray is said to be: Ray itself would ask for minutes.

A connection is all that is tried. That it is a Ray, and one that we may use, only Ray can tell.
"""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from qlora_core.config import ClusterConfig
from qlora_core.errors import HeadLostError, UserError, storing
from qlora_core.training.durable import replace_durably

_FOUND_BY_RAY = ("auto", "local")  # no addresses: Ray looks on this machine
_PORTS = {"ray": 10001, "http": 80, "https": 443}
_PATIENCE_S = 10.0  # a cluster that was started a moment ago
_CONNECT_S = 5.0  # an address that nobody has may never say no
_PAUSE_S = 0.5
_ADDRESS_FILE = "address.txt"  # where something has listened


def require_ray(
    address: str, patience_s: float = _PATIENCE_S, check: Callable[[], None] = lambda: None
) -> None:
    """Return once something listens at ``address``.

    Args:
        address: Of a Ray.
        patience_s: How long to ask [seconds].
        check: Called meanwhile; what it raises ends the waiting.

    Raises:
        UserError: Nothing does, or it is no address.
    """
    if address in _FOUND_BY_RAY:
        return
    endpoint = _endpoint(address)
    deadline = time.monotonic() + patience_s
    while error := _silence(endpoint):
        if time.monotonic() >= deadline:
            raise UserError(
                f"no Ray answers at {address}: {error}.",
                why="The address is cluster.address of the recipe, or RAY_ADDRESS.",
                fix="Start that cluster (`ray start --head --port=6379`) or correct the "
                "address; leave both out for a Ray of the run's own.",
            ) from error
        check()
        time.sleep(_PAUSE_S)


def reach_ray(
    cluster: ClusterConfig, scratch: Path, say: Callable[[str], None], check: Callable[[], None]
) -> None:
    """Return when somebody listens at the address: where it was right before, its head may be.

    A wrong address is told within seconds; a head that was lost is waited for like nodes, by
    whoever has the same scratch folder.

    Args:
        cluster: Has an address.
        scratch: A folder, where it is noted.
        say: Told once that it is waited for.
        check: Called meanwhile; what it raises ends the waiting.

    Raises:
        UserError: Nobody does, and nobody ever has; or it is no address.
        HeadLostError: Nobody does any more.
        StoreError: The note cannot be read, or written.
    """
    address, before = str(cluster.address), scratch / _ADDRESS_FILE
    with storing(before, "read"):
        is_known = before.exists() and before.read_text("utf-8") == address
    if is_known:
        await_ray(address, cluster.wait_for_nodes_s, say, check)
        return
    require_ray(address, _PATIENCE_S, check)
    replace_durably(before, address.encode())


def await_ray(
    address: str, patience_s: float, say: Callable[[str], None], check: Callable[[], None]
) -> None:
    """Return once something listens at ``address``, where a Ray has been: its head may come back.

    Args:
        address: Of that Ray.
        patience_s: How long to ask [seconds].
        say: Told once that it is waited for.
        check: Called meanwhile; what it raises ends the waiting.

    Raises:
        HeadLostError: It has not come back.
    """
    try:
        require_ray(address, patience_s=0.0)
    except UserError:
        say(f"Nobody answers at {address}, where a Ray has been; waiting up to {patience_s:g} s.")
    else:
        return
    try:
        require_ray(address, patience_s, check)
    except UserError as error:
        raise HeadLostError(
            f"nobody has answered at {address}, where a Ray has been, for {patience_s:g} s.",
            why="Its head is lost, or the network to it.",
            fix="Start the cluster again, there or at another cluster.address, and run again to go "
            "on from the last snapshot.",
        ) from error


def tell_if_silent(address: str, say: Callable[[str], None]) -> None:
    """Say so if nobody answers at ``address`` now, of which there is no need yet.

    Args:
        address: Of a Ray, or of a Ray Jobs endpoint.
        say: Told.

    Raises:
        UserError: It is no address.
    """
    if address in _FOUND_BY_RAY:
        return
    if error := _silence(_endpoint(address)):
        say(f"nobody answers at {address} now ({error}); training will need it")


def is_jobs_endpoint(address: str | None) -> bool:
    """Say whether this names a Ray Jobs endpoint, and not a Ray to connect to."""
    return address is not None and address.startswith(("http://", "https://"))


def require_address(address: str) -> None:
    """Return if ``address`` may be that of a cluster; nobody is asked.

    Raises:
        UserError: It is none, or holds a secret.
    """
    if is_jobs_endpoint(address):
        require_jobs_address(address)
    elif address not in _FOUND_BY_RAY:
        _endpoint(address)


def require_jobs_address(address: str) -> None:
    """Return if ``address`` may be that of a Ray Jobs endpoint; nobody is asked.

    Raises:
        UserError: It is none, or holds a secret.
    """
    try:
        parts = urlsplit(address)
        is_one = is_jobs_endpoint(address) and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        is_one = False
    if not is_one:
        raise UserError(
            f"cluster.address (or RAY_ADDRESS) {address!r} is no address of a Ray Jobs endpoint.",
            fix="Give the dashboard's, as in http://head:8265 or https://ray.example.com.",
        )
    if "@" in parts.netloc or parts.query:
        raise UserError(
            f"the address of the Ray Jobs endpoint at {parts.hostname} holds more than a place.",
            why="Addresses are kept in clear by Prefect and MLflow.",
            fix="Give the token through RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, with "
            "RAY_AUTH_MODE=token.",
        )


def _silence(endpoint: tuple[str, int]) -> OSError | None:
    """Return why nobody takes a connection there; None if somebody does."""
    try:
        socket.create_connection(endpoint, timeout=_CONNECT_S).close()
    except OSError as error:
        return error
    return None


def _endpoint(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(address if "//" in address else f"//{address}")
        port = parts.port or _PORTS.get(parts.scheme)
    except ValueError:  # a port that is no number
        port = None
    if port is None or parts.hostname is None:
        raise UserError(
            f"cluster.address (or RAY_ADDRESS) {address!r} is no address of a Ray.",
            fix="Give host and port, as in head:6379 or ray://head:10001, or auto; or the Ray Jobs "
            "endpoint of a remote cluster, as in https://head:8265.",
        )
    return parts.hostname, port
