import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
from peft import PeftModel

from qlora_core.artifacts import (
    Artifact,
    Incident,
    PreparedDataset,
    QuantizedBase,
    SplitFacts,
)
from qlora_core.backends.in_process import InProcessLauncher
from qlora_core.backends.memory import MemoryRegistry, MemoryTracker, RecordingProgress
from qlora_core.config import AdapterConfig, QuantizationConfig, SnapshotConfig, TrainingConfig
from qlora_core.errors import LaunchError
from qlora_core.fingerprint import file_digest, files_below
from qlora_core.modeling.loading import load_base
from qlora_core.ports import Services
from qlora_core.stages.kept_log import shortened
from qlora_core.stages.train import train_adapter
from qlora_core.store import Store
from qlora_core.training.incidents import note
from qlora_core.training.journal import LOG_FILE, VALIDATIONS_FILE, Validation, read_curve
from tests.training.conftest import SMALL

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY_SECOND_STEP = SnapshotConfig(every_steps=2)


def artifact(stage, path, facts) -> Artifact:
    return Artifact(stage=stage, key="k" * 64, digest="d" * 64, path=path, facts=facts)


@pytest.fixture
def base(nf4_base):
    facts = QuantizedBase(
        method="nf4",
        architecture="LlamaForCausalLM",
        source="org/tiny",
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
    return artifact("quantize_base", nf4_base, facts)


@pytest.fixture
def data(dataset):
    split = SplitFacts(num_rows=1, num_tokens=1, num_supervised_tokens=1, length_quantiles={})
    facts = PreparedDataset(
        num_rows_read=1,
        dropped={},
        train=split,
        heldout=split,
        num_prompts=0,
        format="text",
        sample="",
    )
    return artifact("prepare_dataset", dataset, facts)


def services() -> Services:
    return Services(
        tracker=MemoryTracker(),
        registry=MemoryRegistry(),
        launcher=InProcessLauncher(SnapshotConfig()),
        progress=RecordingProgress(),
    )


def produce(folder, base, data, used: Services, **training):
    config = TrainingConfig(**(SMALL | training))
    inputs = (base, data, QuantizationConfig(), AdapterConfig(rank=4), config, 1)
    return Store(folder).produce(train_adapter, used, *inputs).artifact


def test_the_adapter_is_sealed_with_its_curve_and_facts(base, data, tmp_path):
    result = produce(tmp_path, base, data, services())

    facts = result.facts
    assert facts.num_steps == facts.num_steps_run == facts.num_steps_planned == 6
    assert facts.num_target_layers == 14
    assert facts.num_trainable_parameters == 8192
    points = read_curve(result.path)
    assert facts.train_loss == points[-1].loss
    assert facts.heldout_loss == points[-1].heldout_loss
    assert facts.num_tokens == sum(point.num_tokens for point in points)
    assert facts.num_workers == facts.num_attempts == 1
    assert facts.seconds > 0
    assert facts.peak_memory_bytes > 1_000_000
    assert facts.predicted_peak_bytes > 1_000_000
    assert facts.num_rows_per_pass == SMALL["micro_batch"]


def test_the_same_inputs_give_the_same_loss_curve_and_digest(base, data, tmp_path):
    first = produce(tmp_path / "first", base, data, services())
    second = produce(tmp_path / "second", base, data, services())

    assert not first.path.samefile(second.path)
    assert read_curve(first.path) == read_curve(second.path)
    assert first.digest == second.digest


def test_what_is_measured_beside_training_is_tracked_once_and_said(base, data, tmp_path):
    lines = [
        Validation(step=2, heldout_loss=1.5),
        Validation(step=4, note="Snapshot 4 is damaged."),
        Validation(step=6, heldout_loss=1.25),
    ]

    class Beside(InProcessLauncher):
        def train(self, job, on_step) -> None:
            def hear(metrics) -> None:
                if metrics.step in (2, 5):
                    with (job.scratch / VALIDATIONS_FILE).open("a") as file:
                        file.write(lines.pop(0).model_dump_json() + "\n")
                on_step(metrics)

            super().train(job, hear)
            with (job.scratch / VALIDATIONS_FILE).open("a") as file:
                file.write(lines.pop(0).model_dump_json() + "\n")

    used = replace(services(), launcher=Beside(SnapshotConfig()))
    produce(tmp_path, base, data, used)

    assert used.tracker.metrics["heldout/snapshot_loss"] == {2: 1.5, 6: 1.25}
    assert ("train_adapter", "Snapshot 4 is damaged.") in used.progress.said


def test_what_went_wrong_is_tracked_of_a_training_that_failed(base, data, tmp_path):
    class Lost(InProcessLauncher):
        def train(self, job, on_step) -> None:
            note(job.scratch, Incident(kind="lost_driver", what="It is gone.", remedy="Again."))
            raise LaunchError("lost too often")

    used = replace(services(), launcher=Lost(SnapshotConfig()))
    with pytest.raises(LaunchError):
        produce(tmp_path, base, data, used)

    assert used.tracker.tags == {"qloraflow.incidents": "Lost driver: It is gone. Again."}


@pytest.mark.parametrize("fails", [False, True])
def test_what_workers_said_goes_with_the_run_however_training_ends(base, data, tmp_path, fails):
    class Talking(InProcessLauncher):
        def train(self, job, on_step) -> None:
            (job.scratch / LOG_FILE).write_text("(worker) something odd\n")
            if fails:
                raise LaunchError("lost too often")
            super().train(job, on_step)

    used = replace(services(), launcher=Talking(SnapshotConfig()))
    with pytest.raises(LaunchError) if fails else nullcontext():
        produce(tmp_path, base, data, used)

    assert used.tracker.texts == {"logs/train_adapter.log": "(worker) something odd\n"}
    assert bool(list(tmp_path.rglob(LOG_FILE))) is fails, "a sealed adapter has no scratch folder"


def test_a_training_without_a_log_tracks_none(base, data, tmp_path):
    used = services()

    produce(tmp_path, base, data, used)

    assert used.tracker.texts == {}


def test_of_a_long_log_beginning_and_end_are_kept_and_the_rest_is_counted(tmp_path):
    (tmp_path / "log").write_text("a" * 10 + "b" * 7 + "c" * 10)
    (tmp_path / "short").write_text("a" * 10 + "c" * 10)

    assert shortened(tmp_path / "short", 10) == "a" * 10 + "c" * 10
    assert shortened(tmp_path / "log", 10) == (
        "a" * 10 + "\n[... 7 bytes left out ...]\n" + "c" * 10
    )


def test_peft_reads_the_adapter(base, data, tmp_path):
    result = produce(tmp_path, base, data, services())

    model = PeftModel.from_pretrained(load_base(base.path), result.path)

    assert model.peft_config["default"].base_model_name_or_path == "org/tiny"
    assert model.peft_config["default"].r == 4


def test_every_step_is_tracked_and_shown(base, data, tmp_path):
    used = services()

    result = produce(tmp_path, base, data, used)

    tracked = used.tracker.metrics
    losses = {point.step: point.loss for point in read_curve(result.path)}
    assert tracked["train/loss"] == losses
    assert sorted(tracked["heldout/loss"]) == [2, 4, 6]
    for name in ("learning_rate", "grad_norm", "tokens_per_s", "supervised_tokens_per_s"):
        assert all(math.isfinite(value) for value in tracked[f"train/{name}"].values())
    assert set(tracked) >= {"train/memory_bytes", "train/epoch"}
    shown = [update for update in used.progress.updates if update[0] == "train_adapter"]
    assert [update[1:3] for update in shown[-6:]] == [(n, 6) for n in range(1, 7)]
    assert "tok/s" in shown[-1][3]


def test_steps_that_are_told_again_after_a_resume_are_tracked_and_not_shown(base, data, tmp_path):
    class Cut(InProcessLauncher):
        def train(self, job, on_step) -> None:
            def hear(metrics) -> None:
                on_step(metrics)
                if metrics.step == 5:
                    raise LaunchError("the plug was pulled")

            super().train(job, hear)

    with pytest.raises(LaunchError):
        produce(tmp_path, base, data, replace(services(), launcher=Cut(EVERY_SECOND_STEP)))
    used = replace(services(), launcher=InProcessLauncher(EVERY_SECOND_STEP))
    produce(tmp_path, base, data, used)

    shown = [update[1] for update in used.progress.updates if update[0] == "train_adapter"]
    assert shown[0] == 4
    assert sorted(used.tracker.metrics["train/loss"]) == [1, 2, 3, 4, 5, 6]


def test_the_sealed_files_are_those_of_peft_and_the_curve(base, data, tmp_path):
    result = produce(tmp_path, base, data, services())

    names = set(files_below(result.path)) - {"manifest.json", "provenance.json"}

    assert names == {"adapter_config.json", "adapter_model.safetensors", "curve.jsonl"}
    assert all(len(file_digest(result.path / name)) == 64 for name in names)
