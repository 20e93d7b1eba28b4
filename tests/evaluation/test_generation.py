import copy

import pytest
import torch
from transformers import GenerationConfig

from qlora_core.data.prepared import Prompt
from qlora_core.errors import ModelError
from qlora_core.evaluation.generation import stop_tokens
from qlora_core.modeling.dense import BUDGET_BYTES, dense_weights
from tests.evaluation.asking import answer_prompts


def plain_greedy(model, prompt: Prompt, max_new_tokens: int, stops: set[int]) -> list[int]:
    """Greedy by definition: the whole text through the model for each new token, no cache."""
    ids = list(prompt.ids)
    for _ in range(max_new_tokens):
        best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if best in stops:
            break
        ids.append(best)
    return ids[len(prompt.ids) :]


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_batched_answers_equal_greedy_by_definition(lively_llama, tokenizer, prompts, batch_size):
    stops = set(stop_tokens(lively_llama, tokenizer))

    answers = answer_prompts(
        lively_llama, tokenizer, prompts, max_new_tokens=12, batch_size=batch_size
    )

    expected = [plain_greedy(lively_llama, prompt, 12, stops) for prompt in prompts]
    assert len({tuple(ids) for ids in expected}) > 3, "the prompts must matter"
    assert [answer.text for answer in answers] == [tokenizer.decode(ids) for ids in expected]
    assert [answer.num_tokens for answer in answers] == [len(ids) for ids in expected]


def test_an_answer_ends_at_any_stop_token(lively_llama, tokenizer, prompts):
    free = plain_greedy(lively_llama, prompts[1], 12, set())
    model = copy.copy(lively_llama)
    model.generation_config = GenerationConfig(eos_token_id=[free[3], 299])

    (answer,) = answer_prompts(model, tokenizer, [prompts[1]], max_new_tokens=12, batch_size=1)

    kept = free[: free.index(free[3])]
    assert answer.text == tokenizer.decode(kept)
    assert answer.num_tokens == len(kept)
    assert not answer.truncated


def test_answers_cut_at_the_limit_are_marked(lively_llama, tokenizer, prompts):
    answers = answer_prompts(lively_llama, tokenizer, prompts, max_new_tokens=2, batch_size=4)

    stops = set(stop_tokens(lively_llama, tokenizer))
    free = [plain_greedy(lively_llama, prompt, 2, stops) for prompt in prompts]
    assert [answer.truncated for answer in answers] == [len(ids) == 2 for ids in free]
    assert any(answer.truncated for answer in answers)


def test_the_models_own_sampling_settings_do_not_leak_in(lively_llama, tokenizer, prompts):
    plain = answer_prompts(lively_llama, tokenizer, prompts, max_new_tokens=12, batch_size=4)
    model = copy.copy(lively_llama)
    own = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, max_length=5,
        eos_token_id=lively_llama.generation_config.eos_token_id,
    )  # fmt: skip
    model.generation_config = own

    answers = answer_prompts(model, tokenizer, prompts, max_new_tokens=12, batch_size=4)

    assert answers == plain
    assert model.generation_config is own


def test_a_prompt_near_the_end_of_the_context_gets_a_shorter_answer(lively_llama, tokenizer):
    context = lively_llama.config.max_position_embeddings
    long = Prompt("?", tuple([7, 8] * (context // 2 - 1)), ("!",))
    short = Prompt("?", (7, 8, 9), ("!",))
    model = copy.copy(lively_llama)
    model.generation_config = GenerationConfig(eos_token_id=299)

    answers = answer_prompts(model, tokenizer, [long, short], max_new_tokens=9, batch_size=2)

    assert [answer.num_tokens for answer in answers] == [3, 9]


def test_special_tokens_in_an_answer_stay_visible(lively_llama, tokenizer, prompts):
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    model = copy.deepcopy(lively_llama)
    with torch.no_grad():  # the same logits for all tokens but one
        model.model.norm.weight.zero_()
        model.lm_head = torch.nn.Linear(64, model.config.vocab_size)
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[start] = 1.0

    (answer,) = answer_prompts(model, tokenizer, prompts[:1], max_new_tokens=2, batch_size=1)

    assert answer.text == "<|im_start|>" * 2


def test_a_model_without_any_stop_token_is_refused(lively_llama, tokenizer):
    model, mute = copy.copy(lively_llama), copy.deepcopy(tokenizer)
    model.generation_config = GenerationConfig()
    mute.eos_token = None

    with pytest.raises(ModelError, match="stop token"):
        stop_tokens(model, mute)


def test_dense_weights_give_the_same_answers(nf4_model, tokenizer, prompts):
    expected = answer_prompts(nf4_model, tokenizer, prompts, max_new_tokens=8, batch_size=4)

    with dense_weights(nf4_model, BUDGET_BYTES):
        answers = answer_prompts(nf4_model, tokenizer, prompts, max_new_tokens=8, batch_size=4)

    assert answers == expected
