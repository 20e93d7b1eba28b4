"""What a run tells MLflow besides what its stages tell: recipe, inputs, results, where it is from.

Stages log while they work, so one that the store had already logs nothing. Everything that a person
compares runs by is therefore logged here, from the artefacts; a tracker counts the same name at the
same step once, so saying it twice does no harm.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from flows.records import RunRecord
from flows.result import RunResult, page
from qlora_core.artifacts import Artifact, Metric, PreparedDataset
from qlora_core.backends.mlflow_tracking import MlflowTracker, flatten
from qlora_core.config import RunConfig
from qlora_core.ports import Tracker
from qlora_core.stages.train import incident_tags, tracked_point
from qlora_core.training.journal import CurvePoint, read_curve
from tasks import places


def open_tracker(record: RunRecord, folder: Path, prefect_url: str) -> MlflowTracker:
    """Return the tracker of this run, which continues what an earlier attempt began."""
    config = record.config
    place = places.tracking_place(config)
    return MlflowTracker(
        journal_folder=folder / "journal",
        tracking_uri=place.tracking_uri,
        experiment=places.experiment(config),
        run_name=record.run_id,
        run_id=record.mlflow_run_id,
        artifact_location=place.artifact_location,
        tags=_tags(record, prefect_url),
    )


def log_recipe(tracker: Tracker, config: RunConfig, folder: Path) -> None:
    """Log the recipe: each field as a parameter, the whole as a file."""
    tracker.log_params(flatten(config))
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), "utf-8")
    tracker.log_file(path)


def log_inputs(tracker: Tracker, config: RunConfig, data: Artifact[PreparedDataset]) -> None:
    """Log which rows went in."""
    heldout = config.dataset.heldout.source or config.dataset.source
    train_rows, heldout_rows = data.facts.train.num_rows, data.facts.heldout.num_rows
    train_uri = config.dataset.source
    tracker.log_dataset("train", data.digest, train_uri, "training", train_rows)
    tracker.log_dataset("heldout", data.digest, heldout, "heldout", heldout_rows)


def log_result(tracker: Tracker, record: RunRecord, result: RunResult, folder: Path) -> None:
    """Log what came out: numbers, curves, pictures, the page, the names of the artefacts."""
    tracker.log_metrics(dict(_final_metrics(result)))
    curve = read_curve(result.adapter.path)
    for step in curve:
        tracker.log_metrics(tracked_point(step), step.step)
    tracker.set_tags({f"key.{role}": ref.key for role, ref in record.artifacts.items()})
    tracker.set_tags(incident_tags(result.adapter.facts.incidents))
    (folder / "report.md").write_text(page(result), "utf-8")
    tracker.log_file(folder / "report.md")
    for picture in _draw(result, curve, folder / "plots"):
        tracker.log_file(picture, "plots")


def _final_metrics(result: RunResult) -> Iterator[tuple[str, float]]:
    for report in result.reports():
        for name, metric in report.metrics.items():
            yield f"{report.subject}/{name}", metric.value
            if metric.standard_error is not None:
                yield f"{report.subject}/{name}_se", metric.standard_error
    if result.merged:
        yield "merge/kl", result.merged.facts.parity[0].kl.value
    trained = result.adapter.facts
    yield "train/peak_memory_bytes", trained.peak_memory_bytes
    yield "train/predicted_peak_bytes", trained.predicted_peak_bytes
    yield "train/rows_per_pass", trained.num_rows_per_pass
    yield "train/num_incidents", len(trained.incidents)
    yield "base/quantisation_error", result.base.facts.mean_relative_error
    yield "base/bits_per_parameter", result.base.facts.bits_per_parameter


def _draw(result: RunResult, curve: list[CurvePoint], folder: Path) -> Iterator[Path]:
    from qlora_core.backends import plots  # matplotlib takes a while to import

    folder.mkdir(exist_ok=True)
    train = [(step.step, step.loss) for step in curve]
    heldout = [(s.step, s.heldout_loss) for s in curve if s.heldout_loss is not None]
    metrics: dict[str, Mapping[str, Metric]] = {
        report.subject: report.metrics for report in result.reports()
    }
    name, lengths = result.run_id, result.data.facts.train.length_histogram
    yield plots.plot_loss(folder / "loss.png", train, heldout, name)
    yield plots.plot_lengths(folder / "lengths.png", lengths, title=name)
    yield plots.plot_comparison(folder / "comparison.png", metrics, name)


def _tags(record: RunRecord, prefect_url: str) -> dict[str, str]:
    commit = places.commit()
    return {
        "qloraflow.run_id": record.run_id,
        "prefect.flow_run_id": record.attempts[-1].prefect_flow_run_id,
        "prefect.url": prefect_url,
    } | ({"mlflow.source.git.commit": commit} if commit else {})
