"""A summary as text."""

from collections.abc import Callable, Mapping

from benchmarks.training.summary import Line, Ratio, Spread, Summary, Target

_GB = 1e9


def table(summary: Summary, left_out: Mapping[str, str]) -> str:
    """Return the lines, the ratios, the targets, and why systems were left out."""
    rows = [list(_COLUMNS), *([cell(line) for cell in _COLUMNS.values()] for line in summary.lines)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(_COLUMNS))]
    text = [_aligned(row, widths) for row in rows]
    text += ["", *(_said(ratio) for ratio in summary.ratios)]
    text += ["", *(_judged(target) for target in summary.targets)]
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


def _judged(target: Target) -> str:
    show = _UNITS[target.unit]
    limit = "not above" if target.unit == "bytes" else "at least"
    verdict = "reached" if target.is_reached else "missed"
    return (
        f"target {verdict}: {target.what}: {show(target.found)}, wanted {limit} "
        f"{show(target.wanted)}"
    )


def _ranged(found: Spread) -> str:
    return f"{found.median:.0f} ({found.low:.0f}-{found.high:.0f})"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _difference(difference: float | None, is_known: bool) -> str:
    if not is_known:
        return "-"
    return "other rows" if difference is None else f"{difference:.1e}"


_UNITS: dict[str, Callable[[float], str]] = {
    "times": lambda value: f"{value:.2f}",
    "share": lambda value: f"{value:.0%}",
    "bytes": lambda value: f"{value / _GB:.2f} GB",
}

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
    "loss - plain": lambda line: _difference(line.loss_difference, line.has_plain),
    "loss - TRL": lambda line: _difference(line.trl_loss_difference, line.has_trl),
}
