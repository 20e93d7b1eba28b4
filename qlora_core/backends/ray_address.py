"""Ask whether anybody listens where Ray is said to be: Ray itself would ask for minutes.

A connection is all that is tried. That it is a Ray, and one that we may use, only Ray can tell.
"""

import socket
import time
from urllib.parse import urlsplit

from qlora_core.errors import UserError

_FOUND_BY_RAY = ("auto", "local")  # no addresses: Ray looks on this machine
_CLIENT_PORT = 10001
_PATIENCE_S = 10.0  # a cluster that was started a moment ago
_CONNECT_S = 5.0  # an address that nobody has may never say no
_PAUSE_S = 0.5


def require_ray(address: str, patience_s: float = _PATIENCE_S) -> None:
    """Return once something listens at ``address``.

    Raises:
        UserError: Nothing does, or it is no address.
    """
    if address in _FOUND_BY_RAY:
        return
    host, port = _endpoint(address)
    deadline = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection((host, port), timeout=_CONNECT_S).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"no Ray answers at {address}: {error}.",
                    why="The address is cluster.address of the recipe, or RAY_ADDRESS.",
                    fix="Start that cluster (`ray start --head --port=6379`) or correct the "
                    "address; leave both out for a Ray of the run's own.",
                ) from error
        time.sleep(_PAUSE_S)


def _endpoint(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(address if "//" in address else f"//{address}")
        port = parts.port or (_CLIENT_PORT if parts.scheme == "ray" else None)
    except ValueError:  # a port that is no number
        port = None
    if port is None or parts.hostname is None:
        raise UserError(
            f"cluster.address (or RAY_ADDRESS) {address!r} is no address of a Ray.",
            fix="Give host and port, as in head:6379 or ray://head:10001, or auto.",
        )
    return parts.hostname, port
