"""One process of the benchmark: `python -m benchmarks.gpu.run WHAT CASE`.

WHAT is a system, `agreement`, or `probe`, which says what there is to measure with.
"""

import importlib
import json
import sys
from typing import Any

from benchmarks.gpu.cases import Case
from benchmarks.gpu.needs import OF_TRL, missing, missing_of
from benchmarks.gpu.processes import MARK, TOO_LARGE
from benchmarks.record import versions

SYSTEMS = {"ours": "ours", "plain": "plain", "trl": "trl_sft"}


def main() -> None:
    """Do what the command line says."""
    what, case = sys.argv[1], Case.from_text(sys.argv[2])
    if what == "probe":
        return _probe(case)
    import torch

    place = "agreement" if what == "agreement" else f"systems.{SYSTEMS[what]}"
    system: Any = importlib.import_module(f"benchmarks.gpu.{place}")
    try:
        system.measure(case).report()
    except torch.OutOfMemoryError as error:
        print(TOO_LARGE, str(error).partition("\n")[0], flush=True)


def _probe(case: Case) -> None:
    """Print what is missing; if nothing is, what is installed and how fast large products are."""
    if absent := missing():
        print(MARK + json.dumps({"missing": absent}), flush=True)
        return
    import torch

    from benchmarks.gpu.measuring import matrix_rate

    device = torch.device(case.device)
    has_cuda = torch.cuda.is_available()
    found = {
        "versions": versions(),
        "missing": {},
        "missing_of_trl": missing_of(OF_TRL),
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
