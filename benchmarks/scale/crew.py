"""Several workers at once, started together and ended together.

    python -m benchmarks.scale.crew ORDER    # rank 0's order, in JSON

They have a network of their own where that is allowed (`unshare --net`, as root), so that the
loopback device counts their bytes alone.
"""

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.record import ROOT
from benchmarks.scale.summary import Measured, summarised
from benchmarks.scale.worker import Mark, Order
from qlora_core.backends.ray_resources import WORKER_PROCESS

_OWN_NETWORK = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


def measure(
    workload: Path, num_workers: int, *, rows_per_worker: int, num_steps: int, num_warm: int
) -> Measured:
    """Train on ``num_workers`` workers of one thread each; return what a step took and sent.

    Args:
        workload: Made by `benchmarks.training.making`.
        num_workers: At once, on this machine.
        rows_per_worker: Of each step.
        num_steps: That are measured.
        num_warm: Steps before those.
    """
    with tempfile.TemporaryDirectory() as folder:
        order = Order(
            workload=workload,
            folder=Path(folder),
            rank=0,
            num_workers=num_workers,
            port=29500,
            rows_per_worker=rows_per_worker,
            num_steps=num_warm + num_steps,
        )
        for name in ("out", "scratch"):
            (order.folder / name).mkdir()
        _run(order)
        return summarised(order, _marks(order), num_warm, has_own_network=has_own_network())


def _run(order: Order) -> None:
    around = _OWN_NETWORK if has_own_network() else []
    command = [*around, sys.executable, "-m", "benchmarks.scale.crew", order.model_dump_json()]
    one_thread = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | WORKER_PROCESS | one_thread)


@functools.cache
def has_own_network() -> bool:
    """Say whether workers can be given a network of their own."""
    try:
        tried = subprocess.run([*_OWN_NETWORK, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return tried.returncode == 0


def _marks(order: Order) -> list[list[Mark]]:
    files = [order.model_copy(update={"rank": r}).marks_file for r in range(order.num_workers)]
    return [[Mark(**mark) for mark in json.loads(file.read_text())] for file in files]


def main() -> int:
    """Start all workers; end the others when one fails."""
    order = Order.model_validate_json(sys.argv[1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    orders = [order.model_copy(update={"rank": r, "port": port}) for r in range(order.num_workers)]
    command = [sys.executable, "-m", "benchmarks.scale.worker"]
    workers = [subprocess.Popen([*command, each.model_dump_json()]) for each in orders]
    codes = []
    try:
        codes = [worker.wait() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return max(map(abs, codes), default=1)


if __name__ == "__main__":
    sys.exit(main())
