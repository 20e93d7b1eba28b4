"""Start a module of this package in a process of its own, and read what it measured."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.pipeline.preparers.order import MARK
from benchmarks.record import ROOT


def measured_by(
    module: str, *arguments: str | Path, changes: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run ``benchmarks.pipeline.<module>`` and return the JSON that it reports.

    Raises:
        RuntimeError: It failed; the message holds the end of what it said.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.pipeline.{module}", *arguments],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **(changes or {})},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"benchmarks.pipeline.{module} failed:\n{done.stderr[-2000:]}")
    return read_measured(done.stdout)


def read_measured(output: str) -> dict[str, Any]:
    """Return the JSON that a process reported among all else it said.

    Raises:
        RuntimeError: It reported nothing.
    """
    marked = [line for line in output.splitlines() if line.startswith(MARK)]
    if not marked:
        raise RuntimeError(f"No line begins with {MARK!r}:\n{output[-2000:]}")
    found: dict[str, Any] = json.loads(marked[-1].removeprefix(MARK))
    return found
