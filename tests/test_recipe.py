from pathlib import Path

import pytest

from qlora_core.config import WorkerRange
from qlora_core.errors import ConfigError
from qlora_core.recipe import load_config, parse_yaml

MINIMAL = """\
name: tiny
model:
  source: org/model
dataset:
  source: rows.jsonl
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')

    def write(text: str = MINIMAL) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def problems(path, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_a_minimal_recipe_gets_all_defaults_and_absolute_paths(recipe, tmp_path):
    config = load_config(recipe())

    assert config.quantization.method == "nf4"
    assert config.dataset.source == str(tmp_path / "rows.jsonl")
    assert config.model.source == "org/model"


def test_all_problems_are_told_at_once_with_path_line_given_and_valid_value(recipe):
    text = MINIMAL.replace("rows.jsonl", "gone.jsonl") + (
        "modle: 1\n"
        "training: {learning_rate: fast, epochs: '3'}\n"
        "quantization: {method: nf5}\n"
        "adapter: {rank: 0}\n"
    )

    told = problems(recipe(text))

    assert "6 problems" in told
    assert "modle (line 6): there is no such field; did you mean 'model'?" in told
    assert 'training.learning_rate (line 7): got "fast"' in told
    assert "e.g. 0.0002" in told
    assert 'training.epochs (line 7): got "3"' in told
    assert "choose 'nf4', 'fp4', 'int8' or 'none'" in told
    assert "adapter.rank (line 9): got 0" in told
    assert "gone.jsonl" in told


def test_a_missing_field_says_what_belongs_there(recipe):
    told = problems(recipe("name: x\nmodel: {source: org/model}\n"))

    assert "dataset: is missing" in told


def test_a_batch_that_cannot_be_split_names_one_that_can(recipe):
    told = problems(recipe(MINIMAL + "training: {global_batch: 10, micro_batch: 4}\n"))

    assert "try micro_batch=2" in told


@pytest.mark.parametrize(
    ("written", "means"),
    [
        ("1e-4", 1e-4),
        ("012", 12),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("true", True),
        ("null", None),
        ("'1'", "1"),
        ("2026-01-01", "2026-01-01"),
        ("-.5", -0.5),
        ("0x10", "0x10"),
    ],
)
def test_a_scalar_means_what_it_looks_like(written, means):
    data, _ = parse_yaml(f"x: {written}", "t")

    assert data["x"] == means
    assert type(data["x"]) is type(means)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: &x 1\nb: *x\n", "t:2: .*aliases"),
        ("a: 1\na: 2\n", "t:2: .*'a' is given twice"),
        ("a: [1\n", "not readable YAML"),
        ("- 1\n", "a recipe is a mapping"),
        ("a: b: c\n", "t:1"),
        ("\ta: 1\n", "t:1"),
        ("a: 1\n? [a, b]\n: 3\n", "t:2: .*a field's name must be text"),
        ("a: 1\nb: !!python/object/apply:os.system ['true']\n", "t:2: .*tags .* not allowed"),
        ("a: !!str 3\n", "t:1: .*tags .* not allowed"),
    ],
)
def test_yaml_that_would_surprise_is_refused_with_its_line(text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_yaml(text, "t")


def test_a_huge_file_is_refused_before_it_is_parsed(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("a: " + "x" * 300_000)

    assert "262144" in problems(path)


def test_an_empty_recipe_says_what_is_missing(recipe):
    told = problems(recipe(""))

    assert all(f"{name}: is missing" in told for name in ("name", "model", "dataset"))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00n", b"name: \x00"])
def test_a_file_that_is_not_text_is_refused(tmp_path, content):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)

    problems(path)


def test_a_folder_or_a_missing_file_is_refused(tmp_path):
    assert "cannot be read" in problems(tmp_path)
    assert "cannot be read" in problems(tmp_path / "none.yaml")


def test_overrides_win_and_their_paths_start_where_they_were_typed(recipe, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "other.csv").write_text("a,b\n1,2\n")
    monkeypatch.chdir(elsewhere)

    config = load_config(recipe(), ["training.learning_rate=1e-3", "dataset.source=other.csv"])

    assert config.training.learning_rate == 1e-3
    assert config.dataset.source == str(elsewhere / "other.csv")


def test_an_address_that_is_empty_is_none_that_was_meant(recipe):
    told = problems(recipe(), 'cluster.address=""')

    assert 'cluster.address: got ""; should not be empty' in told


@pytest.mark.parametrize("override", ["training.learning_rate", "=3", "name.x=3", "a: b=[1"])
def test_an_override_of_another_form_is_refused(recipe, override):
    problems(recipe(), override)


def test_an_unknown_field_in_an_override_is_told_like_any_other(recipe):
    assert "training.lr: there is no such field" in problems(recipe(), "training.lr=1")


def test_an_empty_data_file_is_told_before_anything_runs(recipe, tmp_path):
    path = recipe()
    (tmp_path / "rows.jsonl").write_text("")

    assert "empty file" in problems(path)


def test_a_scorer_file_is_found_beside_the_recipe(recipe, tmp_path):
    (tmp_path / "s.py").write_text("def f(a, b): return 1.0\n")

    config = load_config(
        recipe(MINIMAL + "evaluation: {scorers: [bleu, {file: s.py, function: f}]}\n")
    )

    assert config.evaluation.scorers[1].file == str(tmp_path / "s.py")


def test_a_gate_on_something_unmeasured_is_refused(recipe):
    told = problems(recipe(MINIMAL + "gate: {metric: bleu}\n"))

    assert "choose one of loss, exact_match" in told


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("betas.0", "betas: [2, 0.9]"),
        ("betas.1", "betas: [0.9, -1]"),
        ("learning_rate", "learning_rate: 1e30"),
        ("min_learning_rate", "min_learning_rate: 2"),
    ],
)
def test_a_number_that_training_could_not_survive_is_refused(recipe, field, wrong):
    assert f"training.{field} (line 6): got" in problems(
        recipe(MINIMAL + f"training: {{{wrong}}}\n")
    )


def test_how_fields_go_together_is_told_beside_what_is_wrong_in_one_of_them(recipe):
    told = problems(
        recipe(
            "name: 010\n"
            "model: {source: org/model, trust_remote_code: true}\n"
            "dataset: {source: gone.jsonl}\n"
            "training: {epochs: -1, global_batch: 10, early_stopping: 3}\n"
            "gate: {metric: bleu}\n"
        )
    )

    for part in (
        "6 problems",
        "name (line 1): got 10; should be text: put it in quotes",
        "model (line 2): trust_remote_code=true",
        "training.epochs (line 4): got -1",
        "try micro_batch=2. And early_stopping=3 counts",
        "gate.metric='bleu' is not measured",
        "gone.jsonl",
    ):
        assert part in told


@pytest.mark.parametrize(
    "wrong",
    [
        "evaluation: {scorers: bleu}\ngate: {metric: bleu}\n",
        "training: {global_batch: 0, micro_batch: 32}\n",
        "training: {early_stopping: 3, heldout_every: -1}\n",
        "training: {schedule: {a: 1}}\n",
        "evaluation: {scorers: [{function: f}]}\n",
        "a.b: 1\n",
    ],
)
def test_a_wrong_value_causes_no_second_problem(recipe, wrong):
    assert "1 problem\n" in problems(recipe(MINIMAL + wrong))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("0", 'cluster.workers (line 6): got 0; should be greater than 0, e.g. 1 or {"min": 1, '),
        ("many", 'cluster.workers (line 6): got "many"; should be a valid integer, e.g. 1 or {"'),
        ("{min: 8, max: 1}", "cluster.workers (line 6): min=8 is more than max=1; try min=1."),
        ("{min: 0, max: 1}", "cluster.workers.min (line 6): got 0; should be greater than 0"),
    ],
)
def test_of_a_number_or_a_range_only_what_was_meant_is_told(recipe, given, told):
    said = problems(recipe(MINIMAL + f"cluster: {{workers: {given}}}\n"))

    assert "1 problem\n" in said
    assert told in said


def test_lists_and_groups_are_called_what_a_yaml_reader_calls_them(recipe):
    told = problems(
        recipe(MINIMAL + "quantization: {skip: lm_head}\nadapter: {targets: 3}\nmerge: 3\n")
    )

    assert 'quantization.skip (line 6): got "lm_head"; should be a list, e.g. ["lm_head"]' in told
    assert 'e.g. "all-linear" or ["q_proj", "v_proj"]' in told
    assert "merge (line 8): got 3; should be a group of fields (name: value)" in told


def test_an_override_of_a_group_leaves_its_other_fields_as_they_are(recipe):
    path = recipe(MINIMAL.replace("rows.jsonl", "rows.jsonl\n  columns: {prompt: a}"))

    config = load_config(path, ["dataset={max_length: 7, columns: {completion: b}}"])

    assert config.dataset.source == str(path.parent / "rows.jsonl")
    assert config.dataset.max_length == 7
    assert config.dataset.columns == {"completion": "b"}


@pytest.mark.parametrize(
    "overrides",
    [["cluster.workers={min: 1, max: 4}"], ["cluster.workers.min=1", "cluster.workers.max=4"]],
)
def test_an_override_may_make_a_range_of_a_number(recipe, overrides):
    config = load_config(recipe(MINIMAL + "cluster: {workers: 2}\n"), overrides)

    assert config.cluster.workers == WorkerRange(min=1, max=4)


def test_an_override_of_an_item_changes_that_item(recipe):
    path = recipe(MINIMAL + "evaluation: {scorers: [bleu, chrf]}\n")

    config = load_config(path, ["evaluation.scorers.1=rouge_l"])

    assert config.evaluation.scorers == ("bleu", "rouge_l")
    assert "no item of a list of 2" in problems(path, "evaluation.scorers.2=rouge_l")
    assert "has no list there" in problems(recipe(), "evaluation.scorers.0=rouge_l")


def test_an_override_that_is_no_plain_value_says_why(recipe):
    assert "tags (!name) are not allowed" in problems(recipe(), "training.epochs=!!float 3")
