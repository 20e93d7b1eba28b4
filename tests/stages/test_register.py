import json
from pathlib import Path

import numpy as np
import pytest

from qlora_core.artifacts import (
    AdapterCheckpoint,
    Artifact,
    EvalReport,
    MergedModel,
    Metric,
    Parity,
    QuantizedBase,
)
from qlora_core.backends.memory import MemoryRegistry, MemoryTracker, RecordingProgress
from qlora_core.config import GateConfig, RegistryConfig
from qlora_core.errors import UserError
from qlora_core.evaluation.records import LossRow, Records, write_records
from qlora_core.ports import Context
from qlora_core.stages.register import register_model

NUM_ROWS = 100


def artifact(stage: str, path: Path, facts) -> Artifact:
    return Artifact(stage=stage, key=f"key of {path.name}", digest="d" * 64, path=path, facts=facts)


def base(folder: Path) -> Artifact[QuantizedBase]:
    facts = QuantizedBase(
        method="nf4",
        architecture="LlamaForCausalLM",
        source="org/base@abc123",
        compute_dtype="float32",
        num_parameters=1,
        num_quantized_parameters=1,
        size_bytes=1,
        bits_per_parameter=4.1,
        context_length=256,
        mean_relative_error=0.1,
        layer_errors={},
        tied_embeddings=True,
    )
    return artifact("quantize_base", folder / "base", facts)


def adapter(folder: Path, name: str) -> Artifact[AdapterCheckpoint]:
    path = folder / name
    path.mkdir(exist_ok=True)
    (path / "adapter_model.safetensors").write_text(name)
    facts = AdapterCheckpoint(
        num_trainable_parameters=1,
        num_target_layers=1,
        num_steps=1,
        num_steps_run=1,
        num_steps_planned=1,
        num_tokens=1,
        num_supervised_tokens=1,
        train_loss=1.0,
        heldout_loss=1.0,
        stopped_early=False,
        seconds=1.0,
        tokens_per_s=1.0,
        supervised_tokens_per_s=1.0,
        peak_memory_bytes=1,
        num_workers=1,
        num_attempts=1,
    )
    return artifact("train_adapter", path, facts)


def merged(folder: Path, kl: float) -> Artifact[MergedModel]:
    path = folder / "merged"
    (path / "model").mkdir(parents=True, exist_ok=True)
    (path / "model" / "model.safetensors").write_text("merged")
    number = Metric(value=kl, num_rows=9)
    parity = Parity(
        onto="dequantized", kl=number, agreement=number, loss_merged=number, loss_adapter=number
    )
    facts = MergedModel(
        onto="dequantized", dtype="bfloat16", size_bytes=1, num_shards=1, parity=(parity,)
    )
    return artifact("merge_adapter", path, facts)


def report(folder: Path, subject: str, loss: float, digest: str = "rows") -> Artifact[EvalReport]:
    """A report whose rows scatter by 0.1 around ``loss``, all subjects alike."""
    path = folder / f"report-{subject}-{loss}"
    path.mkdir(exist_ok=True)
    noise = np.random.default_rng(0).normal(0, 0.1, NUM_ROWS)
    jitter = np.random.default_rng(round(loss * 1000)).normal(0, 0.02, NUM_ROWS)
    nlls = loss + noise - noise.mean() + jitter - jitter.mean()
    rows = tuple(LossRow(row=i, unit=i, nll=float(nll), num_tokens=1) for i, nll in enumerate(nlls))
    write_records(path, Records(losses=rows))
    metric = Metric(
        value=loss, standard_error=0.01, num_rows=NUM_ROWS, unit="nats", higher_is_better=False
    )
    facts = EvalReport(
        subject=subject,
        dataset_digest=digest,
        metrics={"loss": metric},
        num_truncated=0,
        samples=(),
        seconds=1.0,
    )
    return artifact("evaluate", path, facts)


class World:
    """One registry, and as many calls of the stage as a test makes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registry = MemoryRegistry()
        self.progress = RecordingProgress()
        self.num_calls = 0

    def register(self, name="a1", base_loss=2.0, tuned_loss=1.0, kl=None, **changes):
        self.num_calls += 1
        out = self.folder / f"out-{self.num_calls}"
        out.mkdir()
        tracker, progress = MemoryTracker(), self.progress
        ctx = Context(out, self.folder, tracker, self.registry, launcher=None, progress=progress)
        has_merged = kl is not None
        inputs = {
            "registry": RegistryConfig(),
            "gate": GateConfig(),
            "name": "cron",
            "base": base(self.folder),
            "adapter": adapter(self.folder, name),
            "merged": merged(self.folder, kl) if has_merged else None,
            "base_report": report(self.folder, "base", base_loss),
            "tuned_report": report(self.folder, "tuned", tuned_loss),
            "merged_report": report(self.folder, "merged", 1.01) if has_merged else None,
        }
        facts = register_model(ctx, **(inputs | changes))
        return facts, json.loads((out / "decision.json").read_text())


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)


def test_a_first_model_that_beats_its_base_becomes_champion(world):
    facts, decision = world.register(kl=0.01)

    candidate = world.registry.candidates["cron"][0]
    assert (facts.adapter_version, facts.merged_version) == ("1", "1")
    assert facts.promoted
    assert facts.aliases == ("challenger", "champion")
    assert world.registry.aliases["cron"] == {"challenger": "1", "champion": "1"}
    assert decision["promoted"]
    assert decision["against_base"]["difference"] == pytest.approx(-1.0)
    assert candidate.base == "org/base@abc123"
    assert candidate.merged == world.folder / "merged" / "model"
    assert candidate.metrics["loss"].value == 1.0
    assert candidate.tags["qlora.adapter_key"] == "key of a1"
    assert json.loads(candidate.tags["qlora.merged_scores"]) == {"loss": 1.01}


def test_a_model_no_better_than_its_base_stays_a_challenger_and_it_is_said_why(world):
    facts, decision = world.register(base_loss=1.001, tuned_loss=1.0)

    assert not facts.promoted
    assert facts.aliases == ("challenger",)
    assert world.registry.aliases["cron"] == {"challenger": "1"}
    assert "not better" in facts.reasons[0]
    assert not decision["promoted"]
    assert "stays a challenger" in world.progress.said[-1][1]


def test_a_merge_that_changed_too_much_holds_the_model_back(world):
    facts, _ = world.register(kl=0.5)

    assert not facts.promoted
    assert "KL divergence of 0.5" in facts.reasons[-1]


def test_a_challenger_must_beat_the_champion_too(world):
    world.register("a1", tuned_loss=0.5)

    worse, decision = world.register("a2", tuned_loss=0.8)
    better, _ = world.register("a3", tuned_loss=0.3)

    assert not worse.promoted
    assert decision["champion"]["version"] == "1"
    assert any("champion version 1" in reason for reason in worse.reasons)
    assert better.promoted
    assert world.registry.aliases["cron"] == {"challenger": "3", "champion": "3"}


def test_the_same_model_again_changes_nothing(world):
    first, _ = world.register(kl=0.01)

    second, decision = world.register(kl=0.01)

    assert second.adapter_version == first.adapter_version == "1"
    assert second.promoted
    assert "serves already" in second.reasons[-1]
    assert decision["promoted"]
    assert len(world.registry.candidates["cron"]) == 1


def test_a_kill_before_the_promotion_is_made_good_by_the_next_call(world):
    world.register()
    del world.registry.aliases["cron"]["champion"]

    facts, _ = world.register()

    assert facts.promoted
    assert world.registry.aliases["cron"]["champion"] == "1"


def test_a_champion_measured_on_other_rows_is_not_replaced(world):
    world.register("a1")

    facts, _ = world.register("a2", tuned_report=report(world.folder, "tuned", 0.1, "other rows"))

    assert not facts.promoted
    assert any("other held-out rows" in reason for reason in facts.reasons)


def test_the_registrys_own_name_goes_first(world):
    facts, _ = world.register(registry=RegistryConfig(name="crontab"))

    assert facts.name == "crontab"
    assert list(world.registry.candidates) == ["crontab"]


def test_a_disabled_registry_is_not_written_to(world):
    with pytest.raises(UserError, match=r"registry\.enabled"):
        world.register(registry=RegistryConfig(enabled=False))

    assert world.registry.candidates == {}
