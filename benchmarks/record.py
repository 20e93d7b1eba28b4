"""What every benchmark stores beside its numbers: date, commit, machine; and where.

Nothing but the standard library is imported here, as peers' environments read it.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORK, RESULTS = ROOT / "benchmarks" / ".work", ROOT / "benchmarks" / "results"
_GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""What decides whether float32 or bfloat16 is the faster one on a CPU."""


def say(text: str) -> None:
    """Tell a person how far it is."""
    print(text, file=sys.stderr, flush=True)


def found_gsm8k(given: Path | None) -> Path | None:
    """Return GSM8K's training rows: the file that was named, else the one beside the repository."""
    return given or (_GSM8K if _GSM8K.exists() else None)


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Return what this machine is, and how busy it was in the last minute."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    stated = {name.strip(): value.strip() for name, _, value in (li.partition(":") for li in lines)}
    flags = set(stated.get("flags", "").split())
    return {
        "cpu": stated.get("model name") or platform.processor() or platform.machine(),
        "cpu_features": [name for name in _CPU_FEATURES if name in flags],
        "cores": num_cores(),
        "system": platform.system(),
        "load_at_end": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def commit() -> str:
    """Return the commit of this working tree, marked if it has changes."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # a bare machine may have no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def as_stated(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a command's options as JSON can hold them, without where files lie on this machine."""
    kept = {name: value for name, value in options.items() if name != "python"}
    return {name: v.name if isinstance(v, Path) else v for name, v in kept.items()}


def store(folder: Path | None, name: str, what: str, measured: Mapping[str, Any]) -> Path:
    """Write what was measured to ``<name>-<date>.json`` and return that file.

    Args:
        folder: Where to; none: `benchmarks/results`.
        name: How the file's name begins.
        what: The benchmark in words.
        measured: All that is to be kept, options included.
    """
    now = datetime.datetime.now(datetime.UTC)
    record = {
        "what": what,
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        **measured,
    }
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{now:%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return path
