"""What the runner orders from a preparation, and what comes back.

Nothing but the standard library is imported here, as every peer's environment reads it.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

MARK = "MEASURED "
"""The line of the output that begins with it is the measurement."""


@dataclass(frozen=True)
class Order:
    """One preparation."""

    system: str
    rows: Path
    """JSONL with `question` and `answer`."""
    model: Path
    """Folder with tokenizer and configuration."""
    num_processes: int | None
    """Of `datasets`; none: as it is by default."""
    is_packed: bool
    max_length: int
    """Of a row, and of a pack."""


@dataclass
class Prepared:
    """What a system reports."""

    system: str
    num_rows: int = 0
    num_tokens: int = 0
    """Of all rows, padding of packs included."""
    num_supervised: int = 0
    wall_s: dict[str, float] = field(default_factory=dict)
    """Of `stage`, from the file and the model's folder to what training reads; and of `tokenise`,
    from rows in memory to tokens and labels."""
    cpu_s: dict[str, float] = field(default_factory=dict)
    """Of this process and those it started."""

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Measure what happens inside."""
        wall, cpu = time.perf_counter(), _cpu_seconds()
        yield
        self.wall_s[part] = time.perf_counter() - wall
        self.cpu_s[part] = _cpu_seconds() - cpu


Prepare = Callable[[Order, Prepared, Path], None]
"""Prepares rows and fills in what it measured; the folder is gone afterwards."""


def fulfil(prepare: Prepare) -> None:
    """Do what a system's process is for: read the order, prepare, report."""
    order = _read()
    found = Prepared(order.system)
    with tempfile.TemporaryDirectory() as folder:
        prepare(order, found, Path(folder))
    print(MARK + json.dumps(asdict(found)), flush=True)


def _read() -> Order:
    parser = argparse.ArgumentParser()
    parser.add_argument("system")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--max-length", type=int, required=True)
    given = parser.parse_args()
    return Order(
        given.system, given.rows, given.model, given.processes, given.packed, given.max_length
    )


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
