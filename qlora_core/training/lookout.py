"""Looking out for what the cluster is about to do: a node that will be taken away.

All workers must ask Ray together (its answer is agreed on by all), and asking takes milliseconds.
So rank 0 calls for it from time to time, and the call travels with the gradients: no message of its
own, and all workers hear it after the same step.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

ASK_EVERY_S = 2.0
"""Preempted nodes are usually given 30 to 120 s."""


def never() -> bool:
    """Expect nothing: this machine is nobody's to take."""
    return False


@dataclass
class Lookout:
    """One worker's part in looking out."""

    ask: Callable[[], bool] = never
    """Called by all workers after the same step: is a node about to be taken away?"""
    every_s: float = ASK_EVERY_S
    _asked_at: float = field(default_factory=time.monotonic, init=False)
    _has_been_told: bool = field(default=False, init=False)

    def calls(self) -> bool:
        """Say whether it is time for all to ask; what rank 0 says counts."""
        is_due = self.ask is not never and not self._has_been_told
        return is_due and time.monotonic() - self._asked_at >= self.every_s

    def is_urgent(self) -> bool:
        """Ask; return whether to save at once. True once: the node is taken only once."""
        self._asked_at = time.monotonic()
        self._has_been_told = self.ask()
        return self._has_been_told
