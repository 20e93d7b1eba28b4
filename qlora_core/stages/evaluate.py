"""Measure a model on the held-out rows: the base as it is, with its adapter, or merged.

All three run through the same code on the same rows, so that their reports can be compared row by
row. The base's report depends on nothing that is trained, so it is made once per base and dataset.

`dataset_digest` names the rows that were *measured* (their tokens, prompts and references), not the
dataset they came from: with a held-out file of its own, last month's champion stays comparable when
training rows are added. `report.json` leaves out the seconds, so the same measurement makes the
same bytes.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from qlora_core.artifacts import (
    AdapterCheckpoint,
    Artifact,
    EvalReport,
    MergedModel,
    PreparedDataset,
    QuantizedBase,
    Sample,
)
from qlora_core.config import EvaluationConfig
from qlora_core.data.prepared import Prompt, Rows, read_prompts, read_split
from qlora_core.errors import DataError
from qlora_core.evaluation.generation import Answer, answer_prompts
from qlora_core.evaluation.likelihood import measure_likelihood
from qlora_core.evaluation.metrics import Scorer, make_scorers, measure, score_answer
from qlora_core.evaluation.records import AnswerRow, LossRow, Records, write_records
from qlora_core.fingerprint import canonical_json
from qlora_core.modeling.dense import dense_weights
from qlora_core.modeling.loading import load_base, load_merged, load_saved_tokenizer
from qlora_core.modeling.lora import load_adapter
from qlora_core.ports import Context, stage
from qlora_core.sources import Source

Subject = Literal["base", "tuned", "merged"]
REPORT_FILE = "report.json"


@dataclass(frozen=True)
class _Questions:
    """What is asked: rows for the loss, prompts for answers."""

    rows: Rows
    indices: tuple[int, ...]
    prompts: tuple[Prompt, ...]

    def digest(self) -> str:
        sha = hashlib.sha256()
        for i in self.indices:
            sha.update(int(self.rows.lengths[i]).to_bytes(8, "little"))
            sha.update(self.rows.input_ids(i).tobytes() + self.rows.labels(i).tobytes())
        asked = [[p.text, list(p.ids), list(p.references)] for p in self.prompts]
        sha.update(canonical_json(asked).encode())
        return sha.hexdigest()


@stage(
    "evaluate",
    version=1,
    facts=EvalReport,
    packages=("torch", "transformers", "peft", "bitsandbytes"),
)
def evaluate_model(
    ctx: Context,
    evaluation: EvaluationConfig,
    data: Artifact[PreparedDataset],
    base: Artifact[QuantizedBase],
    adapter: Artifact[AdapterCheckpoint] | None,
    merged: Artifact[MergedModel] | None,
    scorers: tuple[Source, ...],
) -> EvalReport:
    """Write `rows.jsonl` and `report.json` of one subject.

    Args:
        ctx: Where to write and whom to tell.
        evaluation: What is measured.
        data: Whose held-out rows are asked.
        base: The quantised base; the subject, when neither of the next two is given.
        adapter: Makes the subject the tuned model.
        merged: Makes the subject the merged model.
        scorers: Files of the `CustomScorer`s, in order of appearance.

    Raises:
        DataError: There is no held-out row to measure.
        UserError: An own scorer cannot be used.
        ModelError: The model answers with numbers that are not finite.
    """
    started = time.monotonic()
    subject: Subject = "merged" if merged else "tuned" if adapter else "base"
    used = make_scorers(evaluation, scorers) if evaluation.generate else ()
    questions = _questions(evaluation, data.path)
    folder = merged.path if merged else base.path
    model = load_merged(folder, _device()) if merged else _load(base.path, adapter)
    records = _ask(ctx, evaluation, subject, questions, model, folder, used)
    write_records(ctx.out, records)
    report = _report(evaluation, subject, questions, records, time.monotonic() - started)
    text = report.model_dump_json(indent=2, exclude={"seconds"})
    (ctx.out / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    return report


def _questions(evaluation: EvaluationConfig, folder: Path) -> _Questions:
    rows = read_split(folder, "heldout")
    prompts = read_prompts(folder) if evaluation.generate else []
    chosen = tuple(i for i in _spread(len(rows), evaluation.max_rows) if rows.num_supervised[i])
    if not chosen:
        raise DataError(
            f"None of the {len(rows)} held-out rows has a token to predict.",
            fix="Raise dataset.heldout.fraction, or give dataset.heldout.source.",
        )
    return _Questions(
        rows, chosen, tuple(prompts[i] for i in _spread(len(prompts), evaluation.max_rows))
    )


def _spread(count: int, limit: int | None) -> list[int]:
    """Return at most ``limit`` of ``count`` numbers, evenly spaced, as files may be sorted."""
    kept = min(count, limit or count)
    return [i * count // kept for i in range(kept)]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _load(base: Path, adapter: Artifact[AdapterCheckpoint] | None) -> PreTrainedModel:
    model = load_base(base, _device())
    if adapter is not None:
        load_adapter(model, adapter.path)  # PEFT puts its layers into the model itself
    return model.eval()


def _ask(
    ctx: Context,
    evaluation: EvaluationConfig,
    subject: Subject,
    questions: _Questions,
    model: PreTrainedModel,
    folder: Path,
    scorers: Sequence[Scorer],
) -> Records:
    num_rows, num_prompts = len(questions.indices), len(questions.prompts)

    def told(note: str, before: int) -> Callable[[int], None]:
        total = num_rows + num_prompts
        return lambda done: ctx.progress.update(f"evaluate {subject}", before + done, total, note)

    with dense_weights(model):
        losses = measure_likelihood(
            model, questions.rows, questions.indices, evaluation.batch_size, told("loss", 0)
        )
        answers = answer_prompts(
            model,
            load_saved_tokenizer(folder),
            questions.prompts,
            max_new_tokens=evaluation.max_new_tokens,
            batch_size=evaluation.batch_size,
            on_done=told("answers", num_rows),
        )
    return _records(losses, questions.prompts, answers, scorers)


def _records(
    losses: tuple[LossRow, ...],
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    scorers: Sequence[Scorer],
) -> Records:
    asked = enumerate(zip(prompts, answers, strict=True))
    rows = (
        AnswerRow(
            prompt=prompt.text,
            prediction=answer.text,
            references=prompt.references,
            scores=score_answer(scorers, i, answer.text, prompt.references),
            truncated=answer.truncated,
        )
        for i, (prompt, answer) in asked
    )
    return Records(losses, tuple(rows))


def _report(
    evaluation: EvaluationConfig,
    subject: Subject,
    questions: _Questions,
    records: Records,
    seconds: float,
) -> EvalReport:
    names = ["loss", "perplexity", *(records.answers[0].scores if records.answers else ())]
    num_truncated = sum(answer.truncated for answer in records.answers)
    return EvalReport(
        subject=subject,
        dataset_digest=questions.digest(),
        metrics={name: measure(name, records) for name in names},
        num_truncated=num_truncated,
        samples=_samples(records, evaluation.num_samples),
        seconds=seconds,
        notes=_notes(evaluation, questions, num_truncated),
    )


def _samples(records: Records, count: int) -> tuple[Sample, ...]:
    shown = [records.answers[i] for i in _spread(len(records.answers), count)] if count else []
    return tuple(
        Sample(prompt=a.prompt, reference=a.references[0], prediction=a.prediction, scores=a.scores)
        for a in shown
    )


def _notes(
    evaluation: EvaluationConfig, questions: _Questions, num_truncated: int
) -> tuple[str, ...]:
    notes = []
    num_rows, num_prompts = len(questions.rows), len(questions.prompts)
    if len(questions.indices) < num_rows:
        notes.append(f"the loss is measured on {len(questions.indices)} of {num_rows} rows")
    if evaluation.generate and not num_prompts:
        notes.append("nothing was generated: plain text has no prompts to answer")
    if num_truncated:
        limit = f"evaluation.max_new_tokens={evaluation.max_new_tokens}"
        notes.append(f"{num_truncated} of {num_prompts} answers were cut at {limit}")
    return tuple(notes)
