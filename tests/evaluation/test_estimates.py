import math

import numpy as np
import pytest
from scipy import stats

from qlora_core.evaluation.estimates import (
    Estimate,
    corpus_estimate,
    mean_estimate,
    ratio_estimate,
    student_quantile,
)


def bootstrap_error(statistic, units, resamples=4000) -> float:
    """Oracle: how a statistic wobbles when independent units are drawn again."""
    generator = np.random.default_rng(0)
    draws = generator.integers(0, len(units), (resamples, len(units)))
    return float(np.std([statistic([units[i] for i in draw]) for draw in draws]))


def ratio(units) -> float:
    nats, tokens = np.concatenate(units).T
    return nats.sum() / tokens.sum()


def test_error_of_a_mean_is_the_textbooks():
    scores = np.random.default_rng(0).random(37)

    estimate = mean_estimate(scores)

    assert estimate.value == pytest.approx(scores.mean())
    assert estimate.standard_error() == pytest.approx(stats.sem(scores))


def test_error_of_a_ratio_agrees_with_a_bootstrap_over_rows():
    generator = np.random.default_rng(1)
    tokens = generator.integers(1, 40, 150).astype(float)
    nats = tokens * generator.normal(2.0, 0.5, 150)  # long rows hang together

    estimate = ratio_estimate(nats, tokens, np.arange(150))

    rows = [np.array([[n, t]]) for n, t in zip(nats, tokens, strict=True)]
    assert estimate.value == pytest.approx(ratio(rows))
    assert estimate.standard_error() == pytest.approx(bootstrap_error(ratio, rows), rel=0.08)


def test_rows_of_one_prompt_count_as_one_draw():
    generator = np.random.default_rng(2)
    level = np.repeat(generator.normal(2.0, 0.5, 60), 5)  # five rows of each prompt, nearly alike
    tokens = generator.integers(5, 15, 300).astype(float)
    nats, unit = tokens * level, np.repeat(np.arange(60), 5)

    together = ratio_estimate(nats, tokens, unit).standard_error()
    apart = ratio_estimate(nats, tokens, np.arange(300)).standard_error()

    pairs = np.stack([nats, tokens], axis=1)
    units = [pairs[unit == u] for u in range(60)]
    assert together == pytest.approx(bootstrap_error(ratio, units), rel=0.1)
    assert together > 1.8 * apart


def test_perplexity_gets_its_error_from_the_loss():
    generator = np.random.default_rng(3)
    nats, tokens = generator.random(80) * 10, np.full(80, 5.0)
    loss = ratio_estimate(nats, tokens, np.arange(80))

    perplexity = loss.exp()

    rows = [np.array([[n, t]]) for n, t in zip(nats, tokens, strict=True)]
    oracle = bootstrap_error(lambda units: math.exp(ratio(units)), rows)
    assert perplexity.value == pytest.approx(math.exp(loss.value))
    assert perplexity.standard_error() == pytest.approx(oracle, rel=0.1)


def test_a_paired_difference_has_the_error_of_the_differences():
    generator = np.random.default_rng(4)
    hard = generator.random(50)
    ours, theirs = hard + generator.normal(0, 0.01, 50), hard

    difference = mean_estimate(ours).minus(mean_estimate(theirs))

    assert difference.value == pytest.approx((ours - theirs).mean())
    assert difference.standard_error() == pytest.approx(stats.sem(ours - theirs))


def test_bootstrap_of_a_mean_agrees_with_its_textbook_error():
    scores = np.random.default_rng(5).random((200, 1))

    estimate = corpus_estimate(scores, lambda sums: float(sums[0]) / 200)

    assert estimate.value == pytest.approx(scores.mean())
    assert estimate.standard_error() == pytest.approx(stats.sem(scores[:, 0]), rel=0.08)


def test_the_same_rows_are_drawn_every_time_so_bootstraps_can_be_paired():
    scores = np.random.default_rng(6).random((40, 1))

    def mean(sums):
        return float(sums[0]) / 40

    difference = corpus_estimate(scores + 0.5, mean).minus(corpus_estimate(scores, mean))

    assert difference.value == pytest.approx(0.5)
    assert difference.standard_error() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    "single",
    [
        mean_estimate(np.array([0.5])),
        ratio_estimate(np.array([3.0, 4.0]), np.array([1.0, 1.0]), np.array([7, 7])),
        corpus_estimate(np.array([[1.0]]), lambda sums: float(sums[0])),
    ],
)
def test_one_unit_has_no_error(single: Estimate):
    assert single.standard_error() is None


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("degrees", [1, 2, 3, 5, 20, 500, math.inf])
def test_students_quantile_agrees_with_scipy(confidence: float, degrees: float):
    exact = stats.t.ppf((1 + confidence) / 2, degrees)

    assert student_quantile(confidence, degrees) == pytest.approx(exact, rel=8e-3)
