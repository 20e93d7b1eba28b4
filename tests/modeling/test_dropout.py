"""Dropout by row, against arithmetic: shares, scales, and which masks differ."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from qlora_core.modeling.dropout import DrawnPass, dropped_by_row

WIDTH = 64
LENGTHS = {4: 200, 7: 90, 9: 150}
"""Tokens of rows, by their place in the dataset."""


class TwoLayers(nn.Module):
    """Two dropouts on one input, as adapters of sibling layers have."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.first, self.second = nn.Dropout(rate), nn.Dropout(rate)

    def forward(self, x):
        return self.first(x), self.second(x)


def drawn_pass(rows=(4, 7, 9), *, seed=1, step=5, padded_to=None) -> DrawnPass:
    return DrawnPass(seed, step, rows, [LENGTHS[row] for row in rows], padded_to)


def dropped(drawn: DrawnPass, rate: float = 0.3, shape: tuple[int, ...] | None = None):
    """Return what two layers make of ones, row by row: {row: (first, second)}."""
    model = TwoLayers(rate).train()
    x = torch.ones(shape or (1, drawn.num_tokens, WIDTH))
    with dropped_by_row(model) as dropout, dropout.drawing(drawn):
        outputs = [y.reshape(-1, WIDTH) for y in model(x)]
    found, start = {}, 0
    for row, length in zip(drawn.rows, drawn.lengths, strict=True):
        found[row] = tuple(y[start : start + length] for y in outputs)
        start += drawn.padded_to or length
    return found


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_a_share_of_1_minus_p_is_kept_and_scaled_by_its_inverse(rate):
    found = torch.cat([y for pair in dropped(drawn_pass(), rate).values() for y in pair])

    kept = found[found != 0]
    deviation = (rate * (1 - rate) / found.numel()) ** 0.5  # of a binomial's share
    assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))
    assert len(kept) / found.numel() == pytest.approx(1 - rate, abs=5 * deviation)


def share_alike(one, other) -> float:
    """Return the share of places at which both keep or both drop."""
    size = min(len(one), len(other))
    return float(((one[:size] != 0) == (other[:size] != 0)).float().mean())


def test_rows_layers_steps_and_seeds_have_masks_that_know_nothing_of_each_other():
    found = dropped(drawn_pass())
    masks = [
        found[4][0],
        found[4][1],  # another layer
        found[9][0],  # another row
        dropped(drawn_pass(step=6))[4][0],
        dropped(drawn_pass(seed=2))[4][0],
    ]

    alike = [share_alike(a, b) for place, a in enumerate(masks) for b in masks[:place]]

    by_chance = 0.7**2 + 0.3**2
    assert alike == pytest.approx([by_chance] * 10, abs=0.03)


@pytest.mark.parametrize(
    ("others", "shape"),
    [
        (drawn_pass((4,)), None),
        (drawn_pass((9, 4)), None),
        (drawn_pass((9, 4)), (350, WIDTH)),
        (drawn_pass((7, 4), padded_to=230), (2, 230, WIDTH)),
        (drawn_pass((7, 4), padded_to=230), (460, WIDTH)),
    ],
)
def test_a_rows_masks_do_not_depend_on_its_pass(others, shape):
    expected = dropped(drawn_pass())[4]

    found = dropped(others, shape=shape)[4]

    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_the_gradient_goes_where_the_output_came_from():
    model, drawn = TwoLayers(0.4).train(), drawn_pass()
    x = torch.randn(1, drawn.num_tokens, WIDTH, requires_grad=True)

    with dropped_by_row(model) as dropout, dropout.drawing(drawn):
        output, _ = model(x)
        (gradient,) = torch.autograd.grad(output.sum(), x)

    assert_close(gradient * x, output)  # linear, without a constant
    assert 0 < int((gradient == 0).sum()) < x.numel()


def test_nothing_of_the_callers_random_state_is_used():
    torch.manual_seed(0)
    before = torch.get_rng_state()

    dropped(drawn_pass())

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(1, 439, WIDTH), (440, 1, WIDTH), (2, 3, 440, WIDTH)])
def test_tokens_that_do_not_lie_as_the_rows_do_are_dropped_as_torch_does(shape):
    model, x = TwoLayers(0.3).train(), torch.ones(shape)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)

    with dropped_by_row(model) as dropout, dropout.drawing(drawn_pass()):
        found = model(x)

    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_a_model_that_does_not_train_drops_nothing_and_has_its_dropout_back_afterwards():
    model, x = TwoLayers(0.3), torch.ones(1, 440, WIDTH)

    with dropped_by_row(model.eval()) as dropout, dropout.drawing(drawn_pass()):
        assert torch.equal(model(x)[0], x)

    assert "forward" not in vars(model.first)
    assert "forward" not in vars(model.second)


def test_a_model_without_dropout_needs_none():
    with dropped_by_row(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0))) as dropout:
        assert dropout is None
