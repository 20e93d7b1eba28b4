import math
import statistics

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_core.data.prepared import IGNORED, Rows, TokenRow
from qlora_core.errors import DataError
from qlora_core.evaluation.parity import compare_logits, measure_parity


def rows_of(*rows: TokenRow) -> Rows:
    offsets = np.cumsum([0, *(len(row.input_ids) for row in rows)])
    return Rows(
        np.array([t for row in rows for t in row.input_ids], np.int32),
        np.array([t for row in rows for t in row.labels], np.int32),
        offsets.astype(np.int64),
    )


def random_row(generator: np.random.Generator, prompt: int, answer: int) -> TokenRow:
    ids = generator.integers(0, 290, prompt + answer).tolist()
    return TokenRow(ids, [IGNORED] * prompt + ids[prompt:])


@pytest.fixture
def rows() -> Rows:
    generator = np.random.default_rng(0)
    shapes = [(5, 3), (9, 2), (4, 7), (12, 1), (6, 6), (3, 4), (8, 5)]
    return rows_of(*(random_row(generator, *shape) for shape in shapes))


@pytest.fixture(scope="module")
def models(tiny_llama) -> tuple[PreTrainedModel, PreTrainedModel]:
    adapter = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    merged = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return adapter, merged


def parity(models, rows, *, max_rows=99, batch_size=3):
    return measure_parity(
        *models,
        rows,
        onto="dequantized",
        max_rows=max_rows,
        batch_size=batch_size,
        on_batch=lambda done, total: None,
    )


@torch.no_grad()
def oracle(models, rows: Rows) -> Tensor:
    """(N, 5) sums of one row at a time, in float64: KL, agreement, both losses, count."""
    sums = []
    for i in range(len(rows)):
        ids = torch.from_numpy(rows.input_ids(i).astype(np.int64))[None]
        p, q = (Categorical(logits=m(input_ids=ids).logits[0].double()) for m in models)
        at = [t for t in range(1, ids.shape[1]) if rows.labels(i)[t] != IGNORED]
        kl = kl_divergence(p, q)
        nll_p, nll_q = -p.log_prob(ids[0].roll(-1)), -q.log_prob(ids[0].roll(-1))
        same = (p.probs.argmax(-1) == q.probs.argmax(-1)).double()
        before = [t - 1 for t in at]
        sums.append([*(x[before].sum().item() for x in (kl, same, nll_q, nll_p)), len(at)])
    return torch.tensor(sums, dtype=torch.float64)


def test_a_model_is_at_no_distance_from_itself(models, rows):
    same = parity((models[0], models[0]), rows)

    assert same.kl.value == 0.0
    assert same.kl.standard_error == 0.0
    assert same.agreement.value == 1.0
    assert same.loss_merged == same.loss_adapter


def test_every_number_equals_the_float64_oracle(models, rows):
    measured = parity(models, rows)

    sums = oracle(models, rows)
    expected = sums[:, :4].sum(0) / sums[:, 4].sum()
    got = [measured.kl, measured.agreement, measured.loss_merged, measured.loss_adapter]
    assert_close(
        torch.tensor([m.value for m in got], dtype=torch.float64), expected, rtol=1e-4, atol=1e-7
    )
    assert measured.kl.value > 1e-4
    assert 0.0 < measured.agreement.value < 1.0


def test_kl_has_the_direction_adapter_to_merged(models, rows):
    forward, backward = parity(models, rows), parity(models[::-1], rows)

    reverse = oracle(models[::-1], rows)
    expected = float(reverse[:, 0].sum() / reverse[:, 4].sum())
    assert backward.kl.value == pytest.approx(expected, rel=1e-4)
    assert forward.kl.value != pytest.approx(backward.kl.value, rel=5e-5)


def test_standard_errors_follow_the_rows_and_not_the_tokens(models, rows):
    measured = parity(models, rows)

    sums = oracle(models, rows)
    kl_N, count_N = sums[:, 0], sums[:, 4]
    residual_N = kl_N - measured.kl.value * count_N
    n = len(rows)
    expected = math.sqrt(n / (n - 1) * residual_N.square().sum()) / count_N.sum()
    assert measured.kl.standard_error == pytest.approx(float(expected), rel=1e-3)


def test_rows_that_share_a_prompt_are_one_draw(models):
    generator = np.random.default_rng(3)
    distinct = [random_row(generator, 6, 4) for _ in range(4)]

    once, thrice = parity(models, rows_of(*distinct)), parity(models, rows_of(*(distinct * 3)))

    assert thrice.kl.value == pytest.approx(once.kl.value)
    assert thrice.kl.standard_error == pytest.approx(once.kl.standard_error)


def test_the_batch_size_changes_nothing(models, rows):
    one, many = parity(models, rows, batch_size=1), parity(models, rows, batch_size=7)

    assert one.kl.value == pytest.approx(many.kl.value, rel=1e-4)
    assert one.loss_merged.value == pytest.approx(many.loss_merged.value, rel=1e-5)


def test_only_so_many_rows_are_read_spread_over_all(models, rows):
    measured = parity(models, rows, max_rows=3)

    sums = oracle(models, rows)[[0, 3, 6]]
    assert measured.kl.num_rows == 3
    assert measured.kl.value == pytest.approx(float(sums[:, 0].sum() / sums[:, 4].sum()), rel=1e-4)


def test_rows_with_nothing_to_predict_are_left_out(models, rows):
    silent = TokenRow([1, 2, 3], [IGNORED] * 3)
    only_first = TokenRow([4, 5], [4, IGNORED])
    generator = np.random.default_rng(0)
    telling = random_row(generator, 5, 3)

    measured = parity(models, rows_of(silent, telling, only_first))

    assert measured.kl.num_rows == 1
    assert measured.kl.standard_error is None


def test_no_supervised_token_at_all_is_an_error(models):
    with pytest.raises(DataError, match="no held-out row"):
        parity(models, rows_of(TokenRow([1, 2, 3], [IGNORED] * 3)))


def test_tiny_differences_survive_because_the_sums_are_float64():
    generator = torch.Generator().manual_seed(0)
    p_TV = torch.randn(300, 5000, generator=generator)
    q_TV = p_TV + 1e-4 * torch.randn(300, 5000, generator=generator)
    target_T = torch.randint(5000, (300,), generator=generator)

    compared = compare_logits(p_TV, q_TV, target_T)

    exact = kl_divergence(Categorical(logits=p_TV.double()), Categorical(logits=q_TV.double()))
    assert_close(compared.kl, exact, rtol=1e-6, atol=1e-15)
    assert 1e-9 < statistics.mean(compared.kl.tolist()) < 1e-8


class WithoutLogitsToKeep(torch.nn.Module):
    """A causal LM of an architecture that always computes all logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, use_cache):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_models_that_always_compute_all_logits_are_compared_alike(models, rows):
    measured = parity([WithoutLogitsToKeep(model) for model in models], rows)

    assert measured.kl.value == pytest.approx(parity(models, rows).kl.value, rel=1e-5)
