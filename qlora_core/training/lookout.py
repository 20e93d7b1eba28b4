"""Looking out for what the cluster is about to do: a node that will be taken away.

All workers must ask Ray together (its answer is agreed on by all), and asking takes milliseconds.
So rank 0 calls for it from time to time, and the call travels with the gradients: no message of its
own, and all workers hear it after the same step.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from qlora_core.training.snapshot import HURRY_S

ASK_EVERY_S = 2.0
"""Preempted nodes are usually given 30 to 120 s."""


def never() -> None:
    """Expect nothing: this machine is nobody's to take."""


@dataclass
class Lookout:
    """One worker's part in looking out."""

    ask: Callable[[], float | None] = never
    """Called by all workers after the same step: when is a node taken away [seconds from now]?"""
    every_s: float = ASK_EVERY_S
    _asked_at: float = field(default_factory=time.monotonic, init=False)
    _has_been_told: bool = field(default=False, init=False)
    _is_near: bool = field(default=False, init=False)

    def calls(self) -> bool:
        """Say whether it is time for all to ask; what rank 0 says counts."""
        is_due = self.ask is not never and not self._is_near
        return is_due and time.monotonic() - self._asked_at >= self.every_s

    def is_urgent(self) -> bool:
        """Ask; return whether to save at once: on the first notice, and when its end is near."""
        self._asked_at = time.monotonic()
        left_s = self.ask()
        if left_s is None:
            return False
        is_first, self._has_been_told = not self._has_been_told, True
        self._is_near = left_s <= HURRY_S
        return is_first or self._is_near
