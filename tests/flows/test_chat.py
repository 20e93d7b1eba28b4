"""Talking to a model: what fits into its context, and what does not."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.chat import Conversation
from qlora_core.errors import UserError


@pytest.fixture
def conversation(tiny_llama):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.generation_config.eos_token_id = None  # so that only its context ends an answer
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    return Conversation(model, tokenizer, system=None, max_new_tokens=400)


def test_a_message_longer_than_the_context_is_refused_and_forgotten(conversation):
    with pytest.raises(UserError, match=r"reads at most 256") as caught:
        list(conversation.answer("noon " * 300))

    assert "/new" in caught.value.fix
    assert list(conversation.answer("noon"))


def test_an_answer_ends_where_the_context_does(conversation):
    asked = []
    conversation._model.register_forward_pre_hook(
        lambda _module, _args, given: asked.append(given["input_ids"].shape[1]), with_kwargs=True
    )

    list(conversation.answer("noon"))

    assert sum(asked) == 255  # the last of 256 is said, and read by nobody
