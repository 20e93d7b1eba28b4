"""Decide whether a tuned model may become the champion. Pure: numbers in, a reasoned answer out.

Every condition is looked at, and every one is answered in words with its numbers, passed or not, so
that a person who was not there can follow the decision. "Better" always means: the interval of the
improvement lies above zero.

Usage, as the register stage does it::

    against_base = compare_reports(tuned, base, config.metric, config.confidence)
    decision = decide(config, tuned.facts, against_base, parity=merged_parity, champion=champion)

Do not ask about a champion that *is* the candidate (the same version): nothing beats itself.
"""

from dataclasses import dataclass

from qlora_core.artifacts import EvalReport, Parity
from qlora_core.config import GateConfig
from qlora_core.evaluation.significance import Comparison, compare_metrics
from qlora_core.ports import Champion

_BY_HAND = (
    "to promote all the same, give the new version the alias champion in MLflow (qlora ui, Models)"
)


@dataclass(frozen=True)
class Decision:
    """Whether the model passed, and why: one sentence for each condition."""

    passed: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class _Verdict:
    passed: bool
    reason: str


def decide(
    config: GateConfig,
    tuned: EvalReport,
    against_base: Comparison,
    *,
    parity: Parity | None,
    champion: Champion | None,
) -> Decision:
    """Say whether the tuned model is better than base and champion, and merged without harm.

    Args:
        config: Which metric, how sure, and how much merging may change.
        tuned: Report of the tuned model.
        against_base: Tuned against base on ``config.metric``, from `compare_reports`.
        parity: How the merged model that was kept differs; none when nothing was merged.
        champion: What serves now; none when nothing does.
    """
    verdicts = [_against("base", against_base), _against_champion(config, tuned, champion)]
    if parity is not None:
        verdicts.append(_merge(config, parity))
    return Decision(all(v.passed for v in verdicts), tuple(v.reason for v in verdicts))


def describe(name: str, comparison: Comparison) -> str:
    """Return one sentence, as in "exact_match 0.955 against base's 0.000: +0.955, 95 % ..."."""
    c = comparison
    values = f"{c.metric} {c.candidate:.3f} against {name}'s {c.reference:.3f}"
    numbers = f"{values}: {c.difference:+.3f}"
    if c.interval is None:
        return f"{numbers}, measured on {c.num_rows} rows, too few to tell from noise"
    low, high = c.interval
    return f"{numbers}, {100 * c.confidence:g} % interval {low:+.3f} to {high:+.3f}"


def _against(name: str, comparison: Comparison) -> _Verdict:
    better = comparison.is_better()
    verdict = "better" if better else "not better by more than the noise"
    return _Verdict(better, f"{describe(name, comparison)}: {verdict}")


def _against_champion(config: GateConfig, tuned: EvalReport, champion: Champion | None) -> _Verdict:
    if champion is None:
        return _Verdict(True, "there is no champion yet")
    name = f"champion version {champion.version}"
    if champion.dataset_digest != tuned.dataset_digest:
        return _Verdict(
            False,
            f"{name} was measured on other held-out rows ({champion.dataset_digest[:12]}, not "
            f"{tuned.dataset_digest[:12]}), so the two cannot be compared; {_BY_HAND}",
        )
    if config.metric not in champion.metrics:
        return _Verdict(False, f"{name} was not measured by {config.metric}; {_BY_HAND}")
    ours, theirs = tuned.metrics[config.metric], champion.metrics[config.metric]
    return _against(name, compare_metrics(config.metric, ours, theirs, config.confidence))


def _merge(config: GateConfig, parity: Parity) -> _Verdict:
    kl, limit = parity.kl.value, config.max_merge_kl
    fits = kl <= limit
    sign = "within" if fits else "above"
    return _Verdict(
        fits,
        f"merging changed the answers by a KL divergence of {kl:.2g} nats per token, {sign} the "
        f"allowed {limit:g}",
    )
