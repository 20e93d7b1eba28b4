"""What a run left behind, as tables on a terminal: built, compared, shown by example.

A report is made from a record alone: facts and paths. So `qlora run` ends in it, and `qlora show`
prints the same weeks later, without a model, a server or a GPU.
"""

import shlex
from datetime import datetime
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from flows.console import title
from flows.quantities import count, size
from flows.records import ArtifactRef, RunRecord
from qlora_core.artifacts import (
    AdapterCheckpoint,
    Artifact,
    EvalReport,
    MergedModel,
    PreparedDataset,
    QuantizedBase,
    RegisteredModel,
)
from qlora_core.errors import ArtifactError

_REPORTS = {"base": "base_report", "tuned": "tuned_report", "merged": "merged_report"}
_STATES = {"completed": "green", "running": "cyan", "failed": "red"}
_SAMPLES_SHOWN = 5


def show_record(console: Console, record: RunRecord) -> None:
    """Print all that is known of a run."""
    console.print(_heading(record))
    if record.artifacts:
        console.print(built_table(record))
    comparison = comparison_table(record)
    if comparison:
        console.print(comparison)
    for extra in (_samples(record), _merging(record), _registered(record)):
        if extra:
            console.print(extra)
    if record.error:
        console.print(Panel(Text(record.error), title="error", border_style="red"))


def runs_table(found: list[RunRecord]) -> Table:
    """Return one line for each run, newest first."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("run", "state", "since", "recipe"):
        table.add_column(name)
    for record in found:
        state = f"[{_STATES.get(record.state, 'yellow')}]{record.state}[/]"
        table.add_row(record.run_id, state, _local(record.started), record.recipe[:12])
    return table


def built_table(record: RunRecord) -> Table:
    """Return one line for each artefact: whether it was cached, and what it counted."""
    table = Table(title="What was built", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("stage", "state", "what came out", "digest"):
        table.add_column(name, overflow="fold")
    for role, ref in record.artifacts.items():
        state = "[cyan]cached[/]" if ref.cached else "[green]built[/]"
        name = title(ref.stage) + (f" · {role.split('_')[0]}" if role.endswith("_report") else "")
        table.add_row(name, state, escape(_headline(role, ref)), ref.digest[:12])
    return table


def comparison_table(record: RunRecord) -> Table | None:
    """Return base, tuned and merged side by side, and what tuning gained with its interval."""
    reports = {name: read for name, role in _REPORTS.items() if (read := _report(record, role))}
    if not reports:
        return None
    table = Table(title="Held-out rows", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("metric")
    for name in reports:
        table.add_column(name, justify="right")
    table.add_column("tuned - base, 95 % interval", justify="right")
    for metric in next(iter(reports.values())).facts.metrics:
        cells = [_metric_cell(report, metric) for report in reports.values()]
        table.add_row(metric, *cells, _gain(reports, metric))
    return table


def addresses(store: Path, home: Path, record: RunRecord, prefect_url: str | None) -> Table:
    """Return where to look on; commands look in ``home`` unless they are told the store."""
    elsewhere = "" if store == home else f" --store {shlex.quote(str(store))}"
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    if prefect_url and record.attempts:
        run = record.attempts[-1].prefect_flow_run_id
        table.add_row("flow run", f"{prefect_url}/runs/flow-run/{run}  (password: qlora ui)")
    table.add_row("compare runs", f"qlora ui{elsewhere}")
    table.add_row("read it again", f"qlora show {record.run_id}{elsewhere}")
    table.add_row("talk to it", f"qlora chat {record.run_id}{elsewhere}")
    best = record.artifacts.get("merged") or record.artifacts.get("adapter")
    if best:
        table.add_row("files", str(best.path))
    table.add_row("store", str(store))
    return table


def _heading(record: RunRecord) -> Text:
    color = _STATES.get(record.state, "yellow")
    attempts = f", {len(record.attempts)} attempts" if len(record.attempts) > 1 else ""
    return Text.assemble(
        (record.run_id, "bold"),
        "  ",
        (record.state, color),
        f"  since {_local(record.started)}{attempts}",
    )


def _local(moment: str) -> str:
    """Return a moment [UTC, ISO 8601] as the clock on this machine's wall showed it."""
    return f"{datetime.fromisoformat(moment).astimezone():%Y-%m-%d %H:%M:%S}"


def _report(record: RunRecord, role: str) -> Artifact[EvalReport] | None:
    ref = record.artifacts.get(role)
    if ref is None:
        return None
    facts = EvalReport.model_validate(ref.facts)
    return Artifact[EvalReport](
        stage=ref.stage, key=ref.key, digest=ref.digest, path=ref.path, facts=facts
    )


def _metric_cell(report: Artifact[EvalReport], name: str) -> str:
    metric = report.facts.metrics.get(name)
    if metric is None:
        return "-"
    error = "" if metric.standard_error is None else f" [dim]± {metric.standard_error:.3f}[/]"
    return f"{metric.value:.3f}{error}"


def _gain(reports: dict[str, Artifact[EvalReport]], metric: str) -> str:
    from qlora_core.evaluation.significance import compare_reports  # numpy: not for `--help`

    if not {"base", "tuned"} <= set(reports):
        return ""
    try:
        compared = compare_reports(reports["tuned"], reports["base"], metric)
    except (ArtifactError, OSError):
        return "[dim]its rows are gone[/]"
    if compared.interval is None:
        return f"{compared.difference:+.3f} [dim]too few rows[/]"
    improvement = compared.improvement() or (0.0, 0.0)
    color = "green" if improvement[0] > 0 else "red" if improvement[1] < 0 else "yellow"
    low, high = compared.interval
    return f"[{color}]{compared.difference:+.3f}[/] [dim]{low:+.3f} to {high:+.3f}[/]"


def _headline(role: str, ref: ArtifactRef) -> str:
    if role == "data":
        return _data_line(PreparedDataset.model_validate(ref.facts))
    if role == "base":
        return _base_line(QuantizedBase.model_validate(ref.facts))
    if role == "adapter":
        return _adapter_line(AdapterCheckpoint.model_validate(ref.facts))
    if role == "merged":
        merged = MergedModel.model_validate(ref.facts)
        on_disk = size(merged.size_bytes)
        return f"{merged.dtype}, {on_disk}, onto {merged.onto} weights"
    if role == "registered":
        registered = RegisteredModel.model_validate(ref.facts)
        return f"{registered.name} version {registered.adapter_version}"
    report = EvalReport.model_validate(ref.facts)
    metrics = (f"{name} {metric.value:.3f}" for name, metric in report.metrics.items())
    cut = f"; {report.num_truncated} answers cut" if report.num_truncated else ""
    return ", ".join(metrics) + cut


def _data_line(facts: PreparedDataset) -> str:
    dropped = sum(facts.dropped.values())
    reasons = ", ".join(f"{number} {reason}" for reason, number in facts.dropped.items() if number)
    share = facts.train.num_supervised_tokens / max(1, facts.train.num_tokens)
    return (
        f"{facts.train.num_rows} rows to train on, {facts.heldout.num_rows} held out; "
        f"{facts.train.num_tokens} tokens, {share:.0%} supervised; "
        + (f"{dropped} of {facts.num_rows_read} dropped: {reasons}" if dropped else "none dropped")
    )


def _base_line(facts: QuantizedBase) -> str:
    return (
        f"{count(facts.num_parameters)} parameters, {size(facts.size_bytes)} in "
        f"{facts.method} ({facts.bits_per_parameter:.2f} bits each); "
        f"quantisation error {facts.mean_relative_error:.1%}; computes in {facts.compute_dtype}"
    )


def _adapter_line(facts: AdapterCheckpoint) -> str:
    resumed = f"; resumed at {', '.join(map(str, facts.resumed_at))}" if facts.resumed_at else ""
    predicted = (
        f" (planned {size(facts.predicted_peak_bytes)})" if facts.predicted_peak_bytes else ""
    )
    stopped = " (stopped early)" if facts.stopped_early else ""
    return (
        f"{count(facts.num_trainable_parameters)} weights, {facts.num_steps} of "
        f"{facts.num_steps_planned} steps{stopped}; loss {facts.train_loss:.3f}, held out "
        f"{facts.heldout_loss:.3f}; {facts.tokens_per_s:.0f} tok/s, "
        f"{size(facts.peak_memory_bytes)} at the peak{predicted}{resumed}"
        + "".join(f"\n{incident.sentence()}" for incident in facts.incidents)
    )


def _samples(record: RunRecord) -> RenderableType | None:
    tuned, base = _report(record, "tuned_report"), _report(record, "base_report")
    if tuned is None or not tuned.facts.samples:
        return None
    before = {s.prompt: s.prediction for s in base.facts.samples} if base else {}
    table = Table(title="Samples", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("prompt", "wanted", "base says", "tuned says"):
        table.add_column(name, overflow="fold", max_width=44)
    for sample in tuned.facts.samples[:_SAMPLES_SHOWN]:
        said = before.get(sample.prompt, "")
        cells = (sample.prompt, sample.reference, said, sample.prediction)
        table.add_row(*(escape(_short(cell)) for cell in cells))
    return table


def _merging(record: RunRecord) -> RenderableType | None:
    ref = record.artifacts.get("merged")
    if ref is None:
        return None
    facts = MergedModel.model_validate(ref.facts)
    lines = [
        f"onto {p.onto}: KL {p.kl.value:.4f} nats per token, same greedy token "
        f"{p.agreement.value:.1%}, loss {p.loss_adapter.value:.3f} -> {p.loss_merged.value:.3f}"
        for p in facts.parity
    ]
    return Group(Text("What merging cost", style="italic"), *(Text(f"  {x}") for x in lines), "")


def _registered(record: RunRecord) -> RenderableType | None:
    ref = record.artifacts.get("registered")
    if ref is None:
        return None
    facts = RegisteredModel.model_validate(ref.facts)
    verdict = "champion" if facts.promoted else "challenger, not promoted"
    reasons = [Text(f"  {reason}") for reason in facts.reasons]
    heading = f"{facts.name} version {facts.adapter_version} is now {verdict}"
    return Group(Text(heading, style="bold green" if facts.promoted else "bold"), *reasons, "")


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 160 else f"{flat[:157]}..."
