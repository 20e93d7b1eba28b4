"""One virtual environment for each family of peers, with fixed versions; made when first needed.

torch comes first and alone, so that its build (CPU, CUDA) is the one the package index offers, and
the same for all. A family that cannot be installed is no error: its systems are skipped, and the
table says why.
"""

import hashlib
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).parents[1] / ".envs"
_TORCH = ("torch==2.13.0",)
_WITHOUT_THIS_BUILD = ("torchvision", "torchaudio")
"""Packages that fail when they were built for another build of torch; text needs none of them."""


@dataclass(frozen=True)
class Family:
    """Systems that share an environment."""

    steps: tuple[tuple[str, ...], ...] = ()
    """What is installed, one pip command after the other; none: our own environment."""
    probe: str = ""
    """Python that must run there."""
    needs_cuda: bool = False


FAMILIES: dict[str, Family] = {
    "ours": Family(),
    "huggingface": Family(
        (
            _TORCH,
            (
                *_TORCH, "transformers==5.23.0", "peft==0.21.2", "trl==1.16.0",
                "accelerate==1.15.0", "bitsandbytes==0.50.2", "datasets==5.2.0",
            ),
        ),
        "import torch, transformers, peft, trl, bitsandbytes",
    ),
    "llama-factory": Family(
        (_TORCH, (*_TORCH, "llamafactory==0.9.5", "bitsandbytes==0.50.2")),
        "import torch, transformers, peft, bitsandbytes; from transformers import Trainer",
    ),
    "unsloth": Family(
        (_TORCH, ("unsloth==2026.10.9",)),
        "import unsloth; from unsloth import FastLanguageModel",
        needs_cuda=True,
    ),
    "axolotl": Family((_TORCH, ("axolotl==0.19.0",)), "import axolotl.train", needs_cuda=True),
}  # fmt: skip


@dataclass
class Environments:
    """Finds, or makes, the Python of each family.

    Args:
        given: Pythons to use instead, by family.
        say: Told what takes long.
        has_cuda: Whether this machine has a GPU that torch can use.
    """

    given: Mapping[str, Path]
    say: Callable[[str], None]
    has_cuda: bool
    _why_not: dict[str, str] = field(default_factory=dict)

    def python(self, family: str) -> Path | None:
        """Return the family's Python; none if it cannot be had here (see `why_not`)."""
        if family in self.given:
            return self.given[family]
        if not FAMILIES[family].steps:
            return Path(sys.executable)
        if FAMILIES[family].needs_cuda and not self.has_cuda:
            self._why_not[family] = "needs a CUDA GPU"
        if family in self._why_not:
            return None
        return self._made(family)

    def why_not(self, family: str) -> str:
        """Return why there is no Python of that family."""
        return self._why_not[family]

    def _made(self, family: str) -> Path | None:
        folder = FOLDER / family
        python, ready = folder / "bin" / "python", folder / "ready"
        recipe = hashlib.sha256(repr(FAMILIES[family]).encode()).hexdigest()
        if ready.exists() and ready.read_text() == recipe:
            return python
        self.say(f"Making {folder} (once; some minutes)")
        why = _make(folder, python, FAMILIES[family])
        if why:
            self._why_not[family] = f"cannot be installed: {why}"
            return None
        ready.write_text(recipe)
        return python


def _make(folder: Path, python: Path, family: Family) -> str:
    """Build an environment; return what went wrong, if anything."""
    venv.create(folder, clear=True, with_pip=True)
    for packages in family.steps:
        if why := _try(python, "-m", "pip", "install", "--quiet", *packages):
            return why
    for package in _WITHOUT_THIS_BUILD:
        if _try(python, "-c", f"import {package}"):
            _try(python, "-m", "pip", "uninstall", "--quiet", "--yes", package)
    return _try(python, "-c", family.probe)


def _try(python: Path, *arguments: str) -> str:
    """Run a command; return the last line of its error, or nothing if it went well."""
    done = subprocess.run([python, *arguments], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR") or "Error" in line]
    return (errors or lines or [f"exit code {done.returncode}"])[-1].strip()[:200]
