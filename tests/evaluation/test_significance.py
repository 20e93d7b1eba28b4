import math
import random

import numpy as np
import pytest
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest
from scipy import stats

from qlora_core.artifacts import Artifact, EvalReport, Metric
from qlora_core.errors import UserError
from qlora_core.evaluation.metrics import measure
from qlora_core.evaluation.records import AnswerRow, LossRow, Records, write_records
from qlora_core.evaluation.significance import compare_metrics, compare_reports, compare_rows
from qlora_core.evaluation.table import side_by_side

WORDS = "the a pub near river cheap food serves French it is place city centre".split()  # noqa: SIM905


def scored(scores, name="judge") -> Records:
    return Records((), tuple(AnswerRow("?", "a", ("a",), {name: float(s)}, False) for s in scores))


def lost(nats, tokens) -> Records:
    pairs = enumerate(zip(nats, tokens, strict=True))
    return Records(tuple(LossRow(i, i, float(n), int(t)) for i, (n, t) in pairs))


def said(noise: float, seed: int, num_rows: int = 60) -> Records:
    """Answers that repeat their reference, but for a share of wrong words."""
    wording, errors = random.Random(0), random.Random(seed)
    rows = []
    for _ in range(num_rows):
        reference = [wording.choice(WORDS) for _ in range(12)]
        answer = [errors.choice(WORDS) if errors.random() < noise else w for w in reference]
        rows.append(AnswerRow("?", " ".join(answer), (" ".join(reference),), {"bleu": 0.0}, False))
    return Records((), tuple(rows))


def report(folder, records: Records, *names: str, digest="a" * 64) -> Artifact[EvalReport]:
    folder.mkdir()
    write_records(folder, records)
    facts = EvalReport(
        subject="tuned", dataset_digest=digest, num_truncated=0, samples=(), seconds=0.0,
        metrics={name: measure(name, records) for name in names},
    )  # fmt: skip
    return Artifact(stage="evaluate", key="k", digest="d", path=folder, facts=facts)


def test_row_scores_are_compared_like_a_paired_t_test():
    generator = np.random.default_rng(0)
    theirs = generator.random(30)
    ours = np.clip(theirs + generator.normal(0.05, 0.1, 30), 0, 1)

    comparison = compare_rows("judge", scored(ours), scored(theirs), 0.9)

    oracle = stats.ttest_rel(ours, theirs).confidence_interval(0.9)
    assert comparison.difference == pytest.approx((ours - theirs).mean())
    assert comparison.interval == pytest.approx((oracle.low, oracle.high), rel=1e-3)
    assert comparison.paired
    assert comparison.num_rows == 30


def test_the_interval_of_the_loss_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        tokens = generator.integers(1, 30, 40)
        hard = generator.normal(2.0, 0.5, 40)
        theirs, ours = tokens * hard, tokens * (hard - 0.1 + generator.normal(0, 0.2, 40))
        low, high = compare_rows("loss", lost(ours, tokens), lost(theirs, tokens), 0.9).interval
        covered += low < -0.1 < high

    assert 0.86 <= covered / 400 <= 0.94


def test_perplexities_are_compared_by_the_delta_method():
    tokens = np.array([3, 5, 9, 4, 7, 6])
    ours, theirs = tokens * np.array([1, 1.1, 0.9, 1.2, 1, 0.8]), tokens * 1.5

    comparison = compare_rows("perplexity", lost(ours, tokens), lost(theirs, tokens))

    expected = math.exp(ours.sum() / tokens.sum()) - math.exp(1.5)
    assert comparison.difference == pytest.approx(expected)
    residuals = math.exp(ours.sum() / tokens.sum()) * (ours - tokens * ours.sum() / tokens.sum())
    error = math.sqrt(6 / 5 * np.square(residuals / tokens.sum()).sum())
    assert comparison.standard_error == pytest.approx(error)


def test_bleu_is_compared_like_sacrebleus_paired_bootstrap(monkeypatch):
    ours, theirs = said(0.10, seed=1), said(0.18, seed=2)

    comparison = compare_rows("bleu", ours, theirs)

    monkeypatch.setenv("SACREBLEU_SEED", "7")
    systems = [
        (name, [row.prediction for row in records.answers])
        for name, records in (("Baseline", theirs), ("ours", ours))
    ]
    streams = [[row.references[0] for row in ours.answers]]
    metric = BLEU(references=streams)
    test = PairedTest(systems, {"BLEU": metric}, references=None, test_type="bs", n_samples=1000)
    p_value = test()[1]["BLEU"][1].p_value
    z = comparison.difference / comparison.standard_error
    assert comparison.difference == pytest.approx(
        metric.corpus_score(systems[1][1], None).score
        - metric.corpus_score(systems[0][1], None).score
    )
    assert 2 * stats.norm.sf(abs(z)) == pytest.approx(p_value, abs=0.03)
    assert comparison.is_better()


def test_lower_loss_is_an_improvement():
    tokens = np.full(10, 4)
    ours, theirs = tokens * np.linspace(0.9, 1.1, 10), tokens * np.linspace(1.4, 1.5, 10)

    comparison = compare_rows(
        "loss", lost(ours, tokens), lost(theirs, tokens), higher_is_better=False
    )

    assert comparison.difference < 0
    assert comparison.improvement() == (-comparison.interval[1], -comparison.interval[0])
    assert comparison.is_better()


def test_right_and_wrong_get_bonett_and_prices_interval():
    ours, theirs = [1] * 60 + [0] * 40, [1] * 50 + [0] * 5 + [1] * 5 + [0] * 40

    comparison = compare_rows("judge", scored(ours), scored(theirs))

    gained, lost_ = sum(np.subtract(ours, theirs) == 1), sum(np.subtract(ours, theirs) == -1)
    p12, p21 = (gained + 1) / 102, (lost_ + 1) / 102  # Bonett & Price 2012, eq. 5
    margin = 1.959964 * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / 102)
    assert comparison.interval == pytest.approx((p12 - p21 - margin, p12 - p21 + margin))


def test_two_lucky_rows_prove_nothing_but_many_do():
    assert not compare_rows("judge", scored([1, 1]), scored([0, 0])).is_better()
    assert compare_rows("judge", scored([1] * 20), scored([0] * 20)).is_better()


def test_one_row_has_no_interval():
    comparison = compare_rows("judge", scored([0.9]), scored([0.1]))

    assert comparison.interval is None
    assert not comparison.is_better()


def test_reports_on_the_same_rows_are_paired_and_on_others_are_not(tmp_path):
    hard = np.random.default_rng(2).random(25) * 0.9
    base = report(tmp_path / "base", scored(hard), "judge")
    tuned = report(tmp_path / "tuned", scored(hard + 0.02 + hard / 100), "judge")
    moved = report(tmp_path / "moved", scored(hard), "judge", digest="b" * 64)

    paired = compare_reports(tuned, base, "judge")
    unpaired = compare_reports(tuned, moved, "judge")

    assert paired.is_better()
    assert not unpaired.is_better()
    assert (paired.paired, unpaired.paired) == (True, False)
    assert paired.difference == pytest.approx(unpaired.difference)


def test_a_metric_that_was_not_measured_is_named_with_those_that_were(tmp_path):
    base = report(tmp_path / "base", scored([0.1, 0.2]), "judge")

    with pytest.raises(UserError, match=r"bleu was not measured[\s\S]*one of judge"):
        compare_reports(base, base, "bleu")


def test_independent_numbers_add_their_errors_in_squares():
    ours = Metric(value=0.5, standard_error=0.03, num_rows=2000)
    theirs = Metric(value=0.4, standard_error=0.04, num_rows=2000)

    comparison = compare_metrics("judge", ours, theirs)

    assert comparison.standard_error == pytest.approx(0.05)
    assert comparison.interval == pytest.approx((0.1 - 0.098, 0.1 + 0.098), abs=1e-3)


def test_an_error_of_zero_is_not_taken_at_its_word():
    ours = Metric(value=1.0, standard_error=0.0, num_rows=2)
    theirs = Metric(value=0.0, standard_error=0.0, num_rows=2)

    assert not compare_metrics("judge", ours, theirs).is_better()


def test_side_by_side_holds_all_subjects_and_what_merging_changed(tmp_path):
    base, tuned, merged = (
        report(tmp_path / name, scored(scores), "judge")
        for name, scores in [("b", [0.1, 0.2, 0.3]), ("t", [0.7, 0.9, 0.8]), ("m", [0.7, 0.9, 0.7])]
    )

    (row,) = side_by_side(base, tuned, merged)
    (without,) = side_by_side(base, tuned, None)

    assert (row.base.value, row.tuned.value) == pytest.approx((0.2, 0.8))
    assert row.tuned_against_base.difference == pytest.approx(0.6)
    assert row.merged_against_tuned.difference == pytest.approx(-0.1 / 3)
    assert without.merged is None
