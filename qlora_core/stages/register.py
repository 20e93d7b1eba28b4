"""register_model: decide, publish, and promote if the gate passes.

The decision is pure (`qlora_core.evaluation.gate`); this stage gathers what it reads and does what
it says. A retry after a kill at any point ends in the same versions and the same aliases: the
registry knows files it has seen, and a model that already serves is not asked to beat itself.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from qlora_core.artifacts import (
    AdapterCheckpoint,
    Artifact,
    EvalReport,
    Frozen,
    MergedModel,
    Parity,
    QuantizedBase,
    RegisteredModel,
)
from qlora_core.config import GateConfig, RegistryConfig
from qlora_core.errors import UserError
from qlora_core.evaluation.gate import Decision, decide
from qlora_core.evaluation.significance import Comparison, compare_reports
from qlora_core.ports import Candidate, Champion, Context, stage

_NAME = "register_model"


class DecisionFile(Frozen):
    """`decision.json`: everything the decision was made from."""

    promoted: bool
    reasons: tuple[str, ...]
    gate: GateConfig
    against_base: Comparison
    champion: Champion | None
    parity: Parity | None


@dataclass(frozen=True)
class _Measured:
    """What the gate reads."""

    gate: GateConfig
    tuned: Artifact[EvalReport]
    against_base: Comparison
    parity: Parity | None

    def decide(self, champion: Champion | None) -> Decision:
        """Ask the gate."""
        tuned = self.tuned.facts
        return decide(self.gate, tuned, self.against_base, parity=self.parity, champion=champion)


@stage(_NAME, version=1, facts=RegisteredModel)
def register_model(
    ctx: Context,
    registry: RegistryConfig,
    gate: GateConfig,
    name: str,
    base: Artifact[QuantizedBase],
    adapter: Artifact[AdapterCheckpoint],
    merged: Artifact[MergedModel] | None,
    base_report: Artifact[EvalReport],
    tuned_report: Artifact[EvalReport],
    merged_report: Artifact[EvalReport] | None,
) -> RegisteredModel:
    """Publish adapter and merged model under ``name``; promote them if the gate passes.

    Args:
        ctx: Folders and services.
        registry: Where to publish; its own name goes before ``name``.
        gate: When a model may serve.
        name: Name in the registry.
        base: The frozen base that the adapter belongs to.
        adapter: The adapter to publish.
        merged: The merged model to publish with it.
        base_report: Quality of the base.
        tuned_report: Quality of the adapter on its base.
        merged_report: Quality of the merged model.

    Raises:
        UserError: `registry.enabled` is false, or the registry refuses the name.
        LaunchError: The registry does not answer.
    """
    if not registry.enabled:
        raise UserError(
            "register_model was called, but registry.enabled is false.",
            fix="Set registry.enabled=true, or leave this stage out.",
        )
    candidate = _candidate(registry.name or name, base, adapter, merged, tuned_report)
    candidate = candidate.model_copy(update={"tags": candidate.tags | _scores(merged_report)})
    measured = _measured(gate, base_report, tuned_report, merged)
    return _publish(ctx, candidate, measured)


def _publish(ctx: Context, candidate: Candidate, measured: _Measured) -> RegisteredModel:
    champion = ctx.registry.champion(candidate.name)
    version, merged_version = ctx.registry.register(candidate)
    serves_already = champion is not None and champion.version == version
    decision = measured.decide(None if serves_already else champion)
    promoted = decision.passed or serves_already
    reasons = decision.reasons + ((f"version {version} serves already",) if serves_already else ())
    if decision.passed:
        ctx.registry.promote(candidate.name, version)
    _write(ctx.out, promoted, reasons, measured, champion)
    ctx.progress.say(_NAME, _sentence(candidate.name, version, promoted, reasons))
    return RegisteredModel(
        name=candidate.name,
        adapter_version=version,
        merged_version=merged_version,
        aliases=("challenger", "champion") if promoted else ("challenger",),
        promoted=promoted,
        reasons=reasons,
    )


def _candidate(
    name: str,
    base: Artifact[QuantizedBase],
    adapter: Artifact[AdapterCheckpoint],
    merged: Artifact[MergedModel] | None,
    tuned: Artifact[EvalReport],
) -> Candidate:
    tags = {
        "qlora.base_key": base.key,
        "qlora.base_digest": base.digest,
        "qlora.base_method": base.facts.method,
        "qlora.adapter_key": adapter.key,
        "qlora.adapter_digest": adapter.digest,
    }
    if merged is not None:
        tags |= {"qlora.merged_key": merged.key, "qlora.merged_onto": merged.facts.onto}
    return Candidate(
        name=name,
        adapter=adapter.path,
        merged=merged.path / "model" if merged else None,
        base=base.facts.source,
        tags=tags,
        dataset_digest=tuned.facts.dataset_digest,
        metrics=tuned.facts.metrics,
    )


def _scores(report: Artifact[EvalReport] | None) -> dict[str, str]:
    if report is None:
        return {}
    scores = {metric: found.value for metric, found in report.facts.metrics.items()}
    return {"qlora.merged_scores": json.dumps(scores, sort_keys=True)}


def _measured(
    gate: GateConfig,
    base: Artifact[EvalReport],
    tuned: Artifact[EvalReport],
    merged: Artifact[MergedModel] | None,
) -> _Measured:
    comparison = compare_reports(tuned, base, gate.metric, gate.confidence)
    return _Measured(gate, tuned, comparison, merged.facts.parity[0] if merged else None)


def _write(
    out: Path,
    promoted: bool,
    reasons: tuple[str, ...],
    measured: _Measured,
    champion: Champion | None,
) -> None:
    record = DecisionFile(
        promoted=promoted,
        reasons=reasons,
        gate=measured.gate,
        against_base=measured.against_base,
        champion=champion,
        parity=measured.parity,
    )
    (out / "decision.json").write_text(record.model_dump_json(indent=2) + "\n")


def _sentence(name: str, version: str, promoted: bool, reasons: tuple[str, ...]) -> str:
    verdict = "is the champion" if promoted else "stays a challenger"
    return f"{name} version {version} {verdict}: {'; '.join(reasons)}."
