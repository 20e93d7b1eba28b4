"""How far rounding alone drives two curves apart, by learning rate: why long ones here are gentle.

    python -m tests.chaos.rounding [--rates 3e-5,1e-4,1e-3]

Trains twice in this process, the second time at a rate that is 2e-7 of itself larger: less than two
float32 numbers lie apart. What a fault changes is told from that only where this stays small.
"""

import argparse
import sys

from qlora_core.backends.in_process import InProcessLauncher
from qlora_core.config import SnapshotConfig
from tests.chaos.place import Place, open_place
from tests.chaos.trial import TOLERANCE

_NUM_STEPS = 2200
_NUDGE = 2e-7
_AT_THE_END = SnapshotConfig(every_s=1e9)


def losses(place: Place, learning_rate: float) -> list[float]:
    """Return the loss of each step of a training in this process."""
    told: list[float] = []
    job = place.job(num_steps=_NUM_STEPS, learning_rate=learning_rate)
    InProcessLauncher(_AT_THE_END).train(job, lambda step: told.append(step.loss))
    return told


def line(rate: float, plain: list[float], nudged: list[float]) -> str:
    """Return a row of the table: how many losses are off, from which step on, and the worst."""
    off = [abs(a / b - 1) for a, b in zip(nudged, plain, strict=True)]
    far = [step for step, each in enumerate(off, start=1) if each > TOLERANCE]
    return f"| {rate:g} | {len(far)} | {far[0] if far else ''} | {max(off):.1e} |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rates", default="3e-5,1e-4,1e-3")
    rates = [float(rate) for rate in parser.parse_args().rates.split(",")]
    sys.stdout.write(f"| rate | losses off by {TOLERANCE:g} | from step | worst |\n")
    sys.stdout.write("| --- | --- | --- | --- |\n")
    with open_place() as place:
        for rate in rates:
            found = line(rate, losses(place, rate), losses(place, rate * (1 + _NUDGE)))
            sys.stdout.write(found + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
