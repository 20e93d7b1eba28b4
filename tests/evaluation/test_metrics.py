from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from qlora_core.config import CustomScorer, EvaluationConfig
from qlora_core.errors import UserError
from qlora_core.evaluation.metrics import (
    exact_match,
    make_scorers,
    measure,
    rouge_l,
    score_answer,
)
from qlora_core.evaluation.records import AnswerRow, Records
from qlora_core.sources import find_source

ANSWERS = [
    ("the cat sat on the mat", ("the cat is on the mat", "there is a cat on the mat")),
    ("a pub near the river", ("The pub is near the river .",)),
    ("Alimentum is a cheap place", ("Alimentum is cheap", "A cheap place is Alimentum", "cheap!")),
    ("", ("something",)),
    ("it serves French food in the city centre", ("it serves French food in the centre",)),
]


def records(answers=ANSWERS) -> Records:
    return Records((), tuple(AnswerRow("?", p, refs, {}, False) for p, refs in answers))


def streams(answers=ANSWERS) -> tuple[list[str], list[list[str | None]]]:
    most = max(len(refs) for _, refs in answers)
    padded = [[*refs, *[None] * (most - len(refs))] for _, refs in answers]
    return [p for p, _ in answers], [list(stream) for stream in zip(*padded, strict=True)]


def custom(path: Path, text: str, function: str = "judge"):
    path.write_text(text)
    config = EvaluationConfig(scorers=(CustomScorer(file=str(path), function=function),))
    return make_scorers(config, (find_source(str(path)),))


@pytest.mark.parametrize(
    ("name", "oracle"), [("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)]
)
def test_corpus_metrics_equal_sacrebleu_with_different_numbers_of_references(name, oracle):
    metric = measure(name, records())

    assert metric.value == pytest.approx(oracle(*streams()).score, abs=1e-12)
    assert metric.value > 10
    assert metric.num_rows == 5


@pytest.mark.parametrize(
    ("name", "oracle"), [("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)]
)
def test_their_errors_agree_with_recounting_each_resample(name, oracle):
    answers = ANSWERS * 4
    generator = np.random.default_rng(0)
    draws = generator.integers(0, len(answers), (300, len(answers)))

    metric = measure(name, records(answers))

    scores = [oracle(*streams([answers[i] for i in draw])).score for draw in draws]
    assert metric.standard_error == pytest.approx(np.std(scores, ddof=1), rel=0.15)


def test_exact_match_takes_any_reference_and_ignores_white_space_at_the_ends():
    assert exact_match(" 0 9 * * *\n", ("1 9 * * *", "0 9 * * *")) == 1.0
    assert exact_match("0  9 * * *", ("0 9 * * *",)) == 0.0


def test_rouge_l_of_ascii_equals_rouge_scores_own_best_over_references():
    oracle = RougeScorer(["rougeL"])

    for prediction, references in ANSWERS:
        expected = max(oracle.score(r, prediction)["rougeL"].fmeasure for r in references)
        assert rouge_l(prediction, references) == expected


def test_rouge_l_reads_words_of_other_scripts():
    assert rouge_l("καλημέρα κόσμε", ("Καλημέρα, κόσμε!",)) == 1.0


def test_scorers_come_in_the_recipes_order_with_all_their_numbers(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text("def judge(prediction, reference): return len(prediction) / len(reference)")
    config = EvaluationConfig(
        scorers=("chrf", CustomScorer(file=str(path), function="judge"), "exact_match")
    )

    scorers = make_scorers(config, (find_source(str(path)),))

    assert list(score_answer(scorers, 0, "ab", ("abcd", "abc"))) == ["chrf", "judge", "exact_match"]


def test_an_own_scorer_keeps_its_best_reference_and_leaves_nothing_in_its_folder(tmp_path):
    (scorer,) = custom(
        tmp_path / "s.py", "def judge(prediction, reference): return prediction == reference"
    )

    assert scorer.score("b", ("a", "b")) == 1.0
    assert scorer.score("c", ("a", "b")) == 0.0
    assert [path.name for path in tmp_path.iterdir()] == ["s.py"]


def test_an_own_scorer_that_raises_is_named_with_file_function_and_prompt(tmp_path):
    scorers = custom(tmp_path / "s.py", "def judge(prediction, reference): return int(prediction)")

    with pytest.raises(UserError) as caught:
        score_answer(scorers, 12, "noon", ("12",))

    assert "Held-out prompt 12" in caught.value.what
    assert str(tmp_path / "s.py") in caught.value.what
    assert "judge(prediction='noon', reference='12') raised ValueError" in caught.value.what


@pytest.mark.parametrize("value", ["1.5", "-0.1", "float('nan')", "float('inf')"])
def test_an_own_scorer_outside_0_to_1_is_refused(tmp_path, value):
    scorers = custom(tmp_path / "s.py", f"def judge(prediction, reference): return {value}")

    with pytest.raises(UserError, match="returned"):
        score_answer(scorers, 0, "a", ("b",))


def test_an_own_scorer_that_returns_no_number_is_refused(tmp_path):
    scorers = custom(tmp_path / "s.py", "def judge(prediction, reference): pass")

    with pytest.raises(UserError, match="raised TypeError"):
        score_answer(scorers, 0, "a", ("b",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def other(p, r): return 1", "there is no function 'judge'"),
        ("judge = 3", "there is no function 'judge'"),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("def judge(:", "SyntaxError"),
    ],
)
def test_a_scorers_file_that_cannot_be_used_says_why(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        custom(tmp_path / "s.py", text)


@pytest.mark.parametrize("function", ["loss", "exact_match"])
def test_two_metrics_of_one_name_are_refused(tmp_path, function):
    path = tmp_path / "s.py"
    path.write_text(f"def {function}(prediction, reference): return 1.0")
    config = EvaluationConfig(
        scorers=("exact_match", CustomScorer(file=str(path), function=function))
    )

    with pytest.raises(UserError, match=f"the name '{function}' is used twice"):
        make_scorers(config, (find_source(str(path)),))
