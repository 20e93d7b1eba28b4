"""Stores a run as JSON, with all that is needed to judge it. Needs Python alone."""

import datetime
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.processes import ROOT
from benchmarks.gpu.summary import Line, Result


def store(
    folder: Path,
    options: Mapping[str, Any],
    probed: Mapping[str, Any],
    results: Sequence[Result],
    lines: Sequence[Line],
) -> Path:
    """Write everything measured to ``folder`` and return the file."""
    now = datetime.datetime.now(datetime.UTC)
    not_told = ("out", "wheels")  # where things lie on this machine
    record = {
        "what": "training on a GPU, random weights",
        "date": now.isoformat(timespec="seconds"),
        "commit": _commit(),
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
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu-{now:%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return path


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # a bare machine may have no git
        return "unknown"
    return done.stdout.strip() or "unknown"
