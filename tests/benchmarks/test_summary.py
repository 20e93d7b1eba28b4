"""Arithmetic of the benchmark's table, by hand."""

from dataclasses import replace

import pytest
import torch

from benchmarks.training.gauge import Count, Gauge, Measurement
from benchmarks.training.summary import loss_difference, spread, strongest, summarise, work
from benchmarks.training.table import table
from benchmarks.training.workload import IGNORED
from tests.benchmarks.test_workload import settings


def measurement(system: str, cpu_s: float, **changes) -> Measurement:
    known = Measurement(
        system=system, num_tokens=1000, num_supervised=400, num_processed=1000, wall_s=cpu_s / 2,
        cpu_s=cpu_s, peak_memory_bytes=3_000_000_000, losses=[1.5, 1.25], checksums=[11, 22],
        versions={},
    )  # fmt: skip
    return replace(known, **changes)


def a_round(ours: float, plain: float, grouped: float, padded: float):
    times = {"ours": ours, "plain": plain, "hf-grouped": grouped, "hf-padded": padded}
    return {system: measurement(system, cpu_s) for system, cpu_s in times.items()}


ROUNDS = [a_round(4, 12, 8, 11), a_round(5, 15, 11, 14), a_round(4, 10, 8, 40)]
RATES = [{"one_core_per_cpu_s": 100.0, "all_cores": 200.0}]


@pytest.fixture
def summary():
    return summarise(ROUNDS, settings(), 2, RATES)


def test_spread_is_median_lowest_and_highest():
    found = spread([3.0, 1.0, 2.0])

    assert (found.median, found.low, found.high) == (2.0, 1.0, 3.0)


def test_rates_are_medians_over_rounds(summary):
    ours = summary.lines[0]

    assert ours.tokens_per_cpu_s.median == pytest.approx(2 * 1000 / 4)
    assert ours.tokens_per_cpu_s.low == pytest.approx(2 * 1000 / 5)
    assert ours.tokens_per_wall_s.median == pytest.approx(1000 / 2)
    assert ours.supervised_per_wall_s.median == pytest.approx(400 / 2)
    assert ours.epoch_s.median == pytest.approx(4000 / 500)


def test_ratios_are_taken_within_a_round(summary):
    by_name = {(ratio.against, ratio.per): ratio.spread for ratio in summary.ratios}

    against_peer, against_plain = (
        by_name["hf-grouped", "CPU second"],
        by_name["plain", "CPU second"],
    )
    assert (against_peer.median, against_peer.low, against_peer.high) == pytest.approx((2, 2, 2.2))
    assert (against_plain.median, against_plain.low, against_plain.high) == pytest.approx(
        (3, 2.5, 3)
    )


def test_the_strongest_peer_is_neither_ours_nor_the_plain_loop(summary):
    slow_peers = [line for line in summary.lines if line.system != "hf-grouped"]

    assert strongest(summary.lines, lambda line: line.tokens_per_cpu_s.median) == "hf-grouped"
    assert strongest(slow_peers, lambda line: line.tokens_per_cpu_s.median) == "hf-padded"


def test_work_counts_real_tokens_that_were_computed_and_the_head_where_a_loss_is():
    padded = measurement("plain", 1.0, num_processed=1700)
    shared = measurement("ours", 1.0, num_processed=900)

    assert work(padded, settings()) == 4 * (1000 * 10 + 400 * 3)
    assert work(shared, settings()) == 4 * (900 * 10 + 400 * 3)


def test_the_share_of_the_matrix_rate_is_work_over_time_over_rate(summary):
    ours = summary.lines[0]

    assert ours.matrix_share_cpu == pytest.approx(4 * 11200 / 4 / 100)
    assert ours.matrix_share_wall == pytest.approx(4 * 11200 / 2 / 200)


def test_curves_on_other_rows_are_not_compared():
    plain = measurement("plain", 1.0)
    close = measurement("ours", 1.0, losses=[1.5, 1.2501])

    assert loss_difference(close, plain) == pytest.approx(1e-4)
    assert loss_difference(replace(close, checksums=[11, 23]), plain) is None


def test_a_system_that_failed_in_a_round_counts_where_it_ran():
    rounds = [ROUNDS[0], {name: m for name, m in ROUNDS[1].items() if name != "hf-grouped"}]

    summary = summarise(rounds, settings(), 2, RATES)

    lines = {line.system: line for line in summary.lines}
    assert lines["hf-grouped"].tokens_per_cpu_s.low == lines["hf-grouped"].tokens_per_cpu_s.high


def test_without_peers_only_the_plain_loop_is_compared():
    rounds = [{name: each[name] for name in ("ours", "plain")} for each in ROUNDS]

    found = summarise(rounds, settings(), 2, []).ratios

    assert [ratio.against for ratio in found] == ["plain", "plain"]


def test_the_table_has_a_line_for_each_system_and_says_who_is_left_out(summary):
    text = table(summary, {"unsloth": "needs a CUDA GPU"})
    lines = text.splitlines()

    assert lines[0].startswith("system ")
    assert [line.split()[0] for line in lines[1:5]] == ["ours", "plain", "hf-grouped", "hf-padded"]
    assert len({len(line) for line in lines[:5]}) == 1
    assert "ours / hf-grouped, tokens per CPU second: 2.00 (2.00 to 2.20)" in lines
    assert lines[-1] == "unsloth left out: needs a CUDA GPU"


def test_the_gauge_counts_padding_supervision_and_rows_of_each_step():
    gauge = Gauge("plain", pad_id=0, num_warmup=1, num_steps=1)
    gauge.step_done(Count(num_tokens=99, num_supervised=99, num_processed=99, checksum=99))

    ids_BT = torch.tensor([[5, 6, 7], [8, 9, 0]])
    labels_BT = torch.tensor([[5, 6, 7], [IGNORED, 9, IGNORED]])
    gauge.count(ids_BT, labels_BT)
    gauge.losses += [1.5, 1.25]

    assert gauge.step_done()
    found = gauge.measurement()
    assert (found.num_tokens, found.num_processed, found.num_supervised) == (5, 6, 3)
    assert found.checksums == [99, 35]


def test_the_gauge_sees_what_a_model_is_given_while_it_trains():
    class Model(torch.nn.Module):
        def forward(self, input_ids, labels=None):
            return input_ids

    model, gauge = Model(), Gauge("plain", pad_id=0, num_warmup=1, num_steps=1)
    gauge.attach(model)
    gauge.step_done()

    model.train()(input_ids=torch.tensor([[5, 6, 0]]), labels=torch.tensor([[5, 6, IGNORED]]))
    model.eval()(torch.tensor([[5, 6, 0]]))
    gauge.step_done()

    found = gauge.measurement()
    assert (found.num_tokens, found.num_processed, found.num_supervised) == (2, 3, 1)


def test_a_system_that_stops_early_is_an_error():
    gauge = Gauge("plain", pad_id=0, num_warmup=1, num_steps=2)
    gauge.step_done()
    gauge.step_done()

    with pytest.raises(RuntimeError, match="2 of 3 steps"):
        gauge.measurement()


def test_without_a_plain_loop_the_table_compares_no_losses():
    rounds = [{"ours": each["ours"]} for each in ROUNDS]

    text = table(summarise(rounds, settings(), 2, RATES), {})

    assert text.splitlines()[1].split()[-2:] == ["-", "-"]


def test_losses_are_compared_with_trl_in_float32_where_rows_are_the_same():
    trl = measurement("trl-padded-float32", 9, losses=[1.5, 1.2502])
    other = measurement("llama-factory-neat", 9, checksums=[1, 2])
    rounds = [{"ours": measurement("ours", 4), "trl-padded-float32": trl, other.system: other}]

    summary = summarise(rounds, settings(), 2, RATES)

    ours, _, packed = summary.lines
    assert ours.trl_loss_difference == pytest.approx(2e-4)
    assert packed.trl_loss_difference is None
    assert table(summary, {}).splitlines()[1].split()[-2:] == ["-", "2.0e-04"]


def test_each_target_is_held_against_what_was_found(summary):
    reached = {target.what: target.is_reached for target in summary.targets}

    assert reached == {
        "ours / hf-grouped, tokens per CPU second": True,
        "ours / plain, tokens per CPU second": True,
        "ours / hf-grouped, tokens per wall second": True,
        "ours / plain, tokens per wall second": True,
        "share of the matrix rate, per CPU second": True,
        "share of the matrix rate, per wall second": True,
        "peak memory against hf-grouped": True,
    }
    text = table(summary, {}).splitlines()
    assert "target reached: ours / plain, tokens per CPU second: 3.00, wanted at least 2.70" in text


def test_a_target_is_missed_by_a_slower_or_larger_run():
    heavy = measurement("ours", 7, peak_memory_bytes=3_500_000_000)
    rounds = [{"ours": heavy, "hf-padded": measurement("hf-padded", 8)}]

    text = table(summarise(rounds, settings(), 2, []), {}).splitlines()

    assert (
        "target missed: ours / hf-padded, tokens per wall second: 1.14, wanted at least 2.00"
        in text
    )
    assert "target missed: peak memory against hf-padded: 3.50 GB, wanted not above 3.00 GB" in text
