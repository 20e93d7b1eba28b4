"""What a quantised base costs before and after training, with intervals that cover rows and seeds.

Two things were drawn at random: the *meaning representations* that are asked (rows of one belong
together), and the *seeds* (order of the rows, so which of them are seen, and the adapter's start).
All seeds are asked the same rows, so the two are crossed, and each gives the mean difference an
error of its own: e_units from the influences (or bootstrap replicates) of
`qlora_core.evaluation.estimates`, averaged over seeds first, and e_seeds = s / sqrt(S) from the
seeds' differences. Each brings its own Student quantile to the interval,

    mean  +-  sqrt((t_[U - 1] e_units)^2 + (t_[S - 1] e_seeds)^2),

which for three seeds is 4.3 standard errors: that is how little three seeds can tell. (One quantile
for both, with Satterthwaite's degrees of freedom, held the truth 93 times in a hundred where 95
were promised; drawing three seeds in a bootstrap has ten outcomes, and a variance a third too
small.) What belongs to a unit *and* a seed is counted in both: rather too wide than too narrow.
Source: Zou and Donner 2008, doi:10.1002/sim.3095, on adding intervals of independent parts.

Everything is paired: the same rows for both methods, and seed s of one against seed s of the other.
The share won back is 1 - after / before. It divides by a measured number, so it is only given where
that number's interval lies on the side of a cost, clear of zero; its error is by the delta method.
Dims: S seeds, U units.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qlora_core.evaluation.estimates import Estimate, student_quantile
from qlora_core.evaluation.metrics import LOSS_METRICS, estimate_metric
from qlora_core.evaluation.records import Records

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A number, and how far it may be off."""

    value: float
    low: float
    high: float
    """`low` to `high` is the interval at `CONFIDENCE`."""
    units_error: float
    """Standard error for other rows."""
    seeds_error: float | None
    """Standard error for other seeds; none where no seed takes part, or just one."""
    by_seed: tuple[float, ...] = ()
    """The number of each seed."""


@dataclass(frozen=True)
class Answers:
    """What one method's models gave the held-out rows."""

    before: Records
    """The untuned base."""
    after: tuple[Records, ...]
    """One for each seed."""


@dataclass(frozen=True)
class Comparison:
    """One metric of two methods."""

    metric: str
    before: dict[str, float]
    """The untuned base's value, by method."""
    after: dict[str, tuple[float, ...]]
    """The tuned model's value for each seed, by method."""
    difference_before: Interval
    """Quantised minus unquantised, untuned."""
    difference_after: Interval
    """The same when tuned, mean over seeds."""
    won_back: Interval | None
    """Share of the untuned cost that training made good; none where there may be no cost."""


def compare(metric: str, quantized: str, whole: str, answers: Mapping[str, Answers]) -> Comparison:
    """Compare two methods on one metric.

    Args:
        metric: `loss` or a scorer's name.
        quantized: The method whose cost is asked for.
        whole: What it is compared with.
        answers: By method; the same rows and the same seeds, in order.

    Raises:
        ValueError: The methods have unequal numbers of seeds.
    """
    ours, theirs = answers[quantized], answers[whole]
    before = {name: estimate_metric(metric, answers[name].before) for name in (quantized, whole)}
    after = {
        name: [estimate_metric(metric, records) for records in answers[name].after]
        for name in (quantized, whole)
    }
    if len(ours.after) != len(theirs.after):
        raise ValueError(f"{len(ours.after)} seeds of {quantized}, {len(theirs.after)} of {whole}")
    cost_before = before[quantized].minus(before[whole])
    costs_after = [a.minus(b) for a, b in zip(after[quantized], after[whole], strict=True)]
    difference_before = interval_of([cost_before], has_seeds=False)
    return Comparison(
        metric=metric,
        before={name: found.value for name, found in before.items()},
        after={name: tuple(e.value for e in found) for name, found in after.items()},
        difference_before=difference_before,
        difference_after=interval_of(costs_after),
        won_back=interval_of([share_won_back(cost_before, cost) for cost in costs_after])
        if _is_cost(metric, difference_before)
        else None,
    )


def _is_cost(metric: str, difference: Interval) -> bool:
    return difference.low > 0 if metric in LOSS_METRICS else difference.high < 0


def interval_of(by_seed: Sequence[Estimate], *, has_seeds: bool = True) -> Interval:
    """Return the mean over seeds, and its interval over rows and seeds.

    Args:
        by_seed: The number as each seed gives it, all measured on the same units.
        has_seeds: No for what training has no part in.
    """
    values = [estimate.value for estimate in by_seed]
    mean = _mean(by_seed)
    units_error = mean.standard_error() or 0.0
    seeds_error = None
    margin = units_error * student_quantile(CONFIDENCE, mean.degrees_of_freedom())
    if has_seeds and len(values) > 1:
        seeds_error = statistics.stdev(values) / math.sqrt(len(values))
        margin = math.hypot(margin, seeds_error * student_quantile(CONFIDENCE, len(values) - 1))
    return Interval(
        value=mean.value,
        low=mean.value - margin,
        high=mean.value + margin,
        units_error=units_error,
        seeds_error=seeds_error,
        by_seed=tuple(values) if has_seeds else (),
    )


def share_won_back(before: Estimate, after: Estimate) -> Estimate:
    """Return ``1 - after / before``, both on the same units."""
    kept = after.value / before.value
    if before.influence is not None and after.influence is not None:
        influence = (kept * before.influence - after.influence) / before.value
        return Estimate(1 - kept, influence=influence)
    if before.replicates is not None and after.replicates is not None:
        moved = kept * (before.replicates - before.value) - (after.replicates - after.value)
        return Estimate(1 - kept, replicates=1 - kept + moved / before.value)
    raise ValueError("influences and replicates cannot be paired")


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    value = statistics.fmean(estimate.value for estimate in estimates)
    influences = [e.influence for e in estimates if e.influence is not None]
    if influences:
        return Estimate(value, influence=np.mean(influences, axis=0))
    replicates = [e.replicates for e in estimates if e.replicates is not None]
    return Estimate(value, replicates=np.mean(replicates, axis=0))
