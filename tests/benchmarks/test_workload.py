"""Rows, order and settings that every system of the benchmark gets."""

import statistics

import numpy as np
import pytest

from benchmarks.training.chats import LONGEST, NUM_TEMPLATE_TOKENS, SHORTEST, made_up_chats
from benchmarks.training.making import Wish, lay_in_order, longest_first, name_of
from benchmarks.training.workload import (
    IGNORED,
    Row,
    Settings,
    Workload,
    open_workload,
    spread_evenly,
    write_workload,
)
from qlora_core.data.prepared import TokenRow, read_split, write_split
from qlora_core.training.batching import make_plan


def settings(**changes) -> Settings:
    known = {
        "data": "made-up chats", "num_rows": 20, "num_tokens": 4000, "num_supervised_tokens": 1500,
        "pad_id": 0, "longest": 390, "num_body_parameters": 10, "num_head_parameters": 3,
    }  # fmt: skip
    return Settings(**known | changes)


def rows(num_rows: int) -> list[Row]:
    return [Row([5, 6, 7 + number], [0, 1, 1]) for number in range(num_rows)]


@pytest.fixture
def workload(tmp_path) -> Workload:
    write_workload(tmp_path, settings(), rows(20))
    return open_workload(tmp_path)


def test_the_same_seed_makes_the_same_chats_and_another_one_others():
    assert list(made_up_chats(30, seed=1)) == list(made_up_chats(30, seed=1))
    assert list(made_up_chats(30, seed=1)) != list(made_up_chats(30, seed=2))


def test_more_made_up_chats_begin_with_the_fewer():
    assert list(made_up_chats(30, seed=1))[:10] == list(made_up_chats(10, seed=1))


def test_made_up_chats_are_as_long_as_real_ones_and_supervised_by_a_good_third():
    chats = list(made_up_chats(500, seed=0))
    answers = [len(chat["answer"].split()) for chat in chats]
    lengths = [
        len(chat["question"].split()) + answer + NUM_TEMPLATE_TOKENS
        for chat, answer in zip(chats, answers, strict=True)
    ]

    assert SHORTEST <= min(lengths) < 90
    assert 340 < max(lengths) <= LONGEST + 1
    assert 0.36 < statistics.mean(answers) / statistics.mean(lengths) < 0.40


def test_a_workload_reads_back_as_it_was_written(workload):
    assert workload.settings == settings()
    assert workload.rows() == rows(20)


def test_steps_are_the_rows_in_order_cut_into_global_batches(workload):
    first, second = workload.steps(2)

    assert first == rows(20)[:8]
    assert second == rows(20)[8:16]


def test_batch_sizes_can_be_changed_when_a_workload_is_opened(workload):
    changed = open_workload(workload.folder, global_batch=4, micro_batch=2)

    assert [len(step) for step in changed.steps(3)] == [4, 4, 4]
    assert changed.settings.num_accumulated == 2


def test_labels_repeat_supervised_tokens_and_ignore_the_others():
    assert Row([5, 6, 7], [0, 1, 1]).labels == [IGNORED, 6, 7]


def test_packs_hold_the_longest_row_and_together_a_micro_batch():
    short, long = settings(), settings(longest=550)

    assert (short.pack_length, short.num_packs) == (512, 3)  # 8 rows of 200 tokens
    assert (long.pack_length, long.num_packs) == (640, 2)


def test_few_places_stand_for_many():
    assert spread_evenly(50, 4) == [6, 18, 31, 43]
    assert spread_evenly(50, 1) == [25]
    assert spread_evenly(3, 3) == [0, 1, 2]


def test_the_longest_rows_come_first_and_the_others_keep_their_order():
    assert longest_first([3, 9, 4, 7, 5], num_first=2) == [1, 3, 0, 2, 4]
    assert longest_first([3, 3], num_first=8) == [0, 1]


def test_our_engines_first_step_has_the_longest_rows_and_no_row_is_lost(tmp_path):
    lengths = np.random.default_rng(0).permutation(np.arange(2, 42))
    made = [TokenRow([number] * number, [number] * number) for number in lengths.tolist()]
    write_split(tmp_path, "train", made)

    order = lay_in_order(tmp_path, seed=3, num_first=8)

    laid = read_split(tmp_path, "train")
    plan = make_plan(seed=3, num_rows=40, global_batch=8, epochs=1000, max_steps=6)
    trained = [laid.lengths[plan.rows(step)].tolist() for step in range(1, 6)]
    met = [length for step in trained for length in step]
    assert trained[0] == list(range(41, 33, -1))
    assert sorted(met) == list(range(2, 42))
    assert [int(laid.lengths[row]) for row in order] == met
    assert all((laid.input_ids(row) == laid.lengths[row]).all() for row in range(40))


def test_a_workload_is_found_by_what_it_is_made_of_and_not_by_where_its_rows_lie(tmp_path):
    here, there, other = (tmp_path / name for name in ("here", "there", "other"))
    here.write_text("{}")
    there.write_text("{}")
    other.write_text("{ }")

    assert name_of(Wish(here)) == name_of(Wish(there))
    changed = [
        Wish(here), Wish(other), Wish(None), Wish(here, 500), Wish(here, num_first=4),
        Wish(here, compute_dtype="bfloat16"), Wish(here, seed=1),
    ]  # fmt: skip
    assert len({name_of(wish) for wish in changed}) == len(changed)
