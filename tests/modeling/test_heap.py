"""Freed memory leaves the process."""

import os
import subprocess
import sys

import pytest

from qlora_core.backends.ray_resources import WORKER_PROCESS

_TENSOR_BYTES, _NUM_TENSORS = 4_000_000, 100
_PROGRAM = f"""
import sys
import psutil, torch
from qlora_core.modeling.heap import give_back_at_once

def resident():
    return psutil.Process().memory_info().rss

if sys.argv[1] == "at once":
    give_back_at_once()
tensors = [torch.ones({_TENSOR_BYTES // 4}) for _ in range({_NUM_TENSORS})]
before = resident()
del tensors[::2]  # holes, between tensors that stay
print(before - resident())
"""


def _given_back(way: str) -> int:
    """Return the bytes that leave a process like a worker when half of its tensors are freed."""
    command = [sys.executable, "-c", _PROGRAM, way]
    environment = {**os.environ, **WORKER_PROCESS}
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return int(told.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is told")
def test_freed_tensors_leave_a_worker_that_recomputes_its_layers() -> None:
    freed = _NUM_TENSORS // 2 * _TENSOR_BYTES

    assert _given_back("at once") > 0.9 * freed
    assert _given_back("as usual") < 0.1 * freed, "the heap keeps holes: nothing is left to mend"
