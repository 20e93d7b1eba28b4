import math

import pytest

from qlora_core.config import TrainingConfig
from qlora_core.training.schedule import learning_rate


def rates(num_steps: int, **settings) -> list[float]:
    config = TrainingConfig(**settings)
    return [learning_rate(step, num_steps, config) for step in range(1, num_steps + 1)]


def test_cosine_follows_its_formula():
    got = rates(10, learning_rate=1.0, warmup=0.2, schedule="cosine")

    falling = [0.5 * (1 + math.cos(math.pi * n / 9)) for n in range(9)]
    assert got == pytest.approx([0.5, *falling])


def test_linear_ends_one_step_above_its_floor():
    got = rates(5, learning_rate=1.0, warmup=0.0, schedule="linear", min_learning_rate=0.5)

    assert got == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6])


def test_constant_stays_after_the_warm_up():
    got = rates(4, learning_rate=0.5, warmup=0.5, schedule="constant")

    assert got == pytest.approx([0.25, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_no_step_is_wasted_on_a_rate_of_zero(schedule, num_steps):
    got = rates(num_steps, learning_rate=1.0, warmup=0.5, schedule=schedule)

    assert min(got) > 0
    assert max(got) == 1.0
