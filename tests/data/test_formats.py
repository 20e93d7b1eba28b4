import pytest

from qlora_core.config import DatasetConfig
from qlora_core.data.formats import Turn, is_empty
from qlora_core.data.layouts import choose_layout
from qlora_core.data.problems import BadRow, Place
from qlora_core.data.reading import Record
from qlora_core.errors import ConfigError, DataError

QUESTION, ANSWER = Turn("user", "Two?"), Turn("assistant", "Four.")
CHAT = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Four."}]
SHARED = [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "Four."}]


def content(row, **options):
    layout = choose_layout(DatasetConfig(source="d.jsonl", **options), list(row), "d.jsonl")
    return layout.content(Record(Place("d.jsonl", 1), row))


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"messages": CHAT}, {}),
        ({"messages": CHAT, "prompt": "x", "completion": "y"}, {}),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Two?"},
                    {"from": "gpt", "value": "Four."},
                ]
            },
            {},
        ),
        ({"messages": [{**CHAT[0], "content": [{"type": "text", "text": "Two?"}]}, CHAT[1]]}, {}),
        ({"messages": [{**CHAT[0], "tool_calls": None}, CHAT[1]]}, {}),
        ({"chat": CHAT}, {"columns": {"messages": "chat"}}),
        ({"prompt": "Two?", "completion": "Four."}, {}),
        ({"question": "Two?", "answer": "Four.", "id": 3}, {}),
        ({"instruction": "Two?", "output": "Four."}, {}),
        ({"instruction": "Two?", "input": "", "output": "Four."}, {}),
        ({"instruction": "Two?", "input": None, "output": "Four."}, {"format": "alpaca"}),
        ({"mr": "Two?", "ref": "Four."}, {"columns": {"prompt": "mr", "completion": "ref"}}),
        (
            {"mr": "Two", "ref": "Four."},
            {"columns": {"completion": "ref"}, "template": "{{ mr }}?"},
        ),
        (
            {"mr": "Two", "ref": "Four."},
            {"columns": {"prompt": "mr", "completion": "ref"}, "template": "{{ prompt }}?"},
        ),
    ],
)
def test_every_format_says_the_same_chat(row, options):
    assert content(row, **options) == (QUESTION, ANSWER)


def test_alpacas_input_follows_its_instruction():
    row = {"instruction": "Add.", "input": "2 + 2", "output": "4"}

    assert content(row)[0] == Turn("user", "Add.\n\n2 + 2")


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"text": "a\nb"}, {}),
        ({"body": "a\nb"}, {"columns": {"text": "body"}}),
        ({"x": "a", "y": "b"}, {"template": "{{ x }}\n{{ y }}"}),
        ({"x": "a", "y": "b"}, {"format": "text", "template": "{{ x }}\n{{ y }}"}),
    ],
)
def test_text_comes_from_a_column_or_a_template(row, options):
    assert content(row, **options) == "a\nb"


def test_numbers_are_text_in_their_usual_spelling():
    assert content({"prompt": 2, "completion": 4.5}) == (
        Turn("user", "2"),
        Turn("assistant", "4.5"),
    )


def test_the_system_message_is_put_before_chats_that_have_none():
    own = [{"role": "system", "content": "mine"}, *CHAT]

    assert content({"messages": CHAT}, system="Be brief.")[0] == Turn("system", "Be brief.")
    assert content({"messages": own}, system="Be brief.")[0] == Turn("system", "mine")


def test_a_column_can_hold_the_system_message():
    row = {"prompt": "Two?", "completion": "Four.", "rules": "mine"}

    assert content(row, columns={"system": "rules"})[0] == Turn("system", "mine")


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (CHAT[:1], "has no assistant turn"),
        ([], "holds nothing"),
        ("Two?", "holds a str, but a list of turns is needed"),
        ([*CHAT, "x"], "turn 3 is a str"),
        ([{"role": "user"}, CHAT[1]], "turn 1 lacks role or content; it has role"),
        ([{"role": "boss", "content": "x"}, CHAT[1]], "turn 1 has the role 'boss'; known are"),
        ([{**CHAT[0], "content": 1.5j}, CHAT[1]], "turn 1' holds a complex"),
        ([CHAT[0], {**CHAT[1], "tool_calls": [1]}], "turn 2 has 'tool_calls'"),
        ([{**CHAT[0], "content": [{"type": "image"}]}, CHAT[1]], "turn 1 has parts that are not"),
        ([{**CHAT[0], "content": "a\0"}, CHAT[1]], "turn 1' holds a NUL character"),
        ([{**CHAT[0], "content": "\ud800"}, CHAT[1]], "turn 1' holds half a surrogate pair"),
    ],
)
def test_a_chat_that_is_not_understood_says_which_turn(messages, said):
    with pytest.raises(BadRow, match=said):
        content({"messages": messages})


def test_a_row_that_lacks_a_column_of_the_first_row_names_it():
    layout = choose_layout(DatasetConfig(source="d"), ["prompt", "completion"], "d.jsonl")

    with pytest.raises(BadRow, match="has no column 'completion'; it has prompt, reply"):
        layout.content(Record(Place("d.jsonl", 2), {"prompt": "x", "reply": "y"}))


@pytest.mark.parametrize(
    ("columns", "options", "said"),
    [
        (["mr", "ref"], {}, r"no known format has the columns mr, ref[\s\S]*prompt: mr"),
        (["mr", "reff"], {"columns": {"completion": "ref"}}, r"no column 'ref'[\s\S]*reff"),
        (["question", "x"], {"format": "completion"}, "no column 'prompt'"),
        (["a"], {"format": "messages"}, "no column 'messages'"),
    ],
)
def test_a_column_that_is_not_there_is_named_with_those_that_are(columns, options, said):
    with pytest.raises(DataError, match=said):
        choose_layout(DatasetConfig(source="d", **options), columns, "d.csv")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"columns": {"promt": "a"}}, "fits no format; the fields are"),
        ({"format": "text", "columns": {"prompt": "a"}}, "fits no format; the fields are text"),
        ({"format": "messages", "template": "{{ a }}"}, "only for the formats completion and text"),
        ({"template": "{{ a "}, r"dataset.template: .* in line 1"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        choose_layout(DatasetConfig(source="d", **options), ["a"], "d.csv")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ b }}", "'b' is undefined; the columns are a"),
        ("{{ a.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_template_that_fails_says_why_and_reaches_no_python(template, said):
    with pytest.raises(BadRow, match=said):
        content({"a": "x"}, template=template)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (" \n", True),
        ("x", False),
        ((QUESTION, ANSWER), False),
        ((QUESTION, Turn("assistant", " ")), True),
        ((Turn("user", ""), ANSWER), True),
        ((ANSWER,), False),
        ((QUESTION, Turn("assistant", ""), QUESTION, ANSWER), True),
    ],
)
def test_blank_answers_and_blank_questions_are_empty(value, expected):
    assert is_empty(value) is expected
