"""What every benchmark stores beside its numbers: date, commit, machine; and where.

Nothing but the standard library is imported here, as peers' environments read it.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORK, RESULTS = ROOT / "benchmarks" / ".work", ROOT / "benchmarks" / "results"
_FOLDERS = re.compile(r"(?<![\w.~>/-])/(?:[^\s/'\"<>|:;,]+/)+")
"""What comes before a file's name in an absolute path."""
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""What decides whether float32 or bfloat16 is the faster one on a CPU."""


_PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "llamafactory", "unsloth",
    "axolotl", "triton", "liger-kernel", "pydantic", "numpy",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of the packages that matter, as far as they are installed."""
    found = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def say(text: str) -> None:
    """Tell a person how far it is."""
    print(text, file=sys.stderr, flush=True)


def data_folder() -> Path:
    """Return where real data is: `gsm8k/` and `e2e/` in $QLORAFLOW_DATA, or beside this clone."""
    given = os.environ.get("QLORAFLOW_DATA")
    return Path(given) if given else ROOT.parent / "shared" / "data"


def found_gsm8k(given: Path | None) -> Path | None:
    """Return GSM8K's training rows: the file that was named, else the one in the data's folder.

    Says which rows it will be, as a benchmark on made-up ones is another benchmark.
    """
    kept = data_folder() / "gsm8k" / "train.jsonl"
    found = given or (kept if kept.exists() else None)
    say(f"rows: {found or 'made-up chats; --gsm8k FILE or QLORAFLOW_DATA names real ones'}")
    return found


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """Return ``names`` beginning with another one in each round, so that no place favours one.

    Args:
        names: Of systems.
        number: Of the round; the first is 1.
    """
    first = (number - 1) % len(names) if names else 0
    return [*names[first:], *names[:first]]


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


def without_places(value: Any) -> Any:
    """Return ``value`` without where things lie on this machine, in all text that is in it.

    Paths in this clone begin at its root, those at home with `~`, those among temporary files with
    `$TMP`; of others only the last name is left.
    """
    if isinstance(value, Mapping):
        return {without_places(name): without_places(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(each) for each in value]
    if not isinstance(value, str):
        return value
    places = [(ROOT, ""), (Path(tempfile.gettempdir()), "$TMP/"), (Path.home(), "~/")]
    for place, name in ((p, n) for folder, n in places for p in (folder, folder.resolve())):
        if place != Path(place.anchor):
            inside = rf"(?<![\w.~-]){re.escape(str(place))}"
            value = re.sub(rf"{inside}/", name, value)
            value = re.sub(rf"{inside}(?![\w.-])", name.rstrip("/") or ".", value)
    return _FOLDERS.sub("", value)


@dataclass(frozen=True)
class Record:
    """A benchmark's file of results, `<name>-<date>.json`: written as often as there is more.

    Args:
        folder: Where to; none: `benchmarks/results`.
        name: How the file's name begins.
        what: The benchmark in words.
    """

    folder: Path | None
    name: str
    what: str
    _begun: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))

    def write(self, measured: Mapping[str, Any]) -> Path:
        """Write what has been measured so far, instead of what was written before.

        Args:
            measured: All that is to be kept, options included.
        """
        now = datetime.datetime.now(datetime.UTC)
        record = {
            "what": self.what,
            "date": now.isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine(),
            **measured,
        }
        folder = self.folder or RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}-{self._begun:%Y%m%d-%H%M%S}.json"
        unfinished = path.with_suffix(".unfinished")  # else an interruption takes earlier rounds
        unfinished.write_text(json.dumps(without_places(record), indent=1) + "\n", "utf-8")
        return unfinished.replace(path)


def store(folder: Path | None, name: str, what: str, measured: Mapping[str, Any]) -> Path:
    """Write what was measured, once and for all; see `Record`."""
    return Record(folder, name, what).write(measured)
