"""The loss mask against decoding: what is supervised must read as the answers and their stops."""

import pytest
from transformers import AutoTokenizer

from qlora_core.data.encoding import Encoder
from qlora_core.data.formats import Turn
from qlora_core.data.problems import BadRow
from qlora_core.errors import ModelError
from tests.data.chats import (
    HEADLESS,
    MARKED,
    MISTRAL,
    PLAIN,
    REASONING,
    as_messages,
    byte_tokenizer,
    encode,
    llama3_tokenizer,
    metaspace_tokenizer,
    prompt_ids,
    supervised_texts,
)
from tests.tiny import CHATML, make_tiny_tokenizer

TOKENIZERS = {
    "chatml": make_tiny_tokenizer,
    "llama3": llama3_tokenizer,
    "mistral": lambda: metaspace_tokenizer(MISTRAL),
    "mistral-bytes": lambda: byte_tokenizer(MISTRAL, ("<s>", "</s>"), bos="<s>", eos="</s>"),
    "marked": lambda: byte_tokenizer(MARKED),
}

SHORT = [Turn("user", "What is two plus two?"), Turn("assistant", "It is four.")]
LONG = [
    *SHORT,
    Turn("user", "It is four."),  # the user says what the assistant said
    Turn("assistant", "Two.\n\nTwo lines, 30 9 * * 1-5"),
    Turn("user", "Thanks!"),
    Turn("assistant", "It is four."),
]
WITH_SYSTEM = [Turn("system", "It is four."), *LONG]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("turns", [SHORT, LONG, WITH_SYSTEM], ids=["short", "long", "system"])
def test_supervised_tokens_read_as_the_answers_with_their_stop_tokens(tokenizer, turns):
    row = encode(tokenizer, turns)

    answers = [turn.content + tokenizer.eos_token for turn in turns if turn.role == "assistant"]
    # Mistral's template writes a space after its prompt, which the model must write itself.
    assert [text.removeprefix(" ") for text in supervised_texts(tokenizer, row)] == answers
    assert row.has_stop


@pytest.mark.parametrize("turns", [SHORT, LONG, WITH_SYSTEM], ids=["short", "long", "system"])
def test_tokens_are_those_of_transformers_own_chat_template(tokenizer, turns):
    row = encode(tokenizer, turns)

    expected = tokenizer.apply_chat_template(as_messages(turns), return_dict=True)["input_ids"]
    assert row.ids_L.tolist() == expected


def test_labels_repeat_the_tokens_they_stand_at(tokenizer):
    row = encode(tokenizer, LONG)

    is_learned = row.labels_L != -100
    assert (row.labels_L[is_learned] == row.ids_L[is_learned]).all()
    assert len(row.labels_L) == len(row.ids_L)


@pytest.mark.parametrize("turns", [SHORT, WITH_SYSTEM], ids=["short", "system"])
def test_the_prompt_of_a_row_is_transformers_own_generation_prompt(tokenizer, turns):
    ids = prompt_ids(tokenizer, turns)

    asked = as_messages(turns[:-1])
    expected = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)
    assert list(ids) == expected["input_ids"]


def test_a_mask_marked_by_the_template_equals_transformers_own():
    marked = byte_tokenizer(MARKED)

    row = encode(marked, LONG)

    expected = marked.apply_chat_template(
        as_messages(LONG), return_dict=True, return_assistant_tokens_mask=True
    )
    assert (row.labels_L != -100).astype(int).tolist() == expected["assistant_masks"]


def test_a_marked_template_without_its_stop_token_still_learns_to_stop():
    ends_early = MARKED.replace(
        "m['content'] + '<|im_end|>' }}{% endgen", "m['content'] }}{% endgen"
    )
    ends_early = ends_early.replace("{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}")
    tokenizer = byte_tokenizer(ends_early)

    row = encode(tokenizer, SHORT)

    assert supervised_texts(tokenizer, row) == ["It is four.<|im_end|>"]


def test_content_that_the_template_trims_is_found():
    tokenizer = llama3_tokenizer()

    row = encode(tokenizer, [Turn("user", "  Two? "), Turn("assistant", "\n It is four. \n")])

    assert supervised_texts(tokenizer, row) == ["It is four.<|eot_id|>"]


def test_exactly_one_start_token_begins_a_row():
    for tokenizer in (llama3_tokenizer(), metaspace_tokenizer(MISTRAL)):
        row = encode(tokenizer, LONG)
        assert row.ids_L.tolist().count(tokenizer.bos_token_id) == 1


def test_a_start_token_written_twice_is_kept_once_and_said():
    tokenizer = metaspace_tokenizer("{{ bos_token }}" + MISTRAL)
    encoder = Encoder(tokenizer, [tokenizer.eos_token], escape=True)

    [row] = encoder.encode([encoder.render(tuple(SHORT))], as_chat=True)

    assert row.ids_L.tolist().count(tokenizer.bos_token_id) == 1
    assert supervised_texts(tokenizer, row) == ["It is four.</s>"]
    assert encoder.num_double_starts == 1


def test_what_the_template_writes_after_the_generation_prompt_is_learned():
    tokenizer = byte_tokenizer(REASONING)

    row = encode(tokenizer, LONG)

    *others, last = supervised_texts(tokenizer, row)
    assert others == ["It is four.<|im_end|>", "Two.\n\nTwo lines, 30 9 * * 1-5<|im_end|>"]
    assert last == "<think>\n\n</think>\n\nIt is four.<|im_end|>"
    assert tokenizer.decode(prompt_ids(tokenizer, LONG)).endswith("<|im_start|>assistant\n")


def test_a_template_that_rewrites_old_answers_is_followed():
    tokenizer = byte_tokenizer(REASONING)
    turns = [
        Turn("user", "Two?"),
        Turn("assistant", "<think>okay</think>\n\nFour."),
        Turn("user", "And?"),
        Turn("assistant", "<think>so</think>\n\nFive."),
    ]

    row = encode(tokenizer, turns)

    learned = ["Four.<|im_end|>", "<think>so</think>\n\nFive.<|im_end|>"]
    assert supervised_texts(tokenizer, row) == learned


def test_a_template_without_stop_token_gets_one_after_the_last_answer_and_says_so():
    tokenizer = byte_tokenizer(PLAIN)
    encoder = Encoder(tokenizer, ["<|im_end|>"], escape=True)

    [row] = encoder.encode([encoder.render(tuple(LONG))], as_chat=True)

    # The space that the header ends with is one token with the answer's first word.
    assert supervised_texts(tokenizer, row)[-1] == " It is four.<|im_end|>"
    assert row.ids_L.tolist().count(tokenizer.eos_token_id) == 1
    assert row.has_stop
    assert "put after the last answer of 1 rows" in encoder.chat_notes()[0]


def test_a_template_that_ends_answers_with_another_token_is_refused():
    tokenizer = byte_tokenizer(CHATML, eos="<|endoftext|>")

    with pytest.raises(ModelError, match=r"ends an answer with '<\|im_end\|>'.*never stop"):
        encode(tokenizer, SHORT)


def test_a_stop_token_of_the_models_own_is_accepted():
    tokenizer = byte_tokenizer(CHATML, eos="<|endoftext|>")
    encoder = Encoder(tokenizer, ["<|endoftext|>", "<|im_end|>"], escape=True)

    [row] = encoder.encode([encoder.render(tuple(SHORT))], as_chat=True)

    assert supervised_texts(tokenizer, row) == ["It is four.<|im_end|>"]


def test_a_template_without_generation_prompt_keeps_its_header_in_the_prompt():
    tokenizer = byte_tokenizer(HEADLESS)
    encoder = Encoder(tokenizer, ["<|im_end|>"], escape=True)

    rendered = encoder.render(tuple(SHORT))
    [row] = encoder.encode([rendered], as_chat=True)

    assert supervised_texts(tokenizer, row) == ["It is four.<|im_end|>"]
    [ids] = encoder.encode_prompts([rendered])
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    assert "ignores add_generation_prompt" in encoder.chat_notes()[0]


def test_a_row_that_the_template_refuses_says_why():
    tokenizer = metaspace_tokenizer(MISTRAL)

    with pytest.raises(BadRow, match="roles must alternate"):
        encode(tokenizer, [SHORT[0], *SHORT])


def test_a_tokenizer_without_chat_template_says_what_to_do():
    with pytest.raises(ModelError, match=r"no chat template[\s\S]*model.chat_template.*text"):
        encode(byte_tokenizer(None), SHORT)


def test_a_broken_chat_template_names_its_line():
    with pytest.raises(ModelError, match="line 2"):
        encode(byte_tokenizer("\n{% for m in messages %}"), SHORT)


def test_a_template_that_asks_for_the_date_gives_the_same_text_every_day():
    tokenizer = byte_tokenizer("{{ strftime_now('%d %B %Y') }}\n" + CHATML)

    row = encode(tokenizer, SHORT)

    assert tokenizer.decode(row.ids_L).startswith("26 July 2024\n<|im_start|>user")


def test_a_trailing_question_is_kept_and_not_learned():
    tokenizer = make_tiny_tokenizer()

    row = encode(tokenizer, [*SHORT, Turn("user", "Thanks!")])

    assert supervised_texts(tokenizer, row) == ["It is four.<|im_end|>"]
    assert tokenizer.decode(row.ids_L).endswith("Thanks!<|im_end|>\n")


def test_letters_of_several_bytes_are_learned_whole():
    tokenizer = byte_tokenizer(CHATML)

    row = encode(tokenizer, [Turn("user", "é?"), Turn("assistant", "日本 🙂é")])

    assert supervised_texts(tokenizer, row) == ["日本 🙂é<|im_end|>"]


@pytest.mark.parametrize("turns", [SHORT, LONG, WITH_SYSTEM], ids=["short", "long", "system"])
def test_smollm2s_own_template_is_masked_right(smollm2_tokenizer, turns):
    row = encode(smollm2_tokenizer, turns)

    answers = [turn.content + "<|im_end|>" for turn in turns if turn.role == "assistant"]
    assert supervised_texts(smollm2_tokenizer, row) == answers
    expected = smollm2_tokenizer.apply_chat_template(as_messages(turns), return_dict=True)
    assert row.ids_L.tolist() == expected["input_ids"]


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_gguf):
    return AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


def test_any_number_of_threads_gives_the_same_tokens_in_the_same_order():
    tokenizer = byte_tokenizer(CHATML)
    chats = [
        (Turn("user", f"What is {n} plus two?" * (n % 7 + 1)), Turn("assistant", "four" * (n % 5)))
        for n in range(300)
    ]

    def encoded(num_threads: int):
        encoder = Encoder(tokenizer, ["<|im_end|>"], escape=True, num_threads=num_threads)
        rendered = [encoder.render(chat) for chat in chats]
        return encoder.encode(rendered, as_chat=True), encoder.encode_prompts(rendered)

    rows, prompts = encoded(1)

    for num_threads in (2, 3, 16):
        others, other_prompts = encoded(num_threads)
        assert other_prompts == prompts
        for row, other in zip(rows, others, strict=True):
            assert row.ids_L.tolist() == other.ids_L.tolist()
            assert row.labels_L.tolist() == other.labels_L.tolist()
    whole = tokenizer.apply_chat_template(
        [[turn._asdict() for turn in chat] for chat in chats], return_dict=False
    )
    assert [row.ids_L.tolist() for row in rows] == whole


def test_a_tokenizer_set_to_cut_and_to_pad_does_neither_here():
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer(["some", "some text"], truncation=True, max_length=4, padding=True)
    encoder = Encoder(tokenizer, ["<|im_end|>"], escape=True)
    chats = [(Turn("user", "word " * n), Turn("assistant", "four")) for n in (1, 30, 60, 5)]

    rows = encoder.encode([encoder.render(chat) for chat in chats], as_chat=True)

    lengths = [len(row.ids_L) for row in rows]
    assert lengths[2] > lengths[1] > lengths[3] > lengths[0] > 4
