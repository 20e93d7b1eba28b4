"""Score answers: exact match, BLEU, chrF, ROUGE-L, or a person's own function.

Two kinds of metric. *Row* metrics score one answer against each of its references, keep the best,
and are averaged. *Corpus* metrics (BLEU, chrF) are not averages of rows: their n-gram counts are
summed over all answers first, with all references of a prompt at once. sacrebleu does the counting,
so figures compare with published ones; its per-row counts are kept to bootstrap without recounting.
Prompts may have different numbers of references: missing ones are None, as sacrebleu wants it.

Scales: exact match, ROUGE-L and own scorers 0 to 1; BLEU and chrF 0 to 100. ROUGE-L's words are
runs of letters and digits of any script (rouge_score's own rule knows ASCII only and would score
every Greek answer 0); for ASCII text the two agree.
"""

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from qlora_core.artifacts import Metric
from qlora_core.config import CustomScorer, EvaluationConfig
from qlora_core.errors import UserError
from qlora_core.evaluation.estimates import (
    Estimate,
    Floats,
    corpus_estimate,
    mean_estimate,
    ratio_estimate,
)
from qlora_core.evaluation.records import AnswerRow, Records
from qlora_core.sources import Source

CORPUS_METRICS = ("bleu", "chrf")
LOSS_METRICS = ("loss", "perplexity")


if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer


@dataclass(frozen=True)
class Scorer:
    """Gives one answer a number; more is better."""

    name: str
    score: Callable[[str, Sequence[str]], float]
    """From a prediction and its references."""


def make_scorers(config: EvaluationConfig, sources: Sequence[Source]) -> tuple[Scorer, ...]:
    """Return the recipe's scorers in order.

    Args:
        config: Names the scorers.
        sources: The files of the `CustomScorer`s, in order of appearance.

    Raises:
        UserError: A file cannot be run, has no such function, or two scorers share a name.
    """
    files = iter(sources)
    scorers = tuple(
        Scorer(s, _BUILT_IN[s]) if isinstance(s, str) else _custom_scorer(s, next(files))
        for s in config.scorers
    )
    names = [*LOSS_METRICS, *(scorer.name for scorer in scorers)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"evaluation.scorers: the name {twice[0]!r} is used twice.",
            why="Metrics are kept by name; loss and perplexity are always measured.",
            fix="Rename the function, or remove one of the two.",
        )
    return scorers


def score_answer(
    scorers: Sequence[Scorer], row: int, prediction: str, references: Sequence[str]
) -> dict[str, float]:
    """Return each scorer's number for the answer to held-out prompt number ``row``.

    Raises:
        UserError: An own scorer failed on it, or gave something that is not 0 to 1.
    """
    try:
        return {scorer.name: scorer.score(prediction, references) for scorer in scorers}
    except UserError as error:
        what = f"Held-out prompt {row}: {error.what}"
        raise UserError(what, why=error.why, fix=error.fix) from None


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1 when the answer is one of the references, white space at the ends aside."""
    return float(prediction.strip() in {reference.strip() for reference in references})


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Return the best F1 of the longest common subsequence of words (Lin 2004, W04-1013)."""
    scored = (_rouge().score(reference, prediction)["rougeL"] for reference in references)
    return max(float(score.fmeasure) for score in scored)


def sentence_bleu(prediction: str, references: Sequence[str]) -> float:
    """Return one answer's BLEU, for looking at: the corpus figure is not the mean of these."""
    scorer = BLEU(effective_order=True)
    return round(float(scorer.sentence_score(prediction, references).score), 4)


def sentence_chrf(prediction: str, references: Sequence[str]) -> float:
    """Return one answer's chrF, for looking at: the corpus figure is not the mean of these."""
    return round(float(CHRF().sentence_score(prediction, references).score), 4)


def estimate_metric(name: str, records: Records) -> Estimate:
    """Return a metric of a report, computed from its rows.

    Args:
        name: `loss`, `perplexity`, or a scorer's name.
        records: At least one row of the kind that the metric needs.
    """
    if name in LOSS_METRICS:
        loss = _loss(records)
        return loss.exp() if name == "perplexity" else loss
    if name in CORPUS_METRICS:
        return _corpus(name, records.answers)
    return mean_estimate(np.array([answer.scores[name] for answer in records.answers]))


def measure(name: str, records: Records) -> Metric:
    """Return `estimate_metric` as the report shows it."""
    estimate, is_loss = estimate_metric(name, records), name in LOSS_METRICS
    return Metric(
        value=estimate.value,
        standard_error=estimate.standard_error(),
        num_rows=len(records.losses if is_loss else records.answers),
        unit=_UNITS.get(name, "share"),
        higher_is_better=not is_loss,
    )


def _loss(records: Records) -> Estimate:
    nats = np.array([row.nll for row in records.losses])
    tokens = np.array([row.num_tokens for row in records.losses], dtype=np.float64)
    return ratio_estimate(nats, tokens, np.array([row.unit for row in records.losses]))


def _corpus(name: str, answers: Sequence[AnswerRow]) -> Estimate:
    metric = BLEU(force=True) if name == "bleu" else CHRF()
    most = max(len(answer.references) for answer in answers)
    streams = [[_nth(answer.references, i) for answer in answers] for i in range(most)]
    stats = metric._extract_corpus_statistics([a.prediction for a in answers], streams)

    def score(sums: Floats) -> float:
        return float(metric._compute_score_from_stats(list(sums)).score)

    return corpus_estimate(np.array(stats, dtype=np.float64), score)


def _nth(references: Sequence[str], i: int) -> str | None:
    return references[i] if i < len(references) else None


class _Words:
    """Splits text into lower-case runs of letters and digits."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


@cache
def _rouge() -> "RougeScorer":
    from rouge_score.rouge_scorer import RougeScorer  # it loads NLTK: seconds, for those who ask

    return RougeScorer(["rougeL"], tokenizer=_Words())


_BUILT_IN: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "bleu": sentence_bleu,
    "chrf": sentence_chrf,
    "rouge_l": rouge_l,
}
_UNITS = {"loss": "nats per token", "perplexity": "", "bleu": "points", "chrf": "points"}


def _custom_scorer(config: CustomScorer, source: Source) -> Scorer:
    function = getattr(_run_file(source), config.function, None)
    if not callable(function):
        raise UserError(
            f"{config.file}: there is no function {config.function!r} in it.",
            fix=f"Define it: def {config.function}(prediction: str, reference: str) -> float",
        )

    def score(prediction: str, references: Sequence[str]) -> float:
        return max(_ask(config, function, prediction, reference) for reference in references)

    return Scorer(config.function, score)


def _run_file(source: Source) -> ModuleType:
    """Run the file as a module; not through the import system, which would leave bytecode there."""
    path = source.local()
    module = ModuleType(f"qlora_scorer_{source.digest[:16]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        code = compile(path.read_bytes(), str(path), "exec")
        exec(code, module.__dict__)  # noqa: S102  # the recipe's owner asks for just this
    except Exception as error:
        raise UserError(
            f"{source.uri}: the scorer's file cannot be run: {type(error).__name__}: {error}",
            fix=f"Make `python {source.uri}` run without an error.",
        ) from None
    return module


def _ask(
    config: CustomScorer, function: Callable[[str, str], object], prediction: str, reference: str
) -> float:
    call = f"{config.function}(prediction={prediction!r}, reference={reference!r})"
    try:
        value = float(function(prediction, reference))  # type: ignore[arg-type]  # checked by float
    except Exception as error:
        raise UserError(
            f"{config.file}: {call} raised {type(error).__name__}: {error}",
            why="A model may answer anything, so a scorer must take any text.",
            fix="Return 0.0 for an answer that makes no sense.",
        ) from None
    if not (math.isfinite(value) and 0.0 <= value <= 1.0):
        raise UserError(
            f"{config.file}: {call} returned {value}.",
            why="Scores of all scorers share one scale, 0 (wrong) to 1 (right).",
            fix="Return a number from 0.0 to 1.0, e.g. 1.0 if right else 0.0.",
        )
    return value
