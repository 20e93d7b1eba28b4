"""Pictures of a run, as PNG: loss curve, lengths of the rows, base against tuned against merged.

Each function takes plain values and writes one file. `Figure` objects with the Agg canvas and not
pyplot: pyplot keeps a global list of figures, looks for a display and may not be used from a
thread, and stages run in threads.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qlora_core.artifacts import Metric

_TRAIN, _HELDOUT = "#7aa6d8", "#c4421a"
_SUBJECTS = {"base": "#b5b5b5", "tuned": "#2f6db3", "merged": "#2a9d6f"}
_INK = "#333333"
_DPI = 120
_Z95 = 1.96


def plot_loss(
    path: Path,
    train: Sequence[tuple[int, float]],
    heldout: Sequence[tuple[int, float]] = (),
    title: str = "",
) -> Path:
    """Draw training and held-out loss over the optimizer steps.

    Args:
        path: The PNG to write.
        train: (step, loss) [nats per supervised token].
        heldout: The same on held-out rows; may be sparse or empty.
        title: Above the picture.

    Returns:
        ``path``.
    """
    figure, axes = _new_figure(title)
    steps, losses = _columns(train)
    smooth = _smoothed(losses)
    if smooth is not None:
        axes.plot(steps, losses, color=_TRAIN, linewidth=0.8, alpha=0.45, label="training, a step")
        axes.plot(steps, smooth, color=_TRAIN, linewidth=2, label="training, smoothed")
    else:
        axes.plot(steps, losses, color=_TRAIN, linewidth=2, label="training")
    if heldout:
        at, values = _columns(heldout)
        axes.plot(at, values, "o-", color=_HELDOUT, linewidth=1.5, markersize=5, label="held out")
        axes.annotate(
            f"{values[-1]:.3f}", (at[-1], values[-1]), (0, 8), textcoords="offset points",
            ha="right", color=_HELDOUT,
        )  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="loss [nats per supervised token]")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _save(figure, path)


def plot_lengths(
    path: Path,
    histogram: Sequence[tuple[int, int]],
    max_length: int | None = None,
    title: str = "",
) -> Path:
    """Draw how long the rows are.

    Args:
        path: The PNG to write.
        histogram: (upper edge in tokens, rows) of each bin, edges rising.
        max_length: Longest row that is kept [tokens]; drawn where it is near.
        title: Above the picture.

    Returns:
        ``path``.
    """
    figure, axes = _new_figure(title)
    axes.set(xlabel="length of a row [tokens]", ylabel="rows")
    if not histogram:
        return _save(figure, path)
    uppers, counts = _columns(histogram)
    first_width = uppers[1] - uppers[0] if len(uppers) > 1 else max(1.0, uppers[0])
    lowers = np.concatenate([[max(0.0, uppers[0] - first_width)], uppers[:-1]])
    axes.bar(lowers, counts, width=uppers - lowers, align="edge", color=_TRAIN, edgecolor="white")
    if max_length is not None and max_length <= 1.5 * uppers[-1]:
        axes.axvline(max_length, color=_HELDOUT, linestyle="--", label=f"max_length {max_length}")
        axes.legend(frameon=False)
    return _save(figure, path)


def plot_comparison(
    path: Path, reports: Mapping[str, Mapping[str, Metric]], title: str = ""
) -> Path:
    """Draw each metric of base, tuned and merged model side by side, with 95 % intervals.

    One panel for a metric, as their units differ.

    Args:
        path: The PNG to write.
        reports: Metrics by name, by subject (`base`, `tuned`, `merged`).
        title: Above the picture.

    Returns:
        ``path``.
    """
    names = list(dict.fromkeys(name for metrics in reports.values() for name in metrics))
    figure = Figure(figsize=(1.2 + 2.4 * len(names), 3.8), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, color=_INK)
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        found = {subject: m[name] for subject, m in reports.items() if name in m}
        _draw_bars(axes, name, found)
    return _save(figure, path)


def _draw_bars(axes: Axes, name: str, metrics: Mapping[str, Metric]) -> None:
    for place, (subject, metric) in enumerate(metrics.items()):
        error = None if metric.standard_error is None else _Z95 * metric.standard_error
        axes.bar(
            place, metric.value, yerr=error, capsize=5, width=0.7, ecolor=_INK,
            color=_SUBJECTS.get(subject, _TRAIN),
        )  # fmt: skip
        top = (metric.value + (error or 0.0)) if metric.value >= 0 else 0.0
        axes.annotate(
            f"{metric.value:.3g}", (place, top), (0, 3), textcoords="offset points",
            ha="center", color=_INK,
        )  # fmt: skip
    better = (
        "higher is better" if next(iter(metrics.values())).higher_is_better else ("lower is better")
    )
    axes.set_xticks(range(len(metrics)), list(metrics))
    axes.set_title(f"{name}\n{better}", fontsize=10, color=_INK)
    axes.set_ylabel(_unit(metrics), color=_INK)
    axes.margins(y=0.12)
    _strip(axes)


def _unit(metrics: Mapping[str, Metric]) -> str:
    return next((metric.unit for metric in metrics.values() if metric.unit), "")


def _new_figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, color=_INK)
    _strip(axes)
    return figure, axes


def _strip(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def _columns(pairs: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.asarray(pairs, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _smoothed(values: np.ndarray) -> np.ndarray | None:
    """Return a running mean over about a twentieth of the steps; None where that is few."""
    width = len(values) // 20
    if width < 3:
        return None
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
