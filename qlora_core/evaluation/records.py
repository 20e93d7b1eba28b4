"""`rows.jsonl` of a report: what was measured on each row, so that two reports can be paired.

One JSON object a line: first `{"loss": ...}` for each held-out row, then `{"answer": ...}` for each
prompt. Nats are rounded to 1e-6 before anything is computed from them, so a report and its rows
always agree, and the bytes do not follow the last bit of a float sum.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_core.errors import ArtifactError

ROWS_FILE = "rows.jsonl"


@dataclass(frozen=True)
class LossRow:
    """What the model gave one held-out row."""

    row: int
    """Its number in `heldout.parquet`."""
    unit: int
    """The first row with the same prompt: rows of one unit are not independent."""
    nll: float
    """Sum over its supervised tokens [nats]."""
    num_tokens: int
    """Supervised tokens."""


@dataclass(frozen=True)
class AnswerRow:
    """What the model answered to one prompt."""

    prompt: str
    prediction: str
    references: tuple[str, ...]
    scores: dict[str, float]
    """By scorer. Of corpus metrics (BLEU, chrF) this row's own, for looking at only."""
    truncated: bool
    """Cut at `max_new_tokens`."""


@dataclass(frozen=True)
class Records:
    """All rows of one report."""

    losses: tuple[LossRow, ...]
    answers: tuple[AnswerRow, ...] = ()


def write_records(folder: Path, records: Records) -> None:
    """Write `rows.jsonl`; the same records give the same bytes."""
    with (folder / ROWS_FILE).open("w", encoding="utf-8", newline="\n") as file:
        for line in _lines(records):
            file.write(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n")


def read_records(folder: Path) -> Records:
    """Read `rows.jsonl` of a report's folder.

    Raises:
        ArtifactError: It is missing, or not what `write_records` writes.
    """
    losses, answers = [], []
    try:
        with (folder / ROWS_FILE).open(encoding="utf-8") as file:
            for line in file:
                fields = json.loads(line)
                if "loss" in fields:
                    losses.append(LossRow(**fields["loss"]))
                else:
                    answers.append(_answer(**fields["answer"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{folder / ROWS_FILE} cannot be read: {error}",
            why="It is not a file of an evaluation report, or it is damaged.",
            fix="Run the recipe again: the store makes the report anew.",
        ) from None
    return Records(tuple(losses), tuple(answers))


def _answer(references: list[str], **others: Any) -> AnswerRow:
    return AnswerRow(references=tuple(references), **others)


def _lines(records: Records) -> Iterable[dict[str, object]]:
    for loss in records.losses:
        yield {"loss": asdict(loss)}
    for answer in records.answers:
        yield {"answer": asdict(answer)}
