import math

import numpy as np
import pytest
import torch

from qlora_core.config import EvaluationConfig
from qlora_core.data.prepared import IGNORED, TokenRow, write_split
from qlora_core.errors import ModelError
from qlora_core.evaluation.likelihood import Likelihood, logits_at
from qlora_core.evaluation.metrics import estimate_metric
from qlora_core.evaluation.questions import read_questions
from qlora_core.evaluation.records import Records
from qlora_core.modeling.dense import BUDGET_BYTES, dense_weights
from tests.evaluation.asking import measure_likelihood


def plain_nats(model, rows, i: int) -> float:
    """What transformers' own loss says of one unpadded row, in float64."""
    ids = torch.tensor(rows.input_ids(i).astype(np.int64))[None]
    labels = torch.tensor(rows.labels(i).astype(np.int64))[None]
    return float(model(input_ids=ids, labels=labels).loss) * int(rows.num_supervised[i])


def test_nats_of_each_row_equal_transformers_own_loss_in_float64(lively_llama, rows):
    found = measure_likelihood(lively_llama, rows, range(len(rows)), batch_size=3)

    double = type(lively_llama)(lively_llama.config).double().eval()
    double.load_state_dict(lively_llama.state_dict())
    with torch.no_grad():
        expected = [plain_nats(double, rows, i) for i in range(len(rows))]
    np.testing.assert_allclose([row.nll for row in found], expected, rtol=2e-5)
    assert [row.num_tokens for row in found] == rows.num_supervised.tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_the_batch_size_does_not_change_the_numbers(lively_llama, rows, batch_size):
    reference = measure_likelihood(lively_llama, rows, range(len(rows)), batch_size=5)

    found = measure_likelihood(lively_llama, rows, range(len(rows)), batch_size=batch_size)

    np.testing.assert_allclose([r.nll for r in found], [r.nll for r in reference], rtol=1e-5)


def test_the_loss_is_the_mean_over_tokens_not_over_rows(lively_llama, rows):
    found = measure_likelihood(lively_llama, rows, range(len(rows)), batch_size=4)

    records = Records(found)

    expected = sum(r.nll for r in found) / sum(r.num_tokens for r in found)
    assert estimate_metric("loss", records).value == pytest.approx(expected)
    assert estimate_metric("perplexity", records).value == pytest.approx(math.exp(expected))


def test_rows_of_one_prompt_are_one_unit(lively_llama, rows):
    found = measure_likelihood(lively_llama, rows, range(len(rows)), batch_size=4)

    assert [row.unit for row in found] == [0, 1, 2, 3, 4, 5, 6, 6]


def test_rows_come_back_in_the_order_asked_for_however_they_are_cut(lively_llama, rows):
    found = measure_likelihood(lively_llama, rows, [6, 1, 3], batch_size=2)

    assert [row.row for row in found] == [6, 1, 3]
    batches = Likelihood(lively_llama, rows, (6, 1, 3), batch_size=2).batches
    assert [len(batch) for batch in batches] == [2, 1]


def test_a_row_without_a_predicted_token_is_left_out(lively_llama, tmp_path):
    write_split(tmp_path, "heldout", [TokenRow([5, 6, 7], [IGNORED] * 3), TokenRow([5, 6], [5, 6])])

    asked = read_questions(EvaluationConfig(generate=False), tmp_path)
    found = measure_likelihood(lively_llama, asked.rows, asked.indices, batch_size=2)

    assert [(row.row, row.num_tokens) for row in found] == [(1, 1)]


def test_the_head_sees_only_the_wanted_positions(lively_llama):
    seen = []
    hook = lively_llama.lm_head.register_forward_hook(lambda _, x, y: seen.append(y.shape))
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    at = torch.tensor([[False, True, True, False], [True, False, False, False]])

    logits = logits_at(lively_llama, ids, mask, at)
    hook.remove()

    everything = lively_llama(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits, everything[at])
    assert seen == [(1, 3, lively_llama.config.vocab_size)]


def test_a_model_that_is_not_finite_is_refused(lively_llama, rows):
    broken = type(lively_llama)(lively_llama.config).eval()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))

    with pytest.raises(ModelError, match="loss on held-out row 1 is nan"):
        measure_likelihood(broken, rows, range(len(rows)), batch_size=4)


def test_dense_weights_change_no_bit_and_leave_no_trace(nf4_model, rows):
    expected = measure_likelihood(nf4_model, rows, range(len(rows)), batch_size=4)

    with dense_weights(nf4_model, BUDGET_BYTES) as num_dense:
        found = measure_likelihood(nf4_model, rows, range(len(rows)), batch_size=4)

    assert num_dense == 14  # seven linear layers in each of two blocks
    assert found == expected
    assert not any("forward" in vars(module) for module in nf4_model.modules())


def test_dense_weights_stop_at_their_budget(nf4_model):
    one_layer_bytes = 64 * 64 * 4

    with dense_weights(nf4_model, budget_bytes=one_layer_bytes) as num_dense:
        assert num_dense == 1

    with dense_weights(nf4_model, budget_bytes=0) as num_dense:
        assert num_dense == 0
