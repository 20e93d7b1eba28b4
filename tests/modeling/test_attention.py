"""Packed attention against plain attention in float64, row by row."""

import pytest
import torch
import torch.nn.functional as F

from qlora_core.modeling.attention import attend_grouped
from qlora_core.modeling.packing import Layout


def states(num_tokens: int, heads: int, groups: int, size: int) -> torch.Tensor:
    """Queries, keys and values side by side, as one product leaves them."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_tokens, (heads + 2 * groups) * size, generator=generator)


def parts(packed, heads, groups, size):
    sizes = [heads * size, groups * size, groups * size]
    return [p.view(1, len(packed), -1, size).transpose(1, 2) for p in packed.split(sizes, 1)]


def in_float64(packed, layout, heads, groups, size):
    """Every row by itself, on a copy of the prefix, by torch."""
    q, k, v = parts(packed, heads, groups, size)
    k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
    outputs = []
    for own, before in layout.spans():
        seen_k, seen_v = (torch.cat([x[:, :, :before], x[:, :, own]], 2) for x in (k, v))
        length = own.stop - own.start
        mask = torch.ones(length, before + length).tril(before).bool()
        row = F.scaled_dot_product_attention(q[:, :, own], seen_k, seen_v, attn_mask=mask)
        outputs.append(row.transpose(1, 2))
    return torch.cat(outputs, 1)


@pytest.mark.parametrize(
    ("layout", "heads", "groups", "size"),
    [
        (Layout(0, (5,)), 4, 4, 8),
        (Layout(0, (1, 64, 65, 3)), 6, 2, 16),
        (Layout(7, (3, 70, 128, 1)), 9, 3, 8),
        (Layout(100, (200, 30)), 4, 1, 8),
        (Layout(0, (530, 20)), 2, 1, 8),
        (Layout(20, (500,)), 2, 2, 8),
    ],
    ids=["one row", "around a block", "prefix", "long prefix", "recomputed", "recomputed, prefix"],
)
def test_output_and_gradients_are_those_of_each_row_alone(layout, heads, groups, size):
    packed = states(layout.num_tokens, heads, groups, size)
    ours = packed.clone().requires_grad_()
    exact = packed.double().requires_grad_()

    found = attend_grouped(*parts(ours, heads, groups, size), layout, size**-0.5)
    expected = in_float64(exact, layout, heads, groups, size)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()

    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert (ours.grad - exact.grad).norm() <= 1e-6 * exact.grad.norm()


def test_a_row_does_not_look_at_another_one_or_at_what_comes_later():
    layout = Layout(0, (70, 70))
    packed = states(140, 4, 2, 8)
    changed = packed.clone()
    changed[70:] = 0.0  # the second row
    changed[69] = 0.0  # the end of the first

    before, after = (attend_grouped(*parts(x, 4, 2, 8), layout, 1.0) for x in (packed, changed))

    assert torch.equal(before[0, :69], after[0, :69])
    assert not torch.equal(before[0, 69], after[0, 69])


def test_the_same_scaling_is_used_as_the_model_asks_for():
    packed = states(10, 2, 2, 8)
    q, k, v = parts(packed, 2, 2, 8)

    found = attend_grouped(q, k, v, Layout(0, (10,)), 0.3)

    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
