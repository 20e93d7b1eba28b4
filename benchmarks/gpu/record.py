"""Stores a run as JSON, with all that is needed to judge it. Needs Python alone."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.gpu.summary import Line, Result


def record_of(folder: Path | None) -> record.Record:
    """Return the file of a run, to be written with `keep`."""
    return record.Record(folder, "gpu", "training on a GPU, random weights")


def keep(
    stored: record.Record,
    options: Mapping[str, Any],
    probed: Mapping[str, Any],
    results: Sequence[Result],
    lines: Sequence[Line],
) -> Path:
    """Write everything measured so far and return the file."""
    not_told = ("out", "wheels")  # where things lie on this machine
    measured = {
        "machine": {
            "device": probed["device"],
            "memory_bytes": probed["memory_bytes"],
            "cuda": probed["cuda"],
            "system": platform.system(),
            "matrix_rate": probed["matrix_rate"],
        },
        "versions": probed["versions"],
        "options": {name: value for name, value in options.items() if name not in not_told},
        "summary": [asdict(line) for line in lines],
        "results": [asdict(result) for result in results],
    }
    return stored.write(measured)
