import pytest

from qlora_core.artifacts import EvalReport, Metric, Parity
from qlora_core.config import GateConfig
from qlora_core.evaluation.gate import decide
from qlora_core.evaluation.significance import Comparison, compare_metrics
from qlora_core.ports import Champion

CONFIG = GateConfig(metric="exact_match", confidence=0.95, max_merge_kl=0.1)


def share(value: float, error: float | None = 0.01, num_rows: int = 200) -> Metric:
    return Metric(value=value, standard_error=error, num_rows=num_rows, unit="share")


def report(value: float, digest: str = "a" * 64) -> EvalReport:
    metrics = {"exact_match": share(value)}
    return EvalReport(
        subject="tuned", dataset_digest=digest, metrics=metrics, num_truncated=0, samples=(),
        seconds=1.0,
    )  # fmt: skip


def against_base(tuned: float, base: float, **changes: float) -> Comparison:
    return compare_metrics("exact_match", share(tuned, **changes), share(base, **changes))


def champion(value: float, digest: str = "a" * 64, metric: str = "exact_match") -> Champion:
    return Champion(version="3", dataset_digest=digest, metrics={metric: share(value)})


def parity(kl: float) -> Parity:
    nats = Metric(value=kl, standard_error=0.001, num_rows=64, higher_is_better=False)
    return Parity(
        onto="dequantized", kl=nats, agreement=share(1.0), loss_merged=nats, loss_adapter=nats
    )


def test_a_first_model_that_beats_its_base_passes_and_says_by_how_much():
    decision = decide(CONFIG, report(0.955), against_base(0.955, 0.0), parity=None, champion=None)

    assert decision.passed
    assert decision.reasons[0].startswith("exact_match 0.955 against base's 0.000: +0.955, 95 %")
    assert decision.reasons[1] == "there is no champion yet"


def test_a_difference_within_the_noise_does_not_pass():
    decision = decide(CONFIG, report(0.51), against_base(0.51, 0.5), parity=None, champion=None)

    assert not decision.passed
    assert "not better by more than the noise" in decision.reasons[0]


def test_lower_loss_is_better():
    config = GateConfig(metric="loss")
    low, high = (
        Metric(value=v, standard_error=0.01, num_rows=50, higher_is_better=False) for v in (1, 2)
    )

    better = decide(
        config, report(0.0), compare_metrics("loss", low, high), parity=None, champion=None
    )
    worse = decide(
        config, report(0.0), compare_metrics("loss", high, low), parity=None, champion=None
    )

    assert better.passed
    assert not worse.passed


def test_without_a_standard_error_nothing_passes():
    comparison = against_base(0.9, 0.1, error=None)

    decision = decide(CONFIG, report(0.9), comparison, parity=None, champion=None)

    assert not decision.passed
    assert "too few to tell from noise" in decision.reasons[0]


@pytest.mark.parametrize(("served", "passes"), [(0.80, True), (0.95, False), (0.99, False)])
def test_the_champion_must_be_beaten_by_more_than_the_noise(served: float, passes: bool):
    decision = decide(
        CONFIG, report(0.955), against_base(0.955, 0.0), parity=None, champion=champion(served)
    )

    assert decision.passed is passes
    assert f"against champion version 3's {served:.3f}" in decision.reasons[1]


def test_a_champion_measured_on_other_rows_is_left_in_place():
    other = champion(0.1, digest="b" * 64)

    decision = decide(CONFIG, report(0.955), against_base(0.955, 0.0), parity=None, champion=other)

    assert not decision.passed
    assert "measured on other held-out rows" in decision.reasons[1]
    assert "give the new version the alias champion" in decision.reasons[1]


def test_a_champion_without_the_metric_is_left_in_place():
    other = champion(1.0, metric="bleu")

    decision = decide(CONFIG, report(0.955), against_base(0.955, 0.0), parity=None, champion=other)

    assert not decision.passed
    assert "was not measured by exact_match" in decision.reasons[1]
    assert "give the new version the alias champion" in decision.reasons[1]


@pytest.mark.parametrize(("kl", "passes"), [(0.01, True), (0.2, False), (float("nan"), False)])
def test_merging_may_change_the_answers_only_so_much(kl: float, passes: bool):
    decision = decide(
        CONFIG, report(0.955), against_base(0.955, 0.0), parity=parity(kl), champion=None
    )

    assert decision.passed is passes
    assert "KL divergence" in decision.reasons[2]
    assert "allowed 0.1" in decision.reasons[2]
