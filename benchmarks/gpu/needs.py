"""What the processes need, what of it is missing, and how to get it. Needs Python alone."""

import importlib
import re
from collections.abc import Iterable

from benchmarks.record import ROOT

NEEDED = (
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "pydantic", "numpy",
    "safetensors", "psutil", "pyarrow", "jinja2", "yaml",
)  # fmt: skip
"""To be imported, in this order; our own engine comes last, when all of them are there."""
_ENGINE = "qlora_core.training.worker"
OF_TRL = ("datasets", "trl")
"""What one peer needs besides."""
_PACKAGES = {"yaml": "pyyaml", "liger_kernel": "liger-kernel"}
"""Names of packages that are not those of their modules."""
_PINS, _RANGES = ROOT / "infra" / "constraints.txt", ROOT / "pyproject.toml"


def missing_of(modules: Iterable[str]) -> dict[str, str]:
    """Return those that cannot be imported, with what Python says of each."""
    found = {}
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # a package that is there but broken is as good as missing
            found[name] = f"{type(error).__name__}: {error}"
    return found


def missing() -> dict[str, str]:
    """Return all that must be there and is not, so that a person installs it at once."""
    return missing_of(NEEDED) or missing_of([_ENGINE])


def pip_line(modules: Iterable[str]) -> str:
    """Return the command that installs what is missing, in the versions that are tested.

    Args:
        modules: Names that could not be imported; for our own engine all that it needs.
    """
    names = [name for module in modules for name in (NEEDED if module == _ENGINE else (module,))]
    packages = [_PACKAGES.get(name, name) for name in dict.fromkeys(names)]
    return " ".join(["pip install", *(_versioned(package) for package in packages)])


def _versioned(package: str) -> str:
    """Return a package with its tested version, else with the range that the project allows."""
    pin = re.search(rf"^{package}==\S+$", _PINS.read_text("utf-8"), re.MULTILINE | re.IGNORECASE)
    if pin:
        return pin[0]
    allowed = re.search(rf'"({package}[<>=!~][^";]*)', _RANGES.read_text("utf-8"))
    return f"'{allowed[1].strip()}'" if allowed else package
