"""What FlashAttention is asked for, answered by a slow stand-in for torch's door to it."""

import pytest
import torch
import torch.nn.functional as F

from qlora_core.modeling import flash
from qlora_core.modeling.flash import attend_flash, is_for_flash
from qlora_core.modeling.packing import Layout, attend

LENGTHS = (7, 1, 12)
LAYOUT = Layout(0, LENGTHS)


def with_groups(q, k, v, starts, _, longest, __, *, scale, window_size, enable_gqa=False):
    """The door of torch 2.12 and later."""
    assert enable_gqa == (q.shape[1] != k.shape[1])
    return by_row(q, k, v, starts, longest, scale, window_size)


def without_groups(q, k, v, starts, _, longest, __, *, scale, window_size):
    """The door of torch 2.11, which has no word for grouped heads."""
    assert q.shape == k.shape
    return by_row(q, k, v, starts, longest, scale, window_size)


def by_row(q_NHD, k_NGD, v_NGD, starts, longest, scale, window_size):
    left, right = window_size
    assert (right, longest, starts.dtype) == (0, max(LENGTHS), torch.int32)
    outputs = []
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        q, k, v = (s[start:end].transpose(0, 1) for s in (q_NHD, k_NGD, v_NGD))
        place = torch.arange(end - start)
        back = place[:, None] - place
        mask = (back >= 0) & ((back <= left) | (left < 0))
        output = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("door", [with_groups, without_groups])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("num_key_heads", [4, 2])
def test_rows_attend_to_themselves_whatever_torchs_version(
    door, window, num_key_heads, monkeypatch
):
    monkeypatch.setattr(flash, "_door", lambda: door)
    flash._knows_groups.cache_clear()
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), 8) for heads in (4, num_key_heads, num_key_heads)]
    states = [torch.randn(shape, generator=generator).double() for shape in shapes]

    found = attend_flash(*states, LAYOUT.starts(torch.device("cpu")), 12, 0.3, window)

    expected, _ = attend(
        torch.nn.Module(), *states, None, layout=LAYOUT, scaling=0.3, sliding_window=window
    )
    flash._knows_groups.cache_clear()
    torch.testing.assert_close(found, expected)


def test_a_cpu_has_none():
    assert not is_for_flash(torch.zeros(1, 4, 8, 64, dtype=torch.bfloat16))
