import copy

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from qlora_core.data.prepared import IGNORED, Prompt, TokenRow, read_split, write_split
from qlora_core.evaluation import generation, likelihood
from qlora_core.evaluation.prefix import Prefix, common_length, shared_prefix
from tests.evaluation.asking import answer_prompts, measure_likelihood

TEMPLATE = [7, 100, 33, 250, 8, 9, 61, 17, 140, 20, 21, 22]


@pytest.fixture
def chats(tmp_path):
    """Rows that begin with the same twelve tokens; the shortest prompt is just those and one."""
    generator = np.random.default_rng(5)
    made = []
    for length in (1, 9, 4, 20, 6):
        prompt = TEMPLATE + generator.integers(3, 290, length).tolist()
        answer = generator.integers(3, 290, 5).tolist()
        made.append(TokenRow(prompt + answer, [IGNORED] * len(prompt) + answer))
    write_split(tmp_path, "heldout", made)
    return read_split(tmp_path, "heldout")


@pytest.fixture
def requests():
    generator = np.random.default_rng(6)
    tails = [generator.integers(3, 290, n).tolist() for n in (2, 25, 7, 9, 1)]
    return [Prompt("?", (*TEMPLATE, *tail), ("!",)) for tail in tails]


def without_prefix(monkeypatch) -> None:
    for module in (generation, likelihood):
        monkeypatch.setattr(module, "shared_prefix", lambda *_: Prefix())


def count_positions(model) -> list[int]:
    """Return a list that will hold how many positions each forward pass computes."""
    seen: list[int] = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].numel()))
    return seen


def test_the_common_beginning_leaves_one_token_of_each():
    assert common_length([[1, 2, 3, 4], [1, 2, 3, 5]]) == 3
    assert common_length([[1, 2, 3], [1, 2, 3, 5]]) == 2
    assert common_length([[1], [1]]) == 0
    assert common_length([]) == 0


def test_loss_is_the_same_and_the_beginning_is_read_once(lively_llama, chats, monkeypatch):
    model = copy.deepcopy(lively_llama)
    seen = count_positions(model)
    found = measure_likelihood(model, chats, range(5), batch_size=2)
    assert seen[0] == len(TEMPLATE)
    assert sum(seen) <= len(TEMPLATE) + 2 * 25 + 2 * 14 + 6

    without_prefix(monkeypatch)
    expected = measure_likelihood(lively_llama, chats, range(5), batch_size=2)

    np.testing.assert_allclose([r.nll for r in found], [r.nll for r in expected], rtol=1e-5)
    assert [row.unit for row in found] == [row.unit for row in expected]


def test_the_position_before_the_first_answer_token_is_not_in_the_prefix(lively_llama, tmp_path):
    same = TEMPLATE * 2  # one prompt, all of it shared, with two answers
    write_split(
        tmp_path, "heldout", [TokenRow([*same, t, t], [IGNORED] * 24 + [t, t]) for t in (40, 50)]
    )
    rows = read_split(tmp_path, "heldout")

    found = measure_likelihood(lively_llama, rows, [0, 1], batch_size=2)

    for row, token in zip(found, (40, 50), strict=True):
        ids = torch.tensor([[*same, token, token]])
        log_p = lively_llama(input_ids=ids).logits[0].double().log_softmax(-1)
        assert row.nll == pytest.approx(float(-log_p[23, token] - log_p[24, token]), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_answers_are_the_same_and_the_beginning_is_read_once(
    lively_llama, tokenizer, requests, batch_size, monkeypatch
):
    model = copy.deepcopy(lively_llama)
    seen = count_positions(model)
    found = answer_prompts(model, tokenizer, requests, max_new_tokens=10, batch_size=batch_size)
    assert seen[0] == len(TEMPLATE)

    without_prefix(monkeypatch)
    expected = answer_prompts(
        lively_llama, tokenizer, requests, max_new_tokens=10, batch_size=batch_size
    )

    assert found == expected
    assert len({answer.text for answer in found}) > 2


def test_a_short_beginning_or_a_single_row_is_not_worth_it(lively_llama):
    assert shared_prefix(lively_llama, [[1, 2, 3], [1, 2, 4]]).num_tokens == 0
    assert shared_prefix(lively_llama, [TEMPLATE]).num_tokens == 0
    assert shared_prefix(lively_llama, [TEMPLATE, TEMPLATE], limit=3).num_tokens == 0


def test_a_sliding_window_model_reads_whole_prompts(tokenizer, requests):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=8, eos_token_id=2,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()

    assert shared_prefix(model, [prompt.ids for prompt in requests]).num_tokens == 0
    batched = answer_prompts(model, tokenizer, requests, max_new_tokens=4, batch_size=1)
    assert len(batched) == len(requests)


def test_an_adapter_on_nf4_shares_the_beginning_too(nf4_base, tokenizer, requests, monkeypatch):
    from qlora_core.config import AdapterConfig
    from qlora_core.modeling.loading import load_base
    from qlora_core.modeling.lora import attach_adapter

    model = load_base(nf4_base)
    adapted = attach_adapter(model, AdapterConfig(rank=4), seed=0).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    found = answer_prompts(model, tokenizer, requests, max_new_tokens=6, batch_size=3)

    without_prefix(monkeypatch)

    assert found == answer_prompts(model, tokenizer, requests, max_new_tokens=6, batch_size=3)
