"""From measurements of several rounds to what the table says. Pure arithmetic, Python alone."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.cases import Case

OURS = "ours"


@dataclass
class Result:
    """What was found about one case."""

    case: Case
    rounds: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    """Of each round what each system measured."""
    fitting: dict[str, Case] = field(default_factory=dict)
    """The case with the passes that fit, of each system."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Systems that could not be measured, and why."""
    agreement: dict[str, Any] | None = None
    agreement_failed: str = ""


@dataclass(frozen=True)
class Line:
    """One system on one case."""

    case: str
    system: str
    tokens_per_s: float
    """Median over rounds; then the lowest and the highest."""
    lowest: float
    highest: float
    matrix_share: float
    """Of the measured rate of large products: 4 FLOP for each weight and token, 6 for those of
    layers where activations were recomputed."""
    planned_bytes: int | None
    """The peak that was expected, if the system expects one."""
    peak_bytes: int
    peak_ever_bytes: int
    micro_batch: int
    recomputes: bool
    is_fused: bool
    """Whether kernels besides torch's were used, in every round."""
    last_loss: float
    ours_is_faster: float | None
    """Median over rounds of ours over this system's tokens per second; none for ours."""


def summarise(results: Sequence[Result], matrix_rate: float) -> list[Line]:
    """Return a line for every system that was measured."""
    lines = []
    for result in results:
        for system in dict.fromkeys(name for each in result.rounds for name in each):
            lines.append(_line(result, system, matrix_rate))
    return lines


def _line(result: Result, system: str, matrix_rate: float) -> Line:
    measured = [each[system] for each in result.rounds if system in each]
    rates = [_rate(m) for m in measured]
    last, rate = measured[-1], statistics.median(rates)
    # a layer's forward pass is computed again, the head's never
    flop = (6 if last["recomputes"] else 4) * last["num_body"] + 4 * last["num_head"]
    both = [each for each in result.rounds if system in each and OURS in each]
    ratios = [_rate(each[OURS]) / _rate(each[system]) for each in both]
    return Line(
        case=result.case.name,
        system=system,
        tokens_per_s=rate,
        lowest=min(rates),
        highest=max(rates),
        matrix_share=flop * rate / matrix_rate,
        planned_bytes=last["planned_bytes"],
        peak_bytes=max(m["peak_bytes"] for m in measured),
        peak_ever_bytes=max(m["peak_ever_bytes"] for m in measured),
        micro_batch=min(m["micro_batch"] for m in measured),
        recomputes=last["recomputes"],
        is_fused=all(m["is_fused"] for m in measured),
        last_loss=last["losses"][-1],
        ours_is_faster=statistics.median(ratios) if ratios and system != OURS else None,
    )


def _rate(measured: dict[str, Any]) -> float:
    return float(measured["num_tokens"] / measured["seconds"])
