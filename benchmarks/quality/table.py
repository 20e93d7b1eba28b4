"""Comparisons as text."""

from collections.abc import Sequence

from benchmarks.quality.comparison import Comparison, Interval

_DIGITS = {"loss": 3}
_UNITS = {"loss": "nats per token", "bleu": "points"}


def table(comparisons: Sequence[Comparison], quantized: str, whole: str) -> str:
    """Return, for each metric, both methods before and after training, and what separates them."""
    header = ["", whole, quantized, f"{quantized} - {whole}, 95 % interval", "each seed"]
    rows = [header, *(row for found in comparisons for row in _rows(found, quantized, whole))]
    widths = [max(len(row[place]) for row in rows) for place in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, "", *(_said(found) for found in comparisons)])


def _rows(found: Comparison, quantized: str, whole: str) -> list[list[str]]:
    digits = _DIGITS.get(found.metric, 1)
    before, after = found.before, found.after
    return [
        [
            f"{found.metric}, before training",
            f"{before[whole]:.{digits}f}",
            f"{before[quantized]:.{digits}f}",
            _ranged(found.difference_before, digits),
            "",
        ],
        [
            f"{found.metric}, after training",
            f"{_mean(after[whole]):.{digits}f}",
            f"{_mean(after[quantized]):.{digits}f}",
            _ranged(found.difference_after, digits),
            ", ".join(f"{value:+.{digits}f}" for value in found.difference_after.by_seed),
        ],
    ]


def _ranged(found: Interval, digits: int) -> str:
    return f"{found.value:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f})"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _said(found: Comparison) -> str:
    unit = _UNITS.get(found.metric, "")
    won = found.won_back
    if won is None:
        return (
            f"{found.metric} [{unit}]: before training there is no cost beyond the noise, so there "
            "is nothing of which a share could be won back."
        )
    seeds = ", ".join(f"{value:.0%}" for value in won.by_seed)
    return (
        f"{found.metric} [{unit}]: training wins back {won.value:.0%} of the cost "
        f"({won.low:.0%} to {won.high:.0%}; each seed: {seeds})."
    )
