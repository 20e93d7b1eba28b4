"""A measured number together with how it would wobble on other held-out rows.

A standard error is only right when it knows what was drawn independently. That is the *prompt*, not
the token: the tokens of an answer hang together, and so do the rows that answer one prompt. So each
estimate keeps one *influence* per independent unit: how much that unit moves the number. Then

    SE(estimate)  = sqrt(n / (n - 1) * sum_i influence_i^2)
    SE(a - b)     = the same, of influence_a - influence_b,

which makes every paired comparison one subtraction. For a mean this is the textbook s / sqrt(n).
For the loss, sum(nll) / sum(tokens), it is the linearised ratio estimator of cluster sampling
(Cochran 1977, Sampling Techniques, sec. 6.4), with residuals nll_i - loss * tokens_i. Perplexity
exp(loss) follows by the delta method. Corpus BLEU and chrF are neither means nor ratios: they carry
bootstrap replicates instead (Koehn 2004, W04-3250), drawn with one fixed seed, so the replicates of
two reports on the same prompts are paired as well.

Dims: N rows, U independent units, K bootstrap replicates, S sufficient statistics.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NUM_REPLICATES = 1000
_SEED = 20230523


@dataclass(frozen=True)
class Estimate:
    """A number with the influence of each unit, or with bootstrap replicates (one of the two)."""

    value: float
    influence: Floats | None = None
    """(U,) how much each unit moves the value."""
    replicates: Floats | None = None
    """(K,) the value on resampled rows."""

    def standard_error(self) -> float | None:
        """Return the standard error, or None where fewer than two units were measured."""
        if self.replicates is not None:
            return float(self.replicates.std(ddof=1)) if self.replicates.size > 1 else None
        if self.influence is None or self.influence.size < 2:
            return None
        n = self.influence.size
        return math.sqrt(n / (n - 1) * float(np.square(self.influence).sum()))

    def degrees_of_freedom(self) -> float:
        """Return what a Student interval needs; infinite for replicates."""
        return math.inf if self.influence is None else self.influence.size - 1

    def minus(self, other: "Estimate") -> "Estimate":
        """Return the paired difference; both must be measured on the same units, in order."""
        value = self.value - other.value
        if self.influence is not None and other.influence is not None:
            return Estimate(value, influence=self.influence - other.influence)
        if self.replicates is not None and other.replicates is not None:
            return Estimate(value, replicates=self.replicates - other.replicates)
        raise ValueError("influences and replicates cannot be paired")

    def exp(self) -> "Estimate":
        """Return exp of this estimate, its error by the delta method."""
        value = math.exp(min(self.value, 700.0))
        influence = None if self.influence is None else value * self.influence
        return Estimate(value, influence=influence)


def mean_estimate(scores_N: Floats) -> Estimate:
    """Return the mean of one score per independent row."""
    mean = float(scores_N.mean())
    return Estimate(mean, influence=(scores_N - mean) / scores_N.size)


def ratio_estimate(sums_N: Floats, counts_N: Floats, unit_N: NDArray[np.int64]) -> Estimate:
    """Return sum(sums) / sum(counts), with rows of one unit kept together.

    Args:
        sums_N: What is added up, say nats of a row.
        counts_N: What it is divided by, say supervised tokens of a row.
        unit_N: Which unit a row belongs to: any integers; equal means not independent.
    """
    total = float(counts_N.sum())
    ratio = float(sums_N.sum()) / total
    _, unit = np.unique(unit_N, return_inverse=True)
    residual_N = (sums_N - ratio * counts_N) / total
    return Estimate(ratio, influence=np.bincount(unit, weights=residual_N).astype(np.float64))


def corpus_estimate(stats_NS: Floats, score: Callable[[Floats], float]) -> Estimate:
    """Return ``score(sum of the rows' statistics)`` with bootstrap replicates over rows.

    Args:
        stats_NS: Sufficient statistics of each row, such that a corpus is described by their sum.
        score: Maps (S,) summed statistics to the corpus score.
    """
    n = len(stats_NS)
    value = score(stats_NS.sum(axis=0))
    if n < 2:
        return Estimate(value, replicates=np.empty(0))
    draws_K = np.random.default_rng(_SEED).multinomial(n, np.full(n, 1 / n), size=NUM_REPLICATES)
    return Estimate(value, replicates=np.array([score(sums) for sums in draws_K @ stats_NS]))


def student_quantile(confidence: float, degrees_of_freedom: float) -> float:
    """Return t with P(|T| < t) = ``confidence`` (Abramowitz & Stegun 1964, 26.7.5).

    Exact for 1, 2 and infinitely many degrees of freedom, within 0.2 % for 3 and more at 95 %.
    """
    p = (1 + confidence) / 2
    if degrees_of_freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if degrees_of_freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z, v = NormalDist().inv_cdf(p), degrees_of_freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v ** (i + 1) for i, term in enumerate(terms))
