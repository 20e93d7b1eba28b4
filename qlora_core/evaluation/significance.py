"""Is the difference between two reports more than noise?

Reports on the same rows are *paired*: what makes a row hard makes it hard for both models, so the
error of the difference is far smaller than that of either number. Rows that differ, or a champion
of which only its metrics are known, are compared as independent, which is the wider interval.

Two traps. (1) Scores of 0 or 1 that all agree have a sample variance of zero, and two lucky rows
would prove anything; there the interval is Bonett and Price's (2012, doi:10.3102/1076998611411915),
which adds one made-up row in favour of each side. (2) A difference is signed as computed
(candidate - reference); `Comparison.improvement` turns it so that more is better.
"""

import math

import numpy as np

from qlora_core.artifacts import Artifact, EvalReport, Frozen, Metric
from qlora_core.errors import UserError
from qlora_core.evaluation.estimates import Estimate, student_quantile
from qlora_core.evaluation.metrics import CORPUS_METRICS, LOSS_METRICS, estimate_metric
from qlora_core.evaluation.records import Records, read_records


class Comparison(Frozen):
    """One metric of two models, and the interval of their difference."""

    metric: str
    candidate: float
    reference: float
    difference: float
    """``candidate - reference``."""
    standard_error: float | None
    """Of the difference; none where too few rows were measured."""
    interval: tuple[float, float] | None
    """Of the difference, at `confidence`."""
    confidence: float
    paired: bool
    num_rows: int
    higher_is_better: bool

    def improvement(self) -> tuple[float, float] | None:
        """Return the interval turned so that positive means that the candidate is better."""
        if self.interval is None or self.higher_is_better:
            return self.interval
        return -self.interval[1], -self.interval[0]

    def is_better(self) -> bool:
        """Say whether the candidate is better by more than the noise."""
        improvement = self.improvement()
        return improvement is not None and improvement[0] > 0


def compare_reports(
    candidate: Artifact[EvalReport],
    reference: Artifact[EvalReport],
    metric: str,
    confidence: float = 0.95,
) -> Comparison:
    """Compare one metric of two reports: paired when they measured the same rows.

    Raises:
        UserError: A report has no such metric.
        ArtifactError: A report's rows cannot be read.
    """
    metrics = _metric(candidate.facts, metric), _metric(reference.facts, metric)
    if candidate.facts.dataset_digest != reference.facts.dataset_digest:
        return compare_metrics(metric, *metrics, confidence)
    rows = read_records(candidate.path), read_records(reference.path)
    return compare_rows(metric, *rows, confidence, higher_is_better=metrics[0].higher_is_better)


def compare_rows(
    metric: str,
    candidate: Records,
    reference: Records,
    confidence: float = 0.95,
    *,
    higher_is_better: bool = True,
) -> Comparison:
    """Compare two models row by row; both must have measured the same rows in the same order."""
    ours, theirs = estimate_metric(metric, candidate), estimate_metric(metric, reference)
    difference = ours.minus(theirs)
    return Comparison(
        metric=metric,
        candidate=ours.value,
        reference=theirs.value,
        difference=difference.value,
        standard_error=difference.standard_error(),
        interval=_binary_interval(metric, candidate, reference, confidence)
        or _interval(difference, confidence),
        confidence=confidence,
        paired=True,
        num_rows=_num_rows(metric, candidate),
        higher_is_better=higher_is_better,
    )


def compare_metrics(
    metric: str, candidate: Metric, reference: Metric, confidence: float = 0.95
) -> Comparison:
    """Compare two numbers of which only the standard errors are known, as if independent."""
    errors = [_known_error(m) for m in (candidate, reference)]
    error = None if None in errors else math.hypot(*(e for e in errors if e is not None))
    difference = candidate.value - reference.value
    num_rows = min(candidate.num_rows, reference.num_rows)
    margin = None if error is None else error * student_quantile(confidence, max(1, num_rows - 1))
    return Comparison(
        metric=metric,
        candidate=candidate.value,
        reference=reference.value,
        difference=difference,
        standard_error=error,
        interval=None if margin is None else (difference - margin, difference + margin),
        confidence=confidence,
        paired=False,
        num_rows=num_rows,
        higher_is_better=candidate.higher_is_better,
    )


def _metric(report: EvalReport, name: str) -> Metric:
    if name in report.metrics:
        return report.metrics[name]
    raise UserError(
        f"{name} was not measured on the {report.subject} model.",
        why="; ".join(report.notes),
        fix=f"Set gate.metric to one of {', '.join(report.metrics)}.",
    )


def _num_rows(metric: str, records: Records) -> int:
    return len(records.losses if metric in LOSS_METRICS else records.answers)


def _known_error(metric: Metric) -> float | None:
    """Return the standard error; n equal scores are not free of noise (rule of succession)."""
    if metric.standard_error == 0.0 and metric.num_rows:
        return 1 / (metric.num_rows + 2)
    return metric.standard_error


def _interval(difference: Estimate, confidence: float) -> tuple[float, float] | None:
    error = difference.standard_error()
    if error is None:
        return None
    margin = error * student_quantile(confidence, difference.degrees_of_freedom())
    return difference.value - margin, difference.value + margin


def _binary_interval(
    metric: str, candidate: Records, reference: Records, confidence: float
) -> tuple[float, float] | None:
    """Return Bonett and Price's interval where all scores are 0 or 1, else None."""
    if metric in (*LOSS_METRICS, *CORPUS_METRICS):
        return None
    ours, theirs = (
        np.array([answer.scores[metric] for answer in records.answers])
        for records in (candidate, reference)
    )
    if ours.size < 2 or not np.isin(np.concatenate([ours, theirs]), (0.0, 1.0)).all():
        return None
    shrunk = np.concatenate([ours - theirs, [1.0, -1.0]])
    center, error = float(shrunk.mean()), float(shrunk.std()) / math.sqrt(shrunk.size)
    margin = error * student_quantile(confidence, math.inf)
    return max(-1.0, center - margin), min(1.0, center + margin)
