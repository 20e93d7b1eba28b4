"""Scaling: arithmetic held against counting by hand, a crew of two on a tiny model."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.scale.crew import measure
from benchmarks.scale.projection import Assumed, projected, shape_of_llama, trainable_parameters
from benchmarks.scale.summary import Measured, ring_bytes, table
from benchmarks.training.workload import SETTINGS_FILE, Settings


def ring_sum(parts: list[list[float]]) -> tuple[list[list[float]], list[int]]:
    """Add up around a ring, part by part; return everybody's sums, and how much each has sent."""
    count = len(parts)
    held, sent = [list(part) for part in parts], [0] * count
    for hop in range(count - 1):
        moving = [(rank, (rank - hop) % count) for rank in range(count)]
        values = [held[rank][place] for rank, place in moving]
        for (rank, place), value in zip(moving, values, strict=True):
            held[(rank + 1) % count][place] += value
            sent[rank] += 1
    for hop in range(count - 1):
        moving = [(rank, (rank + 1 - hop) % count) for rank in range(count)]
        values = [held[rank][place] for rank, place in moving]
        for (rank, place), value in zip(moving, values, strict=True):
            held[(rank + 1) % count][place] = value
            sent[rank] += 1
    return held, sent


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_ring_bytes_are_what_a_ring_sends(count):
    parts = [[float(10 * rank + place) for place in range(count)] for rank in range(count)]

    held, sent = ring_sum(parts)

    assert held == [[sum(column) for column in zip(*parts, strict=True)]] * count
    assert set(sent) == {ring_bytes(count, count)}


def test_trainable_parameters_of_8b_are_those_of_pefts_all_linear_adapter():
    per_layer = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)

    assert trainable_parameters(shape_of_llama("8B"), rank=16) == 32 * 16 * per_layer


def test_projected_efficiency_falls_with_gpus_and_rises_with_the_network_and_the_batch():
    shape = shape_of_llama("8B")

    def efficiency(num_gpus, link="100 Gbit/s Ethernet", **assumed):
        return projected(shape, "8B", link, num_gpus, Assumed(**assumed)).efficiency

    assert efficiency(1) == 1.0
    assert efficiency(16) > efficiency(64)
    assert efficiency(64, "10 Gbit/s Ethernet") < efficiency(64)
    assert efficiency(64, tokens_per_gpu=16384) > efficiency(64)


def measured(num_workers: int, wall_s: float, cpu_s: float) -> Measured:
    return Measured(num_workers, 4, 1000 * num_workers, wall_s, cpu_s, 0.1, 4_000_000, 8e6, True)


def test_efficiency_is_speed_over_workers_and_of_the_cores_over_cores():
    text = table([measured(1, 10.0, 10.0), measured(4, 20.0, 40.0)], num_cores=2)

    assert "| 1 | 100.0 | 100% | 100% | 100.0 | 10% | 0 | 0.0 |" in text
    assert "| 4 | 200.0 | 50% | 100% | 100.0 | 10% | 8.0 | 6.0 |" in text


def test_two_workers_exchange_what_the_arithmetic_says(tmp_path, nf4_base, dataset):
    workload = tmp_path / "workload"
    workload.mkdir()
    (workload / "base").symlink_to(nf4_base)
    (workload / "data").symlink_to(dataset)
    settings = Settings("tiny", 22, 300, 200, 0, 30, 1, 1)
    (workload / SETTINGS_FILE).write_text(json.dumps(vars(settings)))

    found = measure(workload, 2, rows_per_worker=4, num_steps=3, num_warm=1)

    assert (found.num_workers, found.num_steps) == (2, 3)
    assert found.wall_s > 0 < found.cpu_s
    sizes = [t.numel() for t in _adapter(nf4_base, dataset, tmp_path).values()]
    assert found.message_bytes == 4 * (sum(sizes) + 3)
    if found.has_own_network:  # headers and handshakes add a little
        ring = ring_bytes(found.message_bytes, 2)
        assert ring <= found.loopback_bytes < 1.3 * ring


def _adapter(base: Path, data: Path, folder: Path):
    from benchmarks.scale.worker import Order, job_of
    from qlora_core.backends.in_process import InProcessLauncher
    from qlora_core.config import SnapshotConfig

    order = Order(
        workload=folder / "workload", folder=folder, rank=0, num_workers=1, port=1,
        rows_per_worker=4, num_steps=1,
    )  # fmt: skip
    job = job_of(order)
    for made in (job.out, job.scratch):
        made.mkdir()
    InProcessLauncher(SnapshotConfig()).train(job, lambda _: None)
    return load_file(job.out / "adapter_model.safetensors")
