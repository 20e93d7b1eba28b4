"""EndpointPatience with an endpoint that is away, or answers oddly, while a job may be running.

A head moves to another machine, a token runs out, a proxy answers 429 or with a page of its own:
none of it says anything of the job, which goes on. So whatever asking fails with is waited out, and
the error that ends the waiting leaves the job alone.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from qlora_core.errors import LaunchError, QLoraError

PATIENCE_S = 600.0
"""With a cluster that is away: a head that moves to another machine takes minutes."""


class OutOfReachError(LaunchError):
    """Nobody can be asked; the job may well go on."""


@dataclass
class EndpointPatience:
    """With one endpoint, for as long as it takes to answer, but not without end."""

    address: str
    about: str
    """What is asked for, as in `Ray job qlora-...`."""
    say: Callable[[str], None]
    patience_s: float
    _away_since: float | None = field(default=None, init=False)

    def bear(self, error: QLoraError, heard_at: float = 0.0) -> None:
        """Take it that there is no answer; tell it the first time.

        Args:
            error: What came instead.
            heard_at: When there was another sign of life, by the monotonic clock.

        Raises:
            OutOfReachError: It has gone on for too long.
        """
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
            told = " ".join(filter(None, (error.what, error.why, error.fix)))
            self.say(f"{told} Waiting; a job that runs goes on meanwhile.")
        if now - max(self._away_since, heard_at) < self.patience_s:
            return
        raise OutOfReachError(
            f"{self.address} has not answered as it should for {self.patience_s:.0f} s, and "
            f"nothing came from {self.about}.",
            why=" ".join(filter(None, (error.what, error.why))),
            fix="If the job runs, it goes on. Run again when the cluster answers: it will be "
            f"found, or the work goes on from what is kept. {error.fix}".rstrip(),
        ) from error

    def rest(self) -> None:
        """Take it that there was an answer; tell it if there was none before."""
        if self._away_since is not None:
            self.say(f"{self.address} answers again.")
        self._away_since = None
