"""Scaling: arithmetic held against counting by hand, a crew of two on a tiny model."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.scale.crew import measure
from benchmarks.scale.projection import (
    CASES,
    Assumed,
    all_projected,
    projected,
    room_of,
    shape_of_llama,
    trainable_parameters,
)
from benchmarks.scale.projection import table as projected_table
from benchmarks.scale.summary import Measured, ring_bytes, table
from benchmarks.training.workload import SETTINGS_FILE, Settings
from qlora_core.config import RunConfig
from qlora_core.plan import Device, plan_shape


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


FAST, SLOW = "400 Gbit/s InfiniBand", "10 Gbit/s Ethernet"


def test_projected_efficiency_falls_with_gpus_and_rises_with_the_network_and_the_batch():
    def efficiency(num_gpus, link="100 Gbit/s Ethernet", **assumed):
        return projected("8B", "whole", link, num_gpus, Assumed(**assumed)).efficiency

    assert efficiency(1) == 1.0
    assert efficiency(16) > efficiency(64)
    assert efficiency(64, SLOW) < efficiency(64)
    assert efficiency(64, tokens_per_gpu=16384) > efficiency(64)


@pytest.mark.parametrize(
    ("model", "base", "seconds"),
    [  # FLOP * weights * 8192 / (0.35 * 989e12); weights: layers * (2 H H + 2 H 1024 + 3 H F)
        ("8B", "whole", 4 * 6_979_321_856 * 8192 / 346.15e12),  # 32 * 218,103,808
        ("70B", "whole", 6 * 68_451_041_280 * 8192 / 346.15e12),  # 80 * 855,638,016, layers again
        ("70B", "in parts", 4 * 68_451_041_280 * 8192 / 346.15e12),
        ("405B", "in parts", 6 * 401_646_551_040 * 8192 / 346.15e12),  # 126 * 3,187,671,040
    ],
)
def test_projected_computing_is_that_counted_by_hand(model, base, seconds):
    found = projected(model, base, FAST, 16, Assumed())

    assert found.compute_s == pytest.approx(seconds, rel=1e-9)


def test_projected_gathers_of_405b_are_those_counted_by_hand():
    block = 3_187_671_040 * (1 / 2 + 1 / 64)  # half a byte a weight, a byte of scale for 64
    once_s = 63 / 64 * block / 50e9 + 63 * 30e-6

    found = projected("405B", "in parts", FAST, 64, Assumed())

    assert found.num_rows == 4, "so 8 rows of 1,024 tokens are two passes"
    assert found.gather_s == pytest.approx(2 * (126 + 125) * once_s, rel=1e-6)
    assert found.gather_s == pytest.approx(17.19, abs=5e-3)


def test_gathers_count_where_they_take_longer_than_computing():
    hidden, open_ = (projected("405B", "in parts", link, 16, Assumed()) for link in (FAST, SLOW))

    assert hidden.gather_s < hidden.compute_s
    assert hidden.step_s == hidden.compute_s + hidden.exchange_s
    assert open_.gather_s > open_.compute_s
    assert open_.step_s == open_.gather_s + open_.exchange_s


def test_what_fits_on_no_gpu_of_its_size_has_no_row():
    with pytest.raises(ValueError, match="405B whole does not fit"):
        projected("405B", "whole", FAST, 16, Assumed())


@pytest.mark.parametrize(("model", "base"), CASES)
def test_passes_are_those_of_the_plan(model, base):
    config = RunConfig.model_validate(
        {
            "name": "r",
            "model": {"source": "org/m"},
            "dataset": {"source": "org/d"},
            "cluster": {"workers": 16},
        }
    )
    gpu = Device(kind="cuda", name="H100", memory_bytes=80 * 10**9, compute_dtype="bfloat16")

    planned = plan_shape(config, model=model, shape=shape_of_llama(model), device=gpu).strategies
    found = room_of(model, base, 16, Assumed())

    assert config.dataset.max_length == Assumed().row_tokens
    need = planned[base == "in parts"]
    assert (found.num_rows, found.recompute) == (need.num_rows, need.recompute)


def test_the_documented_projection_is_the_one_that_is_computed():
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()

    assert projected_table(list(all_projected(Assumed()))) in page


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
