import csv
import hashlib
import json
import math
import random
import re
from collections import defaultdict

import numpy as np
import pytest
from transformers import AutoTokenizer, GenerationConfig

from qlora_core.backends.memory import RecordingProgress
from qlora_core.config import DatasetConfig, HeldoutConfig, ModelConfig
from qlora_core.data.prepared import read_prompts, read_split
from qlora_core.errors import ConfigError, DataError, ModelError
from qlora_core.ports import Context
from qlora_core.sources import find_source
from qlora_core.stages.prepare import prepare_dataset
from tests.tiny import CHATML, make_tiny_llama


class Workshop:
    """Prepares rows given as Python objects, with the tiny Llama's tokenizer."""

    def __init__(self, folder, model_folder):
        self.folder, self.model_folder, self.num_runs = folder, model_folder, 0
        self.progress = RecordingProgress()

    def write(self, rows, name="rows.jsonl"):
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return path

    def prepare(self, rows, *, heldout=None, by="prompt", chat_template=None, **options):
        source = rows if isinstance(rows, str) else str(self.write(rows))
        held = str(self.write(heldout, "held.jsonl")) if isinstance(heldout, list) else heldout
        options.setdefault("max_length", 256)
        self.out = self.folder / f"out{self.num_runs}"
        self.out.mkdir()
        self.num_runs += 1
        services = {"tracker": None, "registry": None, "launcher": None}
        return prepare_dataset(
            Context(self.out, self.folder, progress=self.progress, **services),
            DatasetConfig(
                source=source,
                heldout=HeldoutConfig(source=held, fraction=0.3, by=by),
                **options,
            ),
            ModelConfig(source=str(self.model_folder)),
            find_source(source),
            find_source(held) if held else None,
            find_source(str(self.model_folder)),
            find_source(str(chat_template)) if chat_template else None,
        )

    def texts(self, split):
        tokenizer = AutoTokenizer.from_pretrained(self.model_folder)
        rows = read_split(self.out, split)
        return [tokenizer.decode(rows.input_ids(i)) for i in range(len(rows))]

    def dropped(self):
        return [json.loads(line) for line in (self.out / "dropped.jsonl").open(encoding="utf-8")]


@pytest.fixture
def workshop(tmp_path, tiny_llama):
    return Workshop(tmp_path, tiny_llama)


def pairs(count):
    return [{"prompt": f"day {n}", "completion": f"noon {n}"} for n in range(count)]


def test_every_row_is_kept_or_counted(workshop):
    rows = [
        *pairs(20),
        {"prompt": "day 3", "completion": "noon 3"},
        {"prompt": "day 3", "completion": " "},
        {"prompt": "", "completion": "x"},
        {"prompt": "long", "completion": "word " * 300},
    ]

    facts = workshop.prepare(rows)

    assert facts.dropped == {"duplicate": 1, "empty": 2, "too_long": 1}
    kept = facts.train.num_rows + facts.heldout.num_rows
    assert facts.num_rows_read == 24 == kept + sum(facts.dropped.values())
    listed = [(d["file"], d["line"], d["reason"]) for d in workshop.dropped()]
    assert sorted(listed) == [
        ("rows.jsonl", 21, "duplicate"),
        ("rows.jsonl", 22, "empty"),
        ("rows.jsonl", 23, "empty"),
        ("rows.jsonl", 24, "too_long"),
    ]
    assert max(len(d["text"]) for d in workshop.dropped()) <= 203
    assert any("4 rows dropped: 1 duplicate" in text for _, text in workshop.progress.said)


def test_facts_count_what_the_files_hold(workshop):
    facts = workshop.prepare(pairs(40))

    rows = read_split(workshop.out, "train")
    supervised = [(rows.labels(i)[1:] != -100).sum() for i in range(len(rows))]
    assert facts.train.num_rows == len(rows)
    assert facts.train.num_tokens == sum(len(rows.input_ids(i)) for i in range(len(rows)))
    assert facts.train.num_supervised_tokens == sum(supervised) > 0
    assert facts.train.length_quantiles["min"] == rows.lengths.min()
    assert facts.train.length_quantiles["p50"] == np.sort(rows.lengths)[(len(rows) - 1) // 2]
    assert facts.train.length_quantiles["max"] == rows.lengths.max()
    assert sum(count for _, count in facts.train.length_histogram) == len(rows)
    assert len(facts.train.length_histogram) <= 20
    assert facts.train.length_histogram[-1][0] >= rows.lengths.max()
    assert facts.num_prompts == len(read_prompts(workshop.out)) == facts.heldout.num_rows
    assert facts.format == "completion"


def test_the_sample_shows_what_is_learned(workshop):
    facts = workshop.prepare(pairs(20))

    assert facts.sample.startswith("<|im_start|>user\nday ")
    assert facts.sample.split("<|im_start|>assistant\n")[1].startswith("⟦noon ")
    assert facts.sample.endswith("<|im_end|>⟧\n")
    assert facts.sample in (workshop.out / "sample.txt").read_text("utf-8")


def test_the_same_rows_leave_the_same_bytes(workshop):
    def digests():
        workshop.prepare(pairs(30), max_rows=10)
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in workshop.out.iterdir()}

    first, second = digests(), digests()

    assert first == second
    assert set(first) == {
        "train.parquet",
        "heldout.parquet",
        "eval.parquet",
        "dropped.jsonl",
        "sample.txt",
    }


def test_the_split_does_not_depend_on_the_order_of_the_file(workshop):
    rows = [{**row, "completion": f"{row['completion']}{k}"} for row in pairs(30) for k in (1, 2)]
    workshop.prepare(rows)
    first = set(workshop.texts("heldout"))

    random.Random(1).shuffle(rows)
    workshop.prepare([*rows, {"prompt": "a new row", "completion": "moves no other"}])

    assert first <= set(workshop.texts("heldout"))
    assert not first & set(workshop.texts("train"))


@pytest.mark.parametrize("by", ["prompt", "completion"])
def test_rows_that_share_the_hashed_part_are_never_separated(workshop, by):
    rows = [{"prompt": f"day {n % 9}", "completion": f"noon {n % 8}"} for n in range(72)]

    workshop.prepare(rows, by=by)

    def parts(side):
        texts = (text.split("<|im_end|>\n")[by == "completion"] for text in workshop.texts(side))
        return {text.split("\n")[1] for text in texts}

    sides = [parts("train"), parts("heldout")]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_all_answers_to_a_held_out_prompt_are_its_references(workshop):
    rows = [{"prompt": f"day {n}", "completion": text} for n in range(20) for text in "abca"]

    facts = workshop.prepare(rows)

    prompts = read_prompts(workshop.out)
    assert facts.dropped == {"duplicate": 20}
    assert len(prompts) == facts.num_prompts == facts.heldout.num_rows / 3
    assert all(prompt.references == ("a", "b", "c") for prompt in prompts)
    tokenizer = AutoTokenizer.from_pretrained(workshop.model_folder)
    for prompt in prompts:
        expected = f"<|im_start|>user\n{prompt.text}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(prompt.ids) == expected


def test_the_prompt_of_a_long_chat_is_all_before_its_last_answer(workshop):
    def chat(n):
        texts = [f"day {n}", "noon", "and then?", f"user {n}"]
        roles = ["user", "assistant"] * 2
        return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]}

    workshop.prepare([chat(n) for n in range(12)])

    prompt = read_prompts(workshop.out)[0]
    assert prompt.text == "and then?"
    assert prompt.references[0].startswith("user ")
    tokenizer = AutoTokenizer.from_pretrained(workshop.model_folder)
    assert tokenizer.decode(prompt.ids).count("<|im_start|>") == 4


def test_training_rows_that_a_held_out_file_knows_are_left_out(workshop):
    heldout = [{"prompt": "day 3", "completion": "another answer"}]

    facts = workshop.prepare([*pairs(5), *pairs(1)], heldout=heldout)

    assert facts.dropped == {"duplicate": 1, "in_heldout": 1}
    assert facts.heldout.num_rows == 1
    assert not any("day 3" in text for text in workshop.texts("train"))
    assert facts.num_rows_read == 7


def test_max_rows_keeps_the_same_rows_in_any_order(workshop):
    heldout = [{"prompt": "x", "completion": "y"}]
    facts = workshop.prepare(pairs(30), heldout=heldout, max_rows=7)
    first = workshop.texts("train")

    workshop.prepare(pairs(30)[::-1], heldout=heldout, max_rows=7)

    assert facts.dropped == {"over_max_rows": 23}
    assert workshop.texts("train") == first[::-1]
    assert len(first) == 7


@pytest.mark.parametrize(
    ("mode", "dropped", "escaped", "num_stops"),
    [("escape", {}, 1, 2), ("drop", {"special_tokens": 1}, 0, 0), ("keep", {}, 0, 3)],
)
def test_special_tokens_in_text_are_treated_as_asked(workshop, mode, dropped, escaped, num_stops):
    evil = {"prompt": "quote <|im_end|> please", "completion": "noon"}
    heldout = [{"prompt": "x", "completion": "y"}]

    facts = workshop.prepare([evil, *pairs(3)], heldout=heldout, special_tokens_in_text=mode)

    assert facts.dropped == dropped
    assert facts.num_special_escaped == escaped
    stop = AutoTokenizer.from_pretrained(workshop.model_folder).eos_token_id
    rows = read_split(workshop.out, "train")
    quoting = [i for i, text in enumerate(workshop.texts("train")) if "quote" in text]
    assert sum((rows.input_ids(i) == stop).sum() for i in quoting) == num_stops


def test_plain_text_is_learned_whole_and_asks_nothing(workshop):
    rows = [{"a": f"the answer {n}", "b": "is"} for n in range(20)]

    facts = workshop.prepare(rows, template="{{ a }}\n{{ b }}")

    assert facts.format == "text"
    assert facts.num_prompts == 0
    assert read_prompts(workshop.out) == []
    assert workshop.texts("train")[0].startswith("the answer ")
    assert workshop.texts("train")[0].endswith("\nis<|im_end|>")
    num_first = facts.train.num_rows  # nothing predicts the first token of a row
    assert facts.train.num_supervised_tokens == facts.train.num_tokens - num_first


def test_e2e_csv_files_are_prepared_with_their_references_grouped(workshop, shared_data):
    def head(name, count):
        lines = (shared_data / "e2e" / name).read_text("utf-8").splitlines(keepends=True)
        (workshop.folder / name).write_text("".join(lines[: count + 1]), "utf-8")
        return workshop.folder / name

    train, heldout = head("devset.csv", 500), head("testset_w_refs.csv", 400)
    facts = workshop.prepare(
        str(train),
        heldout=str(heldout),
        columns={"completion": "ref"},
        template="Describe: {{ mr }}",
        max_length=256,
        max_rows=100,
    )

    references = defaultdict(set)
    with heldout.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            references["Describe: " + row["mr"]].add(row["ref"])
    prompts = {prompt.text: set(prompt.references) for prompt in read_prompts(workshop.out)}
    long = [d["text"] for d in workshop.dropped() if d["reason"] == "too_long"]
    for text, found in prompts.items():
        assert found <= references[text]
        assert found == references[text] or any(text[:150] in row for row in long)
    assert max(map(len, prompts.values())) > 1
    assert facts.train.num_rows == 100
    kept = facts.train.num_rows + facts.heldout.num_rows
    assert kept + sum(facts.dropped.values()) == facts.num_rows_read == 900


def test_all_malformed_rows_of_both_files_are_listed_at_once(workshop):
    bad = [{"prompt": "x", "completion": ["y"]}, {"prompt": "x"}]

    with pytest.raises(DataError) as caught:
        workshop.prepare([*pairs(2), *bad], heldout=[*pairs(1), bad[1]])

    assert caught.value.what.startswith("3 rows cannot be used")
    for where in (
        r"held.jsonl:2: has no column .* \(also .*rows.jsonl:4\)",
        "rows.jsonl:3: column",
    ):
        assert re.search(where, str(caught.value))


def test_a_row_without_assistant_turn_is_named(workshop):
    chat = [{"role": "user", "content": "day"}]

    with pytest.raises(DataError, match=r"rows.jsonl:1: has no assistant turn"):
        workshop.prepare([{"messages": chat}])


def test_a_file_without_rows_is_refused(workshop):
    (workshop.folder / "head.csv").write_text("prompt,completion\n")

    with pytest.raises(DataError, match=r"head.csv holds no rows"):
        workshop.prepare(str(workshop.folder / "head.csv"))


def test_too_few_rows_for_a_split_are_refused(workshop):
    said = r"No (held-out|training) rows[\s\S]*heldout.source[\s\S]*or give more rows\."
    with pytest.raises(DataError, match=said):
        workshop.prepare(pairs(1))


def test_rows_that_are_all_too_long_are_refused_with_the_reason(workshop):
    with pytest.raises(DataError, match=r"No training row is left: .*20 too_long") as caught:
        workshop.prepare(pairs(20), max_length=4)

    assert caught.value.why == "too_long: longer than dataset.max_length=4 tokens"


def test_rows_that_are_all_empty_are_refused_with_that_reason_alone(workshop):
    rows = [{"prompt": f"day {n}", "completion": " "} for n in range(9)]

    with pytest.raises(DataError, match=r"9 empty") as caught:
        workshop.prepare(rows)

    assert caught.value.why == "empty: the prompt or the answer is blank"


def test_a_number_that_is_none_is_no_text(workshop):
    with pytest.raises(DataError, match=r"rows.jsonl:21: column 'prompt' holds nan"):
        workshop.prepare([*pairs(20), {"prompt": math.nan, "completion": "x"}])


def test_data_with_nothing_supervised_is_refused(workshop):
    template = workshop.folder / "silent.jinja"
    template.write_text(CHATML + "{% generation %}{% endgeneration %}")

    with pytest.raises(DataError, match=r"20 nothing_supervised"):
        workshop.prepare(pairs(20), chat_template=template)


def test_data_whose_stop_token_is_never_supervised_is_refused(workshop):
    template = workshop.folder / "unending.jinja"
    template.write_text(CHATML.replace("<|im_end|>", "!"))
    chat = [("user", "day"), ("assistant", "noon"), ("user", "and?")]

    def rows(first):
        turns = [("user", first), *chat[1:]]
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    with pytest.raises(DataError, match="never learn to end"):
        workshop.prepare([rows(f"day {n}") for n in range(20)], chat_template=template)


def test_a_max_length_above_the_models_is_refused(workshop):
    with pytest.raises(ConfigError, match=r"dataset.max_length: 257 is more than the 256 tokens"):
        workshop.prepare(pairs(20), max_length=257)


def test_a_tokenizer_without_chat_template_serves_text_but_no_chats(tmp_path):
    model = make_tiny_llama(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    workshop = Workshop(tmp_path, model)

    with pytest.raises(ModelError, match=r"no chat template[\s\S]*model.chat_template"):
        workshop.prepare(pairs(20))
    assert workshop.prepare([{"text": f"day {n}"} for n in range(20)]).train.num_rows > 0


def test_the_models_own_stop_tokens_count(tmp_path):
    model = make_tiny_llama(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(model)
    workshop = Workshop(tmp_path, model)
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]

    GenerationConfig(eos_token_id=stops[:1]).save_pretrained(model)
    with pytest.raises(ModelError, match="never stop"):
        workshop.prepare(pairs(20))
    GenerationConfig(eos_token_id=stops).save_pretrained(model)

    assert workshop.prepare(pairs(20)).sample.endswith("<|im_end|>⟧\n")


def test_progress_reaches_the_end(workshop):
    workshop.prepare(pairs(1200), max_length=128)

    (*_, last) = workshop.progress.updates
    assert last[1] == last[2] == 1200


def test_rows_that_share_a_line_keep_their_own_prompts(workshop):
    path = workshop.folder / "rows.json"
    path.write_text(json.dumps(pairs(40)))

    facts = workshop.prepare(str(path))

    assert facts.num_prompts == facts.heldout.num_rows > 1
    for prompt in read_prompts(workshop.out):
        assert prompt.references == (prompt.text.replace("day", "noon"),)
