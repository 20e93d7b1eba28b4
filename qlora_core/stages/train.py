"""Train a LoRA adapter on the frozen, quantised base."""

from collections.abc import Callable, Iterable
from contextlib import suppress

from qlora_core.artifacts import (
    AdapterCheckpoint,
    Artifact,
    Incident,
    PreparedDataset,
    QuantizedBase,
)
from qlora_core.config import AdapterConfig, QuantizationConfig, TrainingConfig
from qlora_core.errors import StoreError
from qlora_core.ports import Context, StepMetrics, TrainJob, stage
from qlora_core.stages.kept_log import log_kept
from qlora_core.training.desk import SUMMARY_FILE
from qlora_core.training.incidents import history
from qlora_core.training.journal import VALIDATIONS_FILE, CurvePoint, Tail, read_validations
from qlora_core.training.snapshot import newest_step


@stage(
    "train_adapter",
    version=1,
    facts=AdapterCheckpoint,
    packages=("torch", "transformers", "peft", "bitsandbytes"),
)
def train_adapter(
    ctx: Context,
    base: Artifact[QuantizedBase],
    data: Artifact[PreparedDataset],
    quantization: QuantizationConfig,
    adapter: AdapterConfig,
    training: TrainingConfig,
    seed: int,
) -> AdapterCheckpoint:
    """Train through ``ctx.launcher``, wherever its workers are, and pass on what they measure.

    Raises:
        TrainingError: The loss or a gradient is not finite.
        ResourceError: There is not what the launcher was told to use.
        LaunchError: Workers were lost more often than allowed.
    """
    job = TrainJob(
        base=base.path,
        data=data.path,
        out=ctx.out,
        scratch=ctx.scratch,
        quantization=quantization,
        adapter=adapter,
        training=training,
        seed=seed,
        base_name=base.facts.source,
    )
    validations = Tail(ctx.scratch / VALIDATIONS_FILE)
    try:
        with log_kept(ctx, "train_adapter"):
            ctx.launcher.train(job, _listener(ctx, validations))
    finally:  # of a training that they ended, too
        with suppress(StoreError):  # what ended it matters more
            ctx.tracker.set_tags(incident_tags(history(ctx.scratch)))
    _pass_on(ctx, validations)
    summary = (ctx.scratch / SUMMARY_FILE).read_text("utf-8")
    return AdapterCheckpoint.model_validate_json(summary)


def _listener(ctx: Context, validations: Tail) -> Callable[[StepMetrics], None]:
    newest = _newest_snapshot(ctx)

    def on_step(metrics: StepMetrics) -> None:
        ctx.tracker.log_metrics(tracked_metrics(metrics), metrics.step)
        if metrics.step >= newest:  # those before are told again, and were shown when they came
            note = f"loss {metrics.loss:.3f} · {metrics.tokens_per_s:.0f} tok/s"
            ctx.progress.update("train_adapter", metrics.step, metrics.num_steps, note)
        _pass_on(ctx, validations)

    return on_step


def _newest_snapshot(ctx: Context) -> int:
    """Return the step of the newest snapshot of earlier calls, sound or not; 0: there is none."""
    with suppress(OSError):  # training will meet it, and say so
        return newest_step(ctx.scratch)
    return 0


def _pass_on(ctx: Context, validations: Tail) -> None:
    """Track what has been measured of snapshots meanwhile."""
    for found in read_validations(validations.lines()):
        if found.heldout_loss is not None:
            ctx.tracker.log_metrics({"heldout/snapshot_loss": found.heldout_loss}, found.step)
        if found.note:
            ctx.progress.say("train_adapter", found.note)


def incident_tags(incidents: Iterable[Incident]) -> dict[str, str]:
    """Return the tag under which trackers know what went wrong on the way; none if nothing did."""
    told = "\n".join(incident.sentence() for incident in incidents)
    return {"qloraflow.incidents": told} if told else {}


def tracked_metrics(metrics: StepMetrics) -> dict[str, float]:
    """Return a step's numbers under the names that trackers know them by."""
    return tracked_point(metrics) | {
        "train/tokens_per_s": metrics.tokens_per_s,
        "train/supervised_tokens_per_s": metrics.supervised_tokens_per_s,
        "train/memory_bytes": float(metrics.memory_bytes),
    }


def tracked_point(point: StepMetrics | CurvePoint) -> dict[str, float]:
    """Return the part of `tracked_metrics` that is sealed with the adapter, to be told again."""
    tracked = {
        "train/loss": point.loss,
        "train/learning_rate": point.learning_rate,
        "train/grad_norm": point.grad_norm,
        "train/epoch": point.epoch,
    }
    if point.heldout_loss is not None:
        tracked["heldout/loss"] = point.heldout_loss
    return tracked
