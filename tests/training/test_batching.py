import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.training import batching
from qlora_core.training.batching import (
    deal,
    heldout_rows,
    largest_chunk,
    make_plan,
)
from qlora_core.training.lanes import share

sizes = st.integers(1, 40)


def padded_tokens(chunk, lengths) -> int:
    return len(chunk) * int(lengths[chunk].max())


PINNED_EPOCHS = [[0, 8, 9, 3, 7, 5, 1, 2, 6, 4], [3, 7, 4, 2, 9, 8, 1, 6, 5, 0]]


@settings(max_examples=60, deadline=None)
@given(num_rows=sizes, global_batch=sizes, epochs=st.integers(1, 4), seed=st.integers(0, 9))
def test_every_row_is_trained_on_once_per_epoch(num_rows, global_batch, epochs, seed):
    plan = make_plan(seed=seed, num_rows=num_rows, global_batch=global_batch, epochs=epochs)

    steps = [plan.rows(step) for step in range(1, plan.num_steps + 1)]

    stream = np.concatenate(steps)
    assert len(stream) == epochs * num_rows
    for epoch in stream.reshape(epochs, num_rows):
        assert sorted(epoch) == list(range(num_rows))
    assert all(len(rows) == global_batch for rows in steps[:-1])


def test_the_plan_is_a_function_of_its_inputs_alone():
    def rows(seed: int) -> list[int]:
        batching._shuffled.cache_clear()  # else it could only agree with itself
        return make_plan(seed=seed, num_rows=50, global_batch=7, epochs=2).rows(9).tolist()

    np.random.seed(1)  # what anybody else draws does not matter
    first = rows(5)
    np.random.seed(2)

    assert rows(5) == first
    assert rows(6) != first


def test_the_order_is_the_same_in_every_release():
    plan = make_plan(seed=0, num_rows=10, global_batch=10, epochs=2)

    assert plan.rows(1).tolist() == PINNED_EPOCHS[0]
    assert plan.rows(2).tolist() == PINNED_EPOCHS[1]


def test_fractional_epochs_and_max_steps_cut_the_stream():
    half = make_plan(seed=0, num_rows=100, global_batch=8, epochs=0.5)
    capped = make_plan(seed=0, num_rows=100, global_batch=8, epochs=3, max_steps=4)

    assert (half.num_steps, len(half.rows(7)), half.epoch(7)) == (7, 2, 0.5)
    assert (capped.num_steps, capped.epoch(4)) == (4, 0.32)


def test_a_step_beyond_the_plan_is_refused():
    plan = make_plan(seed=0, num_rows=10, global_batch=5, epochs=1)

    with pytest.raises(IndexError, match="step 3 of 2"):
        plan.rows(3)


def test_no_rows_make_no_plan():
    with pytest.raises(ValueError, match="no training rows"):
        make_plan(seed=0, num_rows=0, global_batch=5, epochs=1)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=50),
    world_size=st.integers(1, 9),
    micro_batch=st.integers(1, 9),
)
def test_dealing_gives_every_row_to_one_worker_in_small_enough_chunks(
    lengths, world_size, micro_batch
):
    rows = np.arange(len(lengths))

    shares = deal(rows, np.array(lengths), world_size=world_size, micro_batch=micro_batch)

    assert len(shares) == world_size
    chunks = [chunk for share in shares for chunk in share]
    assert sorted(np.concatenate(chunks)) == list(rows)
    assert all(1 <= len(chunk) <= micro_batch for chunk in chunks)
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(("num_rows", "waiting"), [(8, 0.06), (16, 0.03), (64, 0.005)])
def test_workers_hardly_wait_for_whoever_has_most_tokens(num_rows, waiting):
    random, shares_of_slowest = np.random.default_rng(0), []
    for _ in range(200):
        lengths = random.integers(60, 400, num_rows)
        shares = deal(np.arange(num_rows), lengths, world_size=2, micro_batch=4)

        tokens = [sum(int(lengths[chunk].sum()) for chunk in share) for share in shares]
        rows = [sum(map(len, share)) for share in shares]

        assert len(set(rows)) == 1
        shares_of_slowest.append(max(tokens) * 2 / sum(tokens) - 1)
    assert np.mean(shares_of_slowest) < waiting


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=60), world_size=st.integers(1, 9))
def test_workers_have_the_same_number_of_rows_within_one(lengths, world_size):
    rows = np.arange(len(lengths))

    shares = deal(rows, np.array(lengths), world_size=world_size, micro_batch=3)

    counts = [sum(map(len, share)) for share in shares]
    assert max(counts) - min(counts) <= 1


def test_a_padded_step_costs_no_more_than_one_of_rows_dealt_out_one_by_one_on_the_whole():
    random, ours, one_by_one = np.random.default_rng(0), 0, 0
    for _ in range(50):
        lengths = random.integers(10, 400, 64)
        shares = deal(np.arange(64), lengths, world_size=4, micro_batch=4)
        ours += max(sum(padded_tokens(chunk, lengths) for chunk in share) for share in shares)
        longest_first = np.sort(lengths)[::-1]
        one_by_one += sum(4 * longest_first[start] for start in range(0, 64, 16))

    assert ours <= 1.01 * one_by_one


def test_rows_of_like_length_share_a_chunk_so_little_is_padded():
    lengths = np.array([100, 10, 100, 10, 100, 10, 100, 10])

    shares = deal(np.arange(8), lengths, world_size=1, micro_batch=4)

    assert sum(padded_tokens(chunk, lengths) for chunk in shares[0]) == lengths.sum()


@settings(max_examples=60, deadline=None)
@given(
    num_rows=sizes,
    global_batch=sizes,
    world_size=st.integers(1, 4),
    micro_batch=st.integers(1, 8),
    seed=st.integers(0, 9),
)
def test_no_micro_batch_of_the_whole_training_holds_more_tokens_than_the_largest_chunk(
    num_rows, global_batch, world_size, micro_batch, seed
):
    lengths = np.random.default_rng(seed).integers(2, 50, num_rows)
    plan = make_plan(seed=seed, num_rows=num_rows, global_batch=global_batch, epochs=2.5)
    shared = {"world_size": world_size, "micro_batch": micro_batch}
    steps = (plan.rows(step) for step in range(1, plan.num_steps + 1))
    chunks = [c for rows in steps for dealt in deal(rows, lengths, **shared) for c in dealt]

    largest = largest_chunk(plan, lengths, **shared)

    assert lengths[largest].sum() == max(lengths[chunk].sum() for chunk in chunks)


def test_workers_beyond_the_rows_get_nothing():
    shares = deal(np.array([4, 2]), np.array([5, 5, 5, 5, 5]), world_size=5, micro_batch=4)

    assert sorted(len(share) for share in shares) == [0, 0, 0, 1, 1]


def test_heldout_rows_are_a_fixed_sample():
    assert len(heldout_rows(1000, 50)) == 50
    assert heldout_rows(3, 50).tolist() == [0, 1, 2]
    assert np.array_equal(heldout_rows(1000, 50), heldout_rows(1000, 50))


def test_lanes_get_every_row_once_and_about_equally_many_tokens():
    lengths = np.array([50, 3, 40, 20, 7, 30, 5, 9])

    parts = share(np.arange(8), lengths, 3)

    assert sorted(np.concatenate(parts)) == list(range(8))
    assert [int(lengths[part].sum()) for part in parts] == [55, 56, 53]
    assert [len(part) for part in share(np.array([4, 1]), lengths, 3)] == [1, 1]
