"""One table from the records of several runs, as the whole takes hours.

    python -m tests.chaos.joined benchmarks/results/chaos-*.json

Trials of one fault are put together, in the order of `faults`; a fault that no record has is left
out.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import TypeAdapter

from tests.chaos.faults import FAULTS
from tests.chaos.running import Row, table


def joined(records: Iterable[Path]) -> Iterator[Row]:
    """Yield a row for each fault that was let loose in any of the records."""
    of_all = [TypeAdapter(Row).validate_python(row) for file in records for row in _rows(file)]
    for fault in FAULTS:
        rows = [row for row in of_all if row.fault == fault.name and not row.skipped]
        if rows:
            trials = tuple(trial for row in rows for trial in row.trials)
            yield Row(fault.name, fault.what, trials, sum(row.seconds for row in rows))


def _rows(file: Path) -> list[dict[str, object]]:
    stored = json.loads(file.read_text("utf-8"))["faults"]
    return [{name: row[name] for name in row if name != "num_held"} for row in stored]


if __name__ == "__main__":
    sys.stdout.write(table(list(joined(map(Path, sys.argv[1:])))) + "\n")
