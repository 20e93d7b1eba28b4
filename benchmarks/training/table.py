"""A summary as text."""

from collections.abc import Callable, Mapping

from benchmarks.training.summary import Line, Ratio, Spread, Summary

_GB = 1e9


def table(summary: Summary, left_out: Mapping[str, str]) -> str:
    """Return the lines, the ratios, and why systems were left out."""
    rows = [list(_COLUMNS), *([cell(line) for cell in _COLUMNS.values()] for line in summary.lines)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(_COLUMNS))]
    text = [_aligned(row, widths) for row in rows]
    text += ["", *(_said(ratio) for ratio in summary.ratios)]
    text += [f"{system} left out: {why}" for system, why in left_out.items()]
    return "\n".join(text)


def _aligned(row: list[str], widths: list[int]) -> str:
    first = row[0].ljust(widths[0])
    rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
    return "  ".join([first, *rest])


def _said(ratio: Ratio) -> str:
    found = ratio.spread
    return (
        f"ours / {ratio.against}, tokens per {ratio.per}: {found.median:.2f} "
        f"({found.low:.2f} to {found.high:.2f})"
    )


def _ranged(found: Spread) -> str:
    return f"{found.median:.0f} ({found.low:.0f}-{found.high:.0f})"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _difference(line: Line) -> str:
    if not line.has_plain:
        return "-"
    return "other rows" if line.loss_difference is None else f"{line.loss_difference:.1e}"


_COLUMNS: dict[str, Callable[[Line], str]] = {
    "system": lambda line: line.system,
    "tok/s@cpu": lambda line: _ranged(line.tokens_per_cpu_s),
    "tok/s": lambda line: _ranged(line.tokens_per_wall_s),
    "superv./s": lambda line: f"{line.supervised_per_wall_s.median:.0f}",
    "epoch s": lambda line: f"{line.epoch_s.median:.0f}",
    "processed/real": lambda line: f"{line.padding:.2f}",
    "peak GB": lambda line: f"{line.peak_memory_bytes.median / _GB:.1f}",
    "matrix rate@cpu": lambda line: _share(line.matrix_share_cpu),
    "matrix rate": lambda line: _share(line.matrix_share_wall),
    "last loss": lambda line: f"{line.final_loss:.4f}",
    "loss - plain": _difference,
}
