"""What this machine's float32 matrix products reach, at a shape as training has them.

    python -m benchmarks.training.matrix_rate

A product of (1000, 1536) by (1536, 576) is the smallest model's widest layer on a thousand tokens.
"""

import json
import time

import torch

ROWS, INNER, COLUMNS = 1000, 1536, 576
_SECONDS = 1.5
_TRIALS = 3


def rates() -> dict[str, float]:
    """Return FLOP per second of one core and of all, and per CPU second of one."""
    all_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one_wall, one_cpu = _best_rate()
    torch.set_num_threads(all_threads)
    all_wall, _ = _best_rate()
    return {
        "num_threads": all_threads,
        "one_core": one_wall,
        "one_core_per_cpu_s": one_cpu,
        "all_cores": all_wall,
    }


def _best_rate() -> tuple[float, float]:
    found = [_rate() for _ in range(_TRIALS)]
    return max(wall for wall, _ in found), max(cpu for _, cpu in found)


def _rate() -> tuple[float, float]:
    """Return FLOP per wall second and per CPU second."""
    left, right = torch.randn(ROWS, INNER), torch.randn(INNER, COLUMNS)
    out = torch.empty(ROWS, COLUMNS)
    torch.mm(left, right, out=out)
    num_products, wall, cpu = 0, time.monotonic(), time.process_time()
    while time.monotonic() - wall < _SECONDS / _TRIALS:
        torch.mm(left, right, out=out)
        num_products += 1
    flops = 2.0 * ROWS * INNER * COLUMNS * num_products
    return flops / (time.monotonic() - wall), flops / (time.process_time() - cpu)


if __name__ == "__main__":
    print(json.dumps(rates()))
