"""What the runner orders from a system: which one, on what, how many steps."""

import argparse
from pathlib import Path

from benchmarks.training.gauge import Gauge
from benchmarks.training.workload import Workload, open_workload


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
