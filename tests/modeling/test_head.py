"""Head and loss in one against torch's cross-entropy on whole logits, in float64."""

import pytest
import torch
import torch.nn.functional as F

from qlora_core.modeling import head
from qlora_core.modeling.head import cross_entropy_sum


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=generator)
    weight = torch.randn(300, 16, generator=generator)
    labels = torch.randint(300, (37,), generator=generator)
    return hidden, weight, labels


@pytest.mark.parametrize("rows_at_once", [1, 10, 37, 1000])
def test_loss_and_gradient_are_those_of_whole_logits(inputs, rows_at_once, monkeypatch):
    hidden, weight, labels = inputs
    monkeypatch.setattr(head, "CHUNK_BYTES", rows_at_once * 4 * len(weight))
    ours, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()

    found = cross_entropy_sum(ours, weight, labels)
    (found / 7).backward()

    expected = F.cross_entropy(exact @ weight.double().T, labels, reduction="sum")
    (expected / 7).backward()
    assert abs(float(found) - float(expected)) <= 1e-6 * float(expected)
    assert (ours.grad - exact.grad).norm() <= 1e-6 * exact.grad.norm()


def test_where_no_gradient_is_wanted_none_is_computed(inputs):
    hidden, weight, labels = inputs

    loss = cross_entropy_sum(hidden, weight, labels)

    assert not loss.requires_grad
    assert float(loss) == pytest.approx(
        float(F.cross_entropy(hidden @ weight.T, labels, reduction="sum")), rel=1e-6
    )


def test_certain_and_hopeless_predictions_stay_finite(inputs):
    hidden, weight, labels = inputs
    ours = (1e4 * hidden).requires_grad_()

    cross_entropy_sum(ours, weight, labels).backward()

    assert torch.isfinite(ours.grad).all()
