"""Starts the processes that measure, and reads what they report. Needs Python alone."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import Case
from benchmarks.record import ROOT

MARK, TOO_LARGE = "MEASURED ", "TOO LARGE"
"""Beginnings of the lines by which a process reports."""
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
    # blocks of all sizes come and go; without it a tenth of a full GPU is lost between them
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}


@dataclass(frozen=True)
class Processes:
    """Runs `benchmarks.gpu.run`.

    Args:
        paths: Folders of packages that come before the installed ones.
        timeout_s: How long one process may take.
    """

    paths: list[Path]
    timeout_s: int

    def probe(self, case: Case) -> dict[str, Any]:
        """Return what there is to measure with; under `failed` why that is not known."""
        found, why = self._run("probe", case)
        return {"failed": why} if found is None else found

    def agreement(self, case: Case) -> tuple[dict[str, Any] | None, str]:
        """Return an `Agreement`, or why there is none."""
        return self._run("agreement", case)

    def system(self, system: str, case: Case) -> tuple[dict[str, Any] | None, Case, str]:
        """Return a `Measurement`, of which case it is, or why there is none.

        Passes that are too large for the GPU are halved.
        """
        while True:
            found, why = self._run(system, case)
            if found is not None or not why.startswith(TOO_LARGE) or case.micro_batch == 1:
                return found, case, why
            case = case.halved()

    def _run(self, what: str, case: Case) -> tuple[dict[str, Any] | None, str]:
        places = [str(path) for path in (*self.paths, ROOT)]
        places += [place for place in (os.environ.get("PYTHONPATH"),) if place]
        command = [sys.executable, "-m", "benchmarks.gpu.run", what, case.to_text()]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=ROOT, check=False,
                env={**_QUIET, **os.environ, "PYTHONPATH": os.pathsep.join(places)},
                timeout=self.timeout_s,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None, f"took more than {self.timeout_s} s"
        lines = done.stdout.splitlines()
        for line in lines:
            if line.startswith(TOO_LARGE):
                return None, line
            if line.startswith(MARK) and not done.returncode:
                found: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return found, ""
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return None, f"failed: {(said or [f'exit code {done.returncode}'])[-1][:300]}"
