"""Try out each part of the stack by doing something small with it, and say what to change.

Importing a package proves little: Prefect 3.8 imports well beside a FastAPI that breaks its
server, and bitsandbytes imports well beside a CUDA it cannot use. So each check *does* something:
multiplies, quantises, starts a worker, runs a flow, writes a run.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from qlora_core.artifacts import Frozen

_RAY_TIMEOUT_S = 120


class Check(Frozen):
    """How one part did."""

    part: str
    ok: bool
    found: str
    """What was seen, or what went wrong."""
    fix: str = ""
    seconds: float = 0.0


def check_all(home: Path) -> Iterator[Check]:
    """Yield one Check for each part, as each is done."""
    parts: list[tuple[str, Callable[[Path], str], str]] = [
        ("machine", _machine, "Free memory or disk, or set QLORAFLOW_HOME to a larger disk."),
        ("torch", _torch, "Install a torch built for this device: see pytorch.org."),
        ("bitsandbytes", _bitsandbytes, "pip install -U 'bitsandbytes>=0.50,<0.51'"),
        (
            "ray",
            _ray,
            "Look for leftovers with `ray status`; unset RAY_ADDRESS; see the log above.",
        ),
        ("prefect", _prefect, "pip install 'prefect>=3.8.8,<4' 'fastapi>=0.139,<0.151'"),
        ("mlflow", _mlflow, "pip install -U 'mlflow>=3.17,<4'"),
    ]
    for part, run, fix in parts:
        started = time.monotonic()
        try:
            ok, found = True, run(home)
        except Exception as error:  # a doctor reports whatever is wrong, of whatever kind
            ok, found = False, f"{type(error).__name__}: {error}".strip()
        seconds = time.monotonic() - started
        yield Check(part=part, ok=ok, found=found, fix="" if ok else fix, seconds=seconds)


def _machine(home: Path) -> str:
    home.mkdir(parents=True, exist_ok=True)
    (home / ".doctor").write_bytes(b"x")
    (home / ".doctor").unlink()
    disk_gb = shutil.disk_usage(home).free / 1e9
    memory_gb = psutil.virtual_memory().available / 1e9
    found = (
        f"{os.cpu_count()} cores, {memory_gb:.1f} GB memory free, {disk_gb:.0f} GB free in {home}"
    )
    if disk_gb < 2 or memory_gb < 3:
        raise RuntimeError(f"{found}: the demo needs 3 GB of memory and 2 GB of disk")
    return found


def _torch(_: Path) -> str:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(256, 256, device=device)
    error = (x @ x - (x.double() @ x.double()).float()).abs().max().item()
    if not error < 1e-2:
        raise RuntimeError(f"a 256 x 256 product on {device} is off by {error:.3g}")
    from qlora_core.modeling.dtypes import dtype_name, resolve_compute_dtype

    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    dtype = dtype_name(resolve_compute_dtype("auto", device))
    return f"{torch.__version__} on {device} ({name}); computes in {dtype}"


def _bitsandbytes(_: Path) -> str:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(256, 256, device=device)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    error = ((dequantize_4bit(packed, state) - weight).norm() / weight.norm()).item()
    if not 0.05 < error < 0.15:
        raise RuntimeError(f"NF4 on {device} has a relative error of {error:.3f}, expected 0.09")
    version = importlib.metadata.version("bitsandbytes")
    return f"{version}: NF4 on {device}, relative error {error:.3f} on Gaussian weights"


_RAY_PROGRAM = """
import json, logging, ray
ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level=logging.ERROR,
         log_to_driver=False, object_store_memory=80_000_000)
answer = ray.get(ray.remote(lambda: 6 * 7).remote())
print(json.dumps({"version": ray.__version__, "answer": answer}))
ray.shutdown()
"""


def _ray(_: Path) -> str:
    environment = dict(os.environ) | {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    run = subprocess.run(
        [sys.executable, "-c", _RAY_PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=_RAY_TIMEOUT_S,
        check=False,
    )
    if run.returncode:
        raise RuntimeError(run.stderr.strip()[-600:])
    answer = json.loads(run.stdout.strip().splitlines()[-1])
    return f"{answer['version']}: a local Ray with a token ran a task"


def _prefect(home: Path) -> str:
    from flows.server import ensure_server

    connection = ensure_server(home)
    with connection.in_use():
        from prefect import flow

        @flow(name="doctor", log_prints=False)
        def answer() -> int:
            return 42

        if answer() != 42:
            raise RuntimeError("a flow returned another value than it was given")
    version = importlib.metadata.version("prefect")
    return f"{version}: a flow ran on the server at {connection.ui_url}"


def _mlflow(_: Path) -> str:
    from qlora_core.backends.mlflow_tracking import try_out

    with tempfile.TemporaryDirectory(prefix="qlora-doctor-") as folder:
        return try_out(Path(folder))
