"""One model and all that it is asked, cut into batches before anybody asks the first.

The cut is made from all questions and the model alone. So any number of workers can make it, each
for itself, and share the batches among them: a batch has the same rows, the same padding and the
same prefix wherever it is computed, hence the same numbers, on processors of one kind with the same
number of threads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_core.config import EvaluationConfig
from qlora_core.errors import ArtifactError
from qlora_core.evaluation.generation import Answering
from qlora_core.evaluation.likelihood import Likelihood
from qlora_core.evaluation.questions import Questions, read_questions
from qlora_core.evaluation.room import place_base
from qlora_core.modeling.dense import asking_budget, dense_weights
from qlora_core.modeling.hosted import BasePlace, load_hosted
from qlora_core.modeling.loading import load_base, load_merged, load_saved_tokenizer
from qlora_core.modeling.lora import load_adapter
from qlora_core.ports import AskJob, Batch, Reply


@dataclass(frozen=True)
class Interview:
    """A model in eval mode, its tokenizer, and what it is asked."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    questions: Questions
    evaluation: EvaluationConfig
    notes: tuple[str, ...] = ()
    """What a person should know of how it is asked."""

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """All of them: losses first, and the longest first of each, so that shares end together."""
        losses = (Batch(kind="loss", numbers=numbers) for numbers in self._losses.batches)
        answers = (Batch(kind="answers", numbers=numbers) for numbers in self._answers.batches)
        return (*losses, *answers)

    def reply(self, batch: Batch) -> Reply:
        """Put one batch to the model.

        Raises:
            ModelError: Its numbers are not finite, or it has no stop token.
        """
        if batch.kind == "loss":
            nats = self._losses.nats(batch.numbers)
            return Reply(batch=batch, nats=nats, notes=self.notes)
        answers = self._answers.answer(batch.numbers)
        return Reply(batch=batch, answers=answers, notes=self.notes)

    @cached_property
    def _losses(self) -> Likelihood:
        asked, size = self.questions, self.evaluation.batch_size
        return Likelihood(self.model, asked.rows, asked.indices, size)

    @cached_property
    def _answers(self) -> Answering:
        longest, size = self.evaluation.max_new_tokens, self.evaluation.batch_size
        return Answering(self.model, self.tokenizer, self.questions.prompts, longest, size)


@contextmanager
def open_interview(job: AskJob, device: torch.device) -> Iterator[Interview]:
    """Load the model and the questions of ``job``; yield them.

    On a CPU weights are dequantised meanwhile. A 4-bit base that does not fit on a GPU stays with
    its host (`modeling.hosted`).

    Raises:
        ArtifactError: A file cannot be read, or these are not the job's questions.
        ResourceError: There is no room for the model.
    """
    questions = read_questions(job.evaluation, job.data)
    if questions.digest() != job.questions:
        raise ArtifactError(
            f"The held-out rows in {job.data} are not those of this evaluation.",
            why="Rows that others measure would be taken for these.",
            fix="Let every node see the same store at that path.",
        )
    place, notes = place_base(job, questions, device), list[str]()
    model = _load(job, place, device, notes)
    if job.adapter is not None:
        load_adapter(model, job.adapter)  # PEFT puts its layers into the model itself
    tokenizer, said = load_saved_tokenizer(job.model), (*place.notes, *notes)
    dense_bytes = 0 if place.is_hosted else asking_budget(device)  # with the host, none is here
    with dense_weights(model.eval(), dense_bytes):
        yield Interview(model, tokenizer, questions, job.evaluation, said)


def _load(job: AskJob, place: BasePlace, device: torch.device, notes: list[str]) -> PreTrainedModel:
    if place.is_hosted:
        return load_hosted(job.model, device, notes)[0]  # its hooks hold the other part
    return (load_merged if job.is_merged else load_base)(job.model, device)
