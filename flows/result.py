"""What a finished run leaves, and the same as a page to read."""

from qlora_core.artifacts import (
    AdapterCheckpoint,
    Artifact,
    EvalReport,
    Frozen,
    MergedModel,
    Metric,
    PreparedDataset,
    QuantizedBase,
    RegisteredModel,
)

_CELL_CHARS = 160


class RunResult(Frozen):
    """Everything one run made."""

    run_id: str
    mlflow_run_id: str | None
    tracking_note: str = ""
    """What MLflow has not yet; empty when it has everything."""
    data: Artifact[PreparedDataset]
    base: Artifact[QuantizedBase]
    adapter: Artifact[AdapterCheckpoint]
    base_report: Artifact[EvalReport]
    tuned_report: Artifact[EvalReport]
    merged: Artifact[MergedModel] | None = None
    merged_report: Artifact[EvalReport] | None = None
    registered: Artifact[RegisteredModel] | None = None

    def reports(self) -> list[EvalReport]:
        """Return base, tuned and, if there is one, merged."""
        made = (self.base_report, self.tuned_report, self.merged_report)
        return [report.facts for report in made if report is not None]


def page(result: RunResult) -> str:
    """Return the run as Markdown: what was built, how good it is, what it answers."""
    parts = [
        f"# {result.run_id}",
        _built(result),
        "## Held-out quality",
        comparison(result.reports()),
        *_verdict(result),
        "## Answers",
        _answers(result.reports()),
        *_notes(result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def comparison(reports: list[EvalReport]) -> str:
    """Return a Markdown table: one line for each metric, one column for each subject."""
    names = list(dict.fromkeys(name for report in reports for name in report.metrics))
    rows = [
        [name, *(_number(report.metrics.get(name)) for report in reports), _num_rows(reports, name)]
        for name in names
    ]
    return _table(["metric", *(report.subject for report in reports), "rows"], rows)


def _built(result: RunResult) -> str:
    data, base, adapter = result.data.facts, result.base.facts, result.adapter.facts
    dropped = ", ".join(f"{n} {why}" for why, n in data.dropped.items() if n) or "none"
    rows = [
        ["data", f"{data.train.num_rows} training rows, {data.heldout.num_rows} held out"],
        ["dropped", dropped],
        ["base", f"{base.source}, {base.num_parameters:,} parameters"],
        ["quantised", f"{base.method}, {base.bits_per_parameter:.2f} bits per parameter"],
        ["quantisation noise", f"{base.mean_relative_error:.2%} relative RMS"],
        ["adapter", f"{adapter.num_trainable_parameters:,} parameters"],
        ["training", f"{adapter.num_steps_run} of {adapter.num_steps_planned} steps"],
        ["speed", f"{adapter.tokens_per_s:,.0f} tokens/s on {adapter.num_workers} workers"],
        ["held-out loss", f"{adapter.heldout_loss:.4f} nats per supervised token"],
    ]
    if result.merged:
        merged = result.merged.facts
        rows += [["merged onto", f"{merged.onto} weights, {merged.dtype}"]]
        rows += [["cost of merging", _number(merged.parity[0].kl) + " nats per token (KL)"]]
    return _table(["what", "this run"], rows)


def _verdict(result: RunResult) -> list[str]:
    if result.registered is None:
        return []
    model = result.registered.facts
    word = "promoted to champion" if model.promoted else "not promoted"
    reasons = "\n".join(f"- {reason}" for reason in model.reasons)
    return [f"**{model.name}** version {model.adapter_version}: {word}.", reasons]


def _answers(reports: list[EvalReport]) -> str:
    by_prompt = [{sample.prompt: sample for sample in report.samples} for report in reports]
    rows = [
        [sample.prompt, sample.reference]
        + [told[prompt].prediction if prompt in told else "" for told in by_prompt]
        for prompt, sample in (by_prompt[0].items() if by_prompt else ())
    ]
    header = ["prompt", "reference", *(report.subject for report in reports)]
    return _table(header, rows) if rows else "Nothing was generated."


def _notes(result: RunResult) -> list[str]:
    made = (result.data, result.base, result.adapter, result.merged)
    notes = [note for artifact in made if artifact for note in artifact.facts.notes]
    notes += [note for report in result.reports() for note in report.notes]
    notes += [result.tracking_note] if result.tracking_note else []
    unique = dict.fromkeys(notes)
    return ["## Notes", "\n".join(f"- {note}" for note in unique)] if unique else []


def _number(metric: Metric | None) -> str:
    if metric is None:
        return ""
    error = "" if metric.standard_error is None else f" ± {metric.standard_error:.2g}"
    return f"{metric.value:.4g}{error}"


def _num_rows(reports: list[EvalReport], name: str) -> str:
    return str(next(r.metrics[name].num_rows for r in reports if name in r.metrics))


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    """Return text that stays inside its cell, whatever a model answered."""
    flat = " ".join(text.split())
    short = flat if len(flat) <= _CELL_CHARS else flat[: _CELL_CHARS - 1] + "…"
    return short.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
