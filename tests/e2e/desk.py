"""Somebody at work with the cron example: commands as a person gives them, and what they leave."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import psutil

from flows.records import RunRecord

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "cron"
ADDRESSES = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_URI", "RAY_ADDRESS")


@dataclass(frozen=True)
class Desk:
    """Where somebody works: a folder with the example in it, a home, a command line."""

    folder: Path

    @classmethod
    def at(cls, folder: Path) -> "Desk":
        """Lay a desk out in an empty folder."""
        shutil.copytree(EXAMPLE, folder / "cron", ignore=shutil.ignore_patterns("data"))
        generate = [sys.executable, "cron/generate.py", "--out", "cron/data"]
        subprocess.run(generate, cwd=folder, check=True)
        return cls(folder)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def environment(self) -> dict[str, str]:
        own = {"QLORAFLOW_HOME": str(self.home), "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
        return {name: v for name, v in os.environ.items() if name not in ADDRESSES} | own

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "flows", *arguments],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def qlora(self, *arguments: str) -> CompletedProcess[str]:
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=480)
        finally:
            process.kill()
            process.wait()
        return CompletedProcess(process.args, process.returncode, out, err)

    def record(self) -> RunRecord:
        """Return what `qlora show --json` prints of the newest run."""
        return RunRecord.model_validate_json(self.qlora("show", "--json").stdout)

    def snapshots(self) -> Iterator[Path]:
        """Yield the manifests of the snapshots that are there."""
        return self.home.glob("train_adapter/.*.scratch/snapshots/step_*/MANIFEST.json")

    def processes(self) -> list[psutil.Process]:
        """Return everything that runs for this home, whoever its parent is by now."""
        return [p for p in psutil.process_iter() if str(self.home) in _traces(p)]


def _traces(process: psutil.Process) -> str:
    try:
        return " ".join([*process.cmdline(), *process.environ().values()])
    except (psutil.Error, OSError):  # it ended meanwhile, or is not ours to ask
        return ""
