"""How the training benchmark lets systems take turns, and what they are given."""

import argparse
import re
from pathlib import Path

import pytest

from benchmarks.training.__main__ import Bench
from benchmarks.training.environments import FAMILIES, Environments
from benchmarks.training.gauge import Gauge
from benchmarks.training.systems import huggingface
from benchmarks.training.workload import Row, open_workload, write_workload
from tests.benchmarks.test_summary import measurement
from tests.benchmarks.test_workload import settings


class Tried(Bench):
    """Measures nothing, at once; plain fails in the second round."""

    def _measure(self, system, python, found):
        if system == "plain" and len(self.rounds) == 2:
            self.left_out[system] = "failed"
        else:
            found[system] = measurement(system, 1.0)

    def _matrix_rate(self):
        return {}


def test_every_round_begins_with_another_system_and_is_handed_over_when_it_ends():
    systems = ["ours", "plain", "hf-padded"]
    options = argparse.Namespace(systems=systems, rounds=3)
    python = Path("python")
    environments = Environments({"huggingface": python}, print, has_cuda=False)
    kept = []

    bench = Tried(options, Path(), environments, 2)
    bench.run(lambda bench: kept.append([list(each) for each in bench.rounds]))

    first, second, third = systems, ["hf-padded", "ours"], ["hf-padded", "ours"]
    assert kept == [[first], [first, second], [first, second, third]]
    assert bench.left_out == {"plain": "failed"}


@pytest.mark.parametrize("system", ["hf-padded", "hf-grouped"])
def test_grouped_or_not_the_first_step_has_the_workloads_first_rows(tmp_path, system):
    lengths = [30, 29, 28, 27, *(5 + (7 * number) % 20 for number in range(16))]
    rows = [Row([9] * length, [1] * length) for length in lengths]
    write_workload(tmp_path, settings(num_rows=20, global_batch=4), rows)
    gauge = Gauge(system, pad_id=0, num_warmup=1, num_steps=2)

    given = huggingface._rows(open_workload(tmp_path), gauge)["length"]

    assert list(given[:4]) == lengths[:4]
    if system == "hf-grouped":
        one, two = given[4:8], given[8:12]
        assert min(one) >= max(two) or min(two) >= max(one)


def test_every_package_of_a_peer_has_a_version():
    packages = [name for family in FAMILIES.values() for step in family.steps for name in step]

    assert packages
    assert all(re.fullmatch(r"[a-z-]+==\d\S*", name) for name in packages)
