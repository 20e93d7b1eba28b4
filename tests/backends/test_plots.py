import math

import matplotlib.image
import matplotlib.pyplot
import numpy as np

from qlora_core.artifacts import Metric
from qlora_core.backends.plots import plot_comparison, plot_lengths, plot_loss


def colours(path) -> int:
    """Number of distinct colours: an empty picture has few."""
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).astype(int)
    return len(np.unique(pixels @ np.array([1, 256, 65536])))


def test_a_loss_curve_is_drawn_with_and_without_held_out_points(tmp_path):
    train = [(step, 2 / step) for step in range(1, 200)]

    both = plot_loss(tmp_path / "both.png", train, [(100, 0.5), (199, 0.3)])
    alone = plot_loss(tmp_path / "alone.png", train)
    short = plot_loss(tmp_path / "short.png", [(1, 2.0), (2, math.nan)])

    assert colours(both) > colours(alone) > 10
    assert colours(short) > 10


def test_lengths_are_drawn_even_of_one_bin_or_none(tmp_path):
    many = plot_lengths(tmp_path / "many.png", [(10, 5), (20, 9), (40, 1)], max_length=50)
    one = plot_lengths(tmp_path / "one.png", [(7, 5)])
    none = plot_lengths(tmp_path / "none.png", [])

    assert colours(many) > 10
    assert one.is_file()
    assert none.is_file()


def test_a_metric_that_one_subject_lacks_leaves_its_bar_out(tmp_path):
    loss = Metric(value=1.0, standard_error=0.1, num_rows=9, higher_is_better=False)
    match = Metric(value=0.5, num_rows=9)

    drawn = plot_comparison(
        tmp_path / "cmp.png", {"base": {"loss": loss}, "tuned": {"loss": loss, "match": match}}
    )

    assert colours(drawn) > 10


def test_drawing_leaves_no_figure_behind(tmp_path):
    plot_loss(tmp_path / "loss.png", [(1, 1.0)])

    assert matplotlib.pyplot.get_fignums() == []
