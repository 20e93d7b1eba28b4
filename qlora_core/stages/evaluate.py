"""Measure a model on the held-out rows: the base as it is, with its adapter, or merged.

All three run through the same code on the same rows, so that their reports can be compared row by
row. The base's report depends on nothing that is trained, so it is made once per base and dataset.

`dataset_digest` names the rows that were *measured* (their tokens, prompts and references), not the
dataset they came from: with a held-out file of its own, last month's champion stays comparable when
training rows are added. `report.json` leaves out the seconds and where weights lay meanwhile, so
the same measurement makes the same bytes, on however many workers: batches are cut before they are
shared out.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

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
from qlora_core.evaluation.interview import open_interview
from qlora_core.evaluation.likelihood import loss_rows
from qlora_core.evaluation.metrics import Scorer, make_scorers, measure, score_answer
from qlora_core.evaluation.questions import Questions, read_questions, spread
from qlora_core.evaluation.records import AnswerRow, Records, write_records
from qlora_core.ports import Answer, AskJob, Context, Reply, stage
from qlora_core.sources import Source
from qlora_core.stages.kept_log import log_kept

Subject = Literal["base", "tuned", "merged"]
REPORT_FILE = "report.json"


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
        LaunchError: Workers were lost more often than allowed.
    """
    started = time.monotonic()
    subject: Subject = "merged" if merged else "tuned" if adapter else "base"
    used = make_scorers(evaluation, scorers) if evaluation.generate else ()
    questions = read_questions(evaluation, data.path)
    job = AskJob(
        model=merged.path if merged else base.path,
        is_merged=merged is not None,
        adapter=adapter.path if adapter and not merged else None,
        data=data.path,
        evaluation=evaluation,
        questions=questions.digest(),
        scratch=ctx.scratch,
        offloads_base=ctx.offloads_base,
    )
    replies = _ask(ctx, job, subject, questions)
    records = _records(questions, replies, used)
    write_records(ctx.out, records)
    report = _report(evaluation, subject, questions, records, time.monotonic() - started)
    text = report.model_dump_json(indent=2, exclude={"seconds"})
    (ctx.out / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    return report.model_copy(update={"notes": (*report.notes, *replies.notes)})


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _ask(ctx: Context, job: AskJob, subject: Subject, questions: Questions) -> "_Replies":
    """Put all questions to the model: here, or on the workers of a cluster."""
    replies = _Replies()
    total = len(questions.indices) + len(questions.prompts)

    def tell(notes: tuple[str, ...]) -> None:
        for note in replies.learn(notes):
            ctx.progress.say(f"evaluate {subject}", note)

    def hear(reply: Reply) -> None:
        replies.keep(reply)
        tell(reply.notes)
        ctx.progress.update(f"evaluate {subject}", replies.num_kept, total, reply.batch.kind)

    if ctx.crew is not None:
        with log_kept(ctx, f"evaluate_{subject}"):
            ctx.crew.ask(job, hear)
        return replies
    with open_interview(job, _device()) as interview:
        tell(interview.notes)
        for batch in interview.batches:
            hear(interview.reply(batch))
    return replies


@dataclass
class _Replies:
    """What came back so far, by the number of row or prompt: it may come in any order."""

    nats: dict[int, float] = field(default_factory=dict)
    answers: dict[int, Answer] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def num_kept(self) -> int:
        return len(self.nats) + len(self.answers)

    def keep(self, reply: Reply) -> None:
        numbers = reply.batch.numbers
        if reply.batch.kind == "loss":
            self.nats.update(zip(numbers, reply.nats, strict=True))
        else:
            self.answers.update(zip(numbers, reply.answers, strict=True))

    def learn(self, notes: tuple[str, ...]) -> list[str]:
        """Keep what is new of ``notes``, and return it."""
        new = [note for note in notes if note not in self.notes]
        self.notes += new
        return new


def _records(questions: Questions, replies: _Replies, scorers: Sequence[Scorer]) -> Records:
    """Return all rows in their own order, so that who answered first leaves no trace."""
    rows = []
    for i, prompt in enumerate(questions.prompts):
        answer = replies.answers[i]
        rows.append(
            AnswerRow(
                prompt=prompt.text,
                prediction=answer.text,
                references=prompt.references,
                scores=score_answer(scorers, i, answer.text, prompt.references),
                truncated=answer.truncated,
            )
        )
    losses = loss_rows(questions.rows, questions.indices, replies.nats)
    return Records(losses, tuple(rows))


def _report(
    evaluation: EvaluationConfig,
    subject: Subject,
    questions: Questions,
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
    shown = [records.answers[i] for i in spread(len(records.answers), count)] if count else []
    return tuple(
        Sample(prompt=a.prompt, reference=a.references[0], prediction=a.prediction, scores=a.scores)
        for a in shown
    )


def _notes(
    evaluation: EvaluationConfig, questions: Questions, num_truncated: int
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
