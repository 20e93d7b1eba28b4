"""How long a person waits before the command line does anything: import and help."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass

from benchmarks.record import ROOT
from benchmarks.training.summary import Spread, spread

COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "import flows.__main__": ("-c", "import flows.__main__"),
    "qlora --help": ("-m", "flows", "--help"),
}
LIMITS_S = {"import flows.__main__": 0.3, "qlora --help": 0.6}


@dataclass(frozen=True)
class Starting:
    """Seconds of each command, over several calls."""

    wall_s: dict[str, Spread]
    cpu_s: dict[str, Spread]


def measure(times: int) -> Starting:
    """Call each command ``times`` times, in turns, after one that warms the disk's cache."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for number in range(times + 1):
        for name, arguments in COMMANDS.items():
            seconds = _call(arguments)
            if number:
                found[name].append(seconds)
    return Starting(
        {name: spread([wall for wall, _ in each]) for name, each in found.items()},
        {name: spread([cpu for _, cpu in each]) for name, each in found.items()},
    )


def _call(arguments: tuple[str, ...]) -> tuple[float, float]:
    before, started = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, os.times()
    user = after.children_user - before.children_user
    return wall, user + after.children_system - before.children_system
