"""One process of the benchmark: `python -m benchmarks.gpu.run WHAT CASE`.

WHAT is a system, `agreement`, or `probe`, which says what there is to measure with.
"""

import importlib
import json
import sys
from typing import Any

from benchmarks.gpu.cases import Case

SYSTEMS = {"ours": "ours", "plain": "plain", "trl": "trl_sft"}


def main() -> None:
    """Do what the command line says."""
    what, case = sys.argv[1], Case.from_text(sys.argv[2])
    if what == "probe":
        return _probe(case)
    import torch

    from benchmarks.gpu.measuring import TOO_LARGE

    place = "agreement" if what == "agreement" else f"systems.{SYSTEMS[what]}"
    system: Any = importlib.import_module(f"benchmarks.gpu.{place}")
    try:
        system.measure(case).report()
    except torch.OutOfMemoryError as error:
        print(TOO_LARGE, str(error).partition("\n")[0], flush=True)


def _probe(case: Case) -> None:
    """Print what is installed, what is not, and how fast large products are."""
    import torch

    from benchmarks.gpu.measuring import MARK, matrix_rate, versions

    missing = {}
    for name in ("transformers", "peft", "bitsandbytes", "pydantic", "qlora_core.training.worker"):
        try:
            importlib.import_module(name)
        except Exception as error:  # a package that is there but broken is as good as missing
            missing[name] = f"{type(error).__name__}: {error}"
    device = torch.device(case.device)
    has_cuda = torch.cuda.is_available()
    found = {
        "versions": versions(),
        "missing": missing,
        "has_cuda": has_cuda,
        "device": torch.cuda.get_device_name() if has_cuda else "CPU",
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if has_cuda else None,
        "cuda": torch.version.cuda,
    }
    if has_cuda or device.type == "cpu":
        found["matrix_rate"] = matrix_rate(device, getattr(torch, case.dtype))
    print(MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
