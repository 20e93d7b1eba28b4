"""Run a command; print what it took: seconds, and memory with all it started together.

    python -m benchmarks.peak [--every SECONDS] -- COMMAND [ARGUMENT ...]

Memory is PSS, the proportional set size: a page that several processes map counts once, divided
among them, so the sum over processes is what the machine has to hold. It is sampled, so a peak
between two samples is missed. A process belongs to the command if it descends from it, or from one
that did when it was last looked at, or is in its session: servers that outlive their parents count
as long as the command runs. Linux only.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

_PROC = Path("/proc")
_LONGEST_NAME = 70
_SHOWN = 8


class Process(NamedTuple):
    """What /proc tells of a process; number and start together name it for good."""

    pid: int
    started: int
    """Clock ticks since the machine started."""
    parent: int
    session: int
    cpu_s: float
    """Used so far."""


@dataclass
class Family:
    """A command and all that it started.

    Args:
        session: Of the command, which leads one of its own.
    """

    session: int
    _cpu_s: dict[tuple[int, int], float] = field(default_factory=dict)
    """Of everybody who was ever seen: what they had used when they were seen last."""

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all members, those that are gone included."""
        return sum(self._cpu_s.values())

    def members(self) -> list[Process]:
        """Return who belongs to it and is alive now."""
        everyone = {process.pid: process for process in processes()}
        belongs = {pid for pid, process in everyone.items() if self._is_known(process)}
        grown = True
        while grown:
            children = {pid for pid, process in everyone.items() if process.parent in belongs}
            grown = not children <= belongs
            belongs |= children
        self._cpu_s |= {everyone[pid][:2]: everyone[pid].cpu_s for pid in belongs}
        return [everyone[pid] for pid in sorted(belongs)]

    def _is_known(self, process: Process) -> bool:
        return process.session == self.session or process[:2] in self._cpu_s


@dataclass
class Peak:
    """The largest sum so far."""

    size_bytes: int = 0
    parts: list[tuple[int, str]] = field(default_factory=list)
    """Bytes and name of each process at that moment, the largest first."""

    def look(self, members: list[Process]) -> None:
        """Take another sample."""
        parts = [(size, process.pid) for process in members if (size := pss_bytes(process.pid))]
        total = sum(size for size, _ in parts)
        if total > self.size_bytes:
            named = [(size, _name(pid)) for size, pid in sorted(parts, reverse=True)]
            self.size_bytes, self.parts = total, named


def processes() -> Iterator[Process]:
    """Yield all processes of this machine that may be looked at."""
    for folder in _PROC.iterdir():
        if folder.name.isdigit():
            try:
                text = (folder / "stat").read_text()
            except OSError:  # it has just ended
                continue
            # the name stands in parentheses and may hold any of both
            columns = text.rpartition(")")[2].split()
            ticks = int(columns[11]) + int(columns[12])
            yield Process(
                int(folder.name), int(columns[19]), int(columns[1]), int(columns[3]),
                ticks / os.sysconf("SC_CLK_TCK"),
            )  # fmt: skip


def pss_bytes(pid: int) -> int:
    """Return a process's share of the memory it uses; 0 if it is gone, or not ours to see."""
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


@dataclass(frozen=True)
class Watched:
    """How a command went."""

    exit_code: int
    wall_s: float
    cpu_s: float
    """Of it and all that it started, up to the last look at each."""
    peak: Peak


def watch(command: list[str], every_s: float, **options: Any) -> Watched:
    """Run ``command`` and look at it and all that it starts every so many seconds.

    Args:
        command: What to run.
        every_s: Between two looks.
        options: Of `subprocess.Popen`.
    """
    started = time.monotonic()
    running = subprocess.Popen(command, start_new_session=True, **options)
    family, peak = Family(running.pid), Peak()
    try:
        while running.poll() is None:
            peak.look(family.members())
            time.sleep(every_s)
    except KeyboardInterrupt:
        running.terminate()  # Ctrl-C does not reach a session of its own
        running.wait()
    return Watched(running.returncode, time.monotonic() - started, family.cpu_s, peak)


def _name(pid: int) -> str:
    try:
        text = (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return "ended"
    return text.strip()[:_LONGEST_NAME]


def main() -> int:
    """Watch the command that was given; end with its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peak", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--every", type=float, default=0.5, metavar="SECONDS")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    found = watch(given.command, given.every)
    print(
        f"{found.wall_s:.1f} s, {found.cpu_s:.1f} CPU s, peak "
        f"{found.peak.size_bytes / 1e9:.2f} GB (PSS), exit code {found.exit_code}"
    )
    for size, name in found.peak.parts[:_SHOWN]:
        print(f"  {size / 1e9:6.2f} GB  {name}")
    return found.exit_code


if __name__ == "__main__":
    sys.exit(main())
