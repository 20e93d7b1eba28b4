import hashlib

import pytest

from qlora_core.data.formats import Turn
from qlora_core.data.split import check_sides, draw, group_of
from qlora_core.errors import DataError


def chat(*texts):
    return tuple(Turn("user" if n % 2 == 0 else "assistant", text) for n, text in enumerate(texts))


def test_rows_that_share_their_prompt_draw_alike_and_others_do_not():
    first = draw(group_of(chat("a", "b"), "prompt"))

    assert draw(group_of(chat("a", "other"), "prompt")) == first
    assert draw(group_of(chat("a", "b", "c", "d"), "prompt")) == first  # its continuation
    assert draw(group_of(chat("A", "b"), "prompt")) != first


def test_rows_that_share_their_completion_draw_alike():
    first = draw(group_of(chat("a", "b"), "completion"))

    assert draw(group_of(chat("x", " b\n"), "completion")) == first
    assert draw(group_of(chat("a", "c"), "completion")) != first


def test_by_row_everything_counts():
    groups = {group_of(c, "row") for c in (chat("a", "b"), chat("a", "c"), chat("x", "b"), "a")}

    assert len(groups) == 4


def test_draws_are_even_enough_to_hold_out_the_fraction():
    drawn = [draw(group_of(f"text {n}", "row")) for n in range(4000)]

    share = sum(number < 0.1 for number in drawn) / len(drawn)
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / 4000) ** 0.5  # four standard errors


def test_what_a_row_draws_never_changes():
    row = hashlib.sha256(b'"a row"').digest()
    number = int(hashlib.sha256(b"heldout" + row).hexdigest()[:12], 16)

    assert draw(group_of("a row", "row")) == number / 2**48


@pytest.mark.parametrize(
    ("drawn", "fraction", "said"),
    [
        ([0.4, 0.6], 0.1, r"No held-out rows[\s\S]*fraction=0.401"),
        ([0.4, 0.6], 0.9, r"No training rows[\s\S]*fraction=0.6"),
        ([0.4, 0.4], 0.1, r"No held-out rows[\s\S]*1 different by prompt[\s\S]*split by: row"),
    ],
)
def test_an_empty_side_is_refused_with_a_fraction_that_would_do(drawn, fraction, said):
    with pytest.raises(DataError, match=said):
        check_sides(drawn, fraction, "prompt")


def test_two_sides_with_rows_are_fine():
    check_sides([0.4, 0.6], 0.5, "prompt")
