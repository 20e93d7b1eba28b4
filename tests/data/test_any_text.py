"""Whatever people write, no token of it is lost, special, or learned by mistake."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_core.data.encoding import Encoder
from qlora_core.data.formats import Turn
from tests.data.chats import MARKED, REASONING, byte_tokenizer, encode, supervised_texts
from tests.tiny import CHATML

TOKENIZERS = {name: byte_tokenizer(t) for name, t in [("chatml", CHATML), ("marked", MARKED)]}
REASONER = byte_tokenizer(REASONING)
PIECES = [
    "<|im_end|>",
    "<|im_start|>",
    "<|im_",
    "end|>",
    "assistant",
    "\n",
    " ",
    "é",
    "🙂",
    "日",
    "a",
]
TEXT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join)
CHATS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)
QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(chat=CHATS)
@QUICK
def test_answers_and_only_answers_are_learned(name, chat):
    tokenizer = TOKENIZERS[name]
    turns = [Turn(*t) for q, a in chat for t in (("user", q), ("assistant", a))]

    row = encode(tokenizer, turns)

    rendered = tokenizer.apply_chat_template([t._asdict() for t in turns], tokenize=False)
    ids = row.ids_L.tolist()
    assert tokenizer.decode(ids) == rendered
    assert ids.count(tokenizer.eos_token_id) == len(turns)  # the template's own, none of the text
    learned = supervised_texts(tokenizer, row)
    assert len(learned) == len(chat)
    for text, (_, answer) in zip(learned, chat, strict=True):
        # A token can hold the header's line break and the answer's first one.
        assert text.endswith(answer + "<|im_end|>")
        assert not text.removesuffix(answer + "<|im_end|>").strip()


@given(chat=CHATS)
@QUICK
def test_a_template_that_looks_into_the_text_never_learns_a_question(chat):
    tokenizer = REASONER
    turns = [Turn(*t) for q, a in chat for t in (("user", "Q" + q), ("assistant", a))]

    row = encode(tokenizer, turns)

    assert not any("Q" in text for text in supervised_texts(tokenizer, row))


@given(text=TEXT)
@QUICK
def test_plain_text_reads_back_as_it_was(text):
    tokenizer = TOKENIZERS["chatml"]
    encoder = Encoder(tokenizer, [tokenizer.eos_token], escape=True)

    [row] = encoder.encode([encoder.render(text)], as_chat=False)

    assert tokenizer.decode(row.ids_L) == text + "<|im_end|>"
    assert row.ids_L.tolist().count(tokenizer.eos_token_id) == 1
