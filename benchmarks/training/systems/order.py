"""What the runner orders from a system: which one, on what, how many steps."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.training.gauge import Gauge
from benchmarks.training.workload import Workload, open_workload

Train = Callable[[Workload, Gauge, Path], None]
"""Trains the gauge's steps; the folder is for whatever comes up, and is gone afterwards."""


def fulfil(train: Train) -> None:
    """Do what a system's process is for: read the order, train, report."""
    workload, gauge = take_order()
    with tempfile.TemporaryDirectory() as folder:
        train(workload, gauge, Path(folder))
    gauge.report()


def take_order() -> tuple[Workload, Gauge]:
    """Read the command line; return the workload and a gauge for the system."""
    parser = argparse.ArgumentParser()
    parser.add_argument("system")
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--global-batch", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=8)
    given = parser.parse_args()
    workload = open_workload(
        given.workload, global_batch=given.global_batch, micro_batch=given.micro_batch
    )
    gauge = Gauge(given.system, workload.settings.pad_id, given.warmup, given.steps)
    return workload, gauge
