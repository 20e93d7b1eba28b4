"""Base, tuned and merged model side by side, for people."""

from dataclasses import dataclass

from qlora_core.artifacts import Artifact, EvalReport, Metric
from qlora_core.evaluation.significance import Comparison, compare_reports


@dataclass(frozen=True)
class TableRow:
    """One metric of all subjects."""

    metric: str
    base: Metric
    tuned: Metric
    merged: Metric | None
    tuned_against_base: Comparison
    merged_against_tuned: Comparison | None
    """What merging changed."""


def side_by_side(
    base: Artifact[EvalReport],
    tuned: Artifact[EvalReport],
    merged: Artifact[EvalReport] | None,
    confidence: float = 0.95,
) -> tuple[TableRow, ...]:
    """Return one row for each metric that base and tuned model share, in the report's order.

    Raises:
        ArtifactError: A report's rows cannot be read.
    """
    shared = [name for name in tuned.facts.metrics if name in base.facts.metrics]
    return tuple(_row(name, base, tuned, merged, confidence) for name in shared)


def _row(
    name: str,
    base: Artifact[EvalReport],
    tuned: Artifact[EvalReport],
    merged: Artifact[EvalReport] | None,
    confidence: float,
) -> TableRow:
    has_merged = merged is not None and name in merged.facts.metrics
    return TableRow(
        metric=name,
        base=base.facts.metrics[name],
        tuned=tuned.facts.metrics[name],
        merged=merged.facts.metrics[name] if merged and has_merged else None,
        tuned_against_base=compare_reports(tuned, base, name, confidence),
        merged_against_tuned=(
            compare_reports(merged, tuned, name, confidence) if merged and has_merged else None
        ),
    )
