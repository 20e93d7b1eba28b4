"""What quantising costs and training wins back: made-up rows with a known answer."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.quality.__main__ import require_same_rows
from benchmarks.quality.cell import RECIPE, Place, recipe
from benchmarks.quality.comparison import Answers, compare, interval_of, share_won_back
from benchmarks.quality.table import table
from qlora_core.artifacts import EvalReport
from qlora_core.evaluation.estimates import ratio_estimate
from qlora_core.evaluation.records import AnswerRow, LossRow, Records

NUM_UNITS, NUM_TOKENS = 40, 10


def losses(nats, copies: int = 1) -> Records:
    """One row of ten tokens for each unit, or several equal ones."""
    rows = [
        LossRow(unit * copies + copy, unit, float(nats) * NUM_TOKENS, NUM_TOKENS)
        for unit, nats in enumerate(nats)
        for copy in range(copies)
    ]
    return Records(tuple(rows))


def answers_like(texts) -> Records:
    references = ("the cat sat on the mat today", "a cat is sitting on the mat")
    rows = [AnswerRow(f"fact {i}", text, references, {}, False) for i, text in enumerate(texts)]
    return Records((), tuple(rows))


@pytest.fixture
def nats():
    return np.random.default_rng(0).normal(2.0, 0.5, NUM_UNITS)


def compare_losses(nats, cost_before, costs_after, copies: int = 1):
    """`none` has the given losses, and `nf4` so much more; training takes one nat off both."""
    none = Answers(losses(nats, copies), tuple(losses(nats - 1, copies) for _ in costs_after))
    nf4 = Answers(
        losses(nats + cost_before, copies),
        tuple(losses(nats - 1 + cost, copies) for cost in costs_after),
    )
    return compare("loss", "nf4", "none", {"nf4": nf4, "none": none})


def test_a_cost_that_is_the_same_everywhere_is_found_without_error(nats):
    found = compare_losses(nats, 0.3, [0.1, 0.1, 0.1])

    assert found.before["nf4"] - found.before["none"] == pytest.approx(0.3)
    assert found.difference_before.value == pytest.approx(0.3)
    assert found.difference_after.value == pytest.approx(0.1)
    assert found.difference_after.high - found.difference_after.low < 1e-9
    assert found.won_back.value == pytest.approx(2 / 3)


def test_three_seeds_that_disagree_give_students_interval_of_three_numbers(nats):
    found = compare_losses(nats, 0.3, [0.1, 0.2, 0.3]).difference_after

    low, high = stats.t.interval(0.95, 2, loc=0.2, scale=0.1 / np.sqrt(3))
    assert found.by_seed == pytest.approx((0.1, 0.2, 0.3))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-3)


def test_untuned_models_are_compared_by_students_paired_interval_over_units(nats):
    cost_U = np.random.default_rng(1).normal(0.2, 0.1, NUM_UNITS)

    found = compare_losses(nats, cost_U, [cost_U] * 3).difference_before

    low, high = stats.ttest_1samp(cost_U, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-3)
    assert found.seeds_error is None
    assert found.by_seed == ()


def test_more_rows_of_the_same_facts_do_not_narrow_the_interval(nats):
    cost_U = np.random.default_rng(1).normal(0.2, 0.1, NUM_UNITS)

    once = compare_losses(nats, cost_U, [cost_U] * 3)
    five_times = compare_losses(nats, cost_U, [cost_U] * 3, copies=5)

    assert five_times.difference_before.low == pytest.approx(once.difference_before.low)
    assert five_times.difference_after.high == pytest.approx(once.difference_after.high)


@pytest.mark.parametrize("spread_of_seeds", [0.0, 0.01, 0.1])
def test_the_interval_holds_the_truth_at_least_95_times_in_a_hundred(spread_of_seeds):
    random, truth, trials, holds = np.random.default_rng(2), 0.2, 600, 0
    tokens_U = np.full(NUM_UNITS, float(NUM_TOKENS))
    for _ in range(trials):
        unit_U = random.normal(0, 0.1, NUM_UNITS)
        seeds = random.normal(0, spread_of_seeds, 3)
        costs = [truth + unit_U + s + random.normal(0, 0.05, NUM_UNITS) for s in seeds]
        found = interval_of(
            [ratio_estimate(c * tokens_U, tokens_U, np.arange(NUM_UNITS)) for c in costs]
        )
        holds += found.low <= truth <= found.high

    assert holds / trials > 0.935  # 0.95 less 1.7 standard errors of 600 trials


def test_the_error_of_the_share_agrees_with_resampled_units():
    random = np.random.default_rng(3)
    before_U = random.normal(0.3, 0.2, 200)
    after_U = 0.3 * before_U + random.normal(0, 0.1, 200)
    tokens_U, unit_U = np.full(200, 5.0), np.arange(200)

    share = share_won_back(
        ratio_estimate(before_U * 5, tokens_U, unit_U),
        ratio_estimate(after_U * 5, tokens_U, unit_U),
    )

    draws_KU = random.integers(0, 200, (4000, 200))
    resampled_K = 1 - after_U[draws_KU].mean(1) / before_U[draws_KU].mean(1)
    assert share.value == pytest.approx(1 - after_U.mean() / before_U.mean())
    assert share.standard_error() == pytest.approx(resampled_K.std(), rel=0.1)


def test_bleu_is_compared_over_resampled_facts():
    good, poor = "the cat sat on the mat today", "the cat sat on a dog"
    none = Answers(answers_like([good] * 30), (answers_like([good] * 30),) * 2)
    nf4 = Answers(
        answers_like([poor, good] * 15),
        (answers_like([poor, *[good] * 29]), answers_like([good, poor, *[good] * 28])),
    )

    found = compare("bleu", "nf4", "none", {"nf4": nf4, "none": none})

    assert found.before["none"] == pytest.approx(100)
    assert found.difference_before.high < 0
    assert found.difference_before.value < found.difference_after.value < 0
    assert found.difference_after.high > 0  # one poor answer of thirty may as well be none
    assert 0.8 < found.won_back.value < 1


def test_no_share_is_claimed_of_a_difference_that_may_be_zero(nats):
    cost_U = np.random.default_rng(4).normal(0.0, 0.5, NUM_UNITS)

    found = compare_losses(nats, cost_U, [0.01, 0.02])

    assert found.won_back is None
    assert "nothing of which a share" in table([found], "nf4", "none")


def test_no_share_is_claimed_where_the_quantized_model_is_the_better_one(nats):
    assert compare_losses(nats, -0.2, [0.01, 0.01]).won_back is None
    assert compare_losses(nats, 0.2, [-0.01, -0.01]).won_back.value == pytest.approx(1.05)


def test_unequal_numbers_of_seeds_are_refused(nats):
    none = Answers(losses(nats), (losses(nats),))

    with pytest.raises(ValueError, match="2 seeds of nf4, 1 of none"):
        compare("loss", "nf4", "none", {"nf4": Answers(none.before, none.after * 2), "none": none})


def test_the_table_shows_both_methods_the_cost_and_each_seed(nats):
    text = table([compare_losses(nats - nats.mean() + 2, 0.25, [0.04, 0.05, 0.06])], "nf4", "none")

    before, after = text.splitlines()[1:3]
    assert before.split()[-6:] == ["2.000", "2.250", "+0.250", "(+0.250", "to", "+0.250)"]
    assert after.endswith("+0.040, +0.050, +0.060")
    assert "wins back 80% of the cost" in text
    assert "each seed: 84%, 80%, 76%" in text


def test_reports_on_different_rows_are_not_paired():
    def report(digest: str) -> EvalReport:
        return EvalReport(
            subject="base",
            dataset_digest=digest,
            metrics={},
            num_truncated=0,
            samples=(),
            seconds=0,
        )

    require_same_rows([report("a"), report("a")])
    with pytest.raises(ValueError, match="2 different sets of rows"):
        require_same_rows([report("a"), report("b")])


def test_methods_differ_in_nothing_but_how_the_base_is_stored(tmp_path: Path):
    for name in ("devset.csv", "testset_w_refs.csv"):
        (tmp_path / name).write_text("mr,ref\nname[A],A.\n")
    place = Place(tmp_path, tmp_path)

    nf4, none = recipe("nf4", 1, place), recipe("none", 1, place)

    assert nf4.quantization.method == "nf4"
    assert none == nf4.model_copy(
        update={"quantization": nf4.quantization.model_copy(update={"method": "none"})}
    )
    assert none.seed == 1
    assert RECIPE.exists()


def test_a_comparison_can_be_stored_as_json(nats):
    found = compare_losses(nats, 0.3, [0.1, 0.2])

    assert json.loads(json.dumps(asdict(found), allow_nan=False))["metric"] == "loss"
