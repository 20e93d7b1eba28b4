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
from qlora_core.modeling.dense import dense_weights
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
            return Reply(batch=batch, nats=self._losses.nats(batch.numbers))
        return Reply(batch=batch, answers=self._answers.answer(batch.numbers))

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
    """Load the model and the questions of ``job``; yield them, weights dequantised meanwhile.

    Raises:
        ArtifactError: A file cannot be read, or these are not the job's questions.
    """
    questions = read_questions(job.evaluation, job.data)
    if questions.digest() != job.questions:
        raise ArtifactError(
            f"The held-out rows in {job.data} are not those of this evaluation.",
            why="Rows that others measure would be taken for these.",
            fix="Let every node see the same store at that path.",
        )
    model = (load_merged if job.is_merged else load_base)(job.model, device)
    if job.adapter is not None:
        load_adapter(model, job.adapter)  # PEFT puts its layers into the model itself
    tokenizer = load_saved_tokenizer(job.model)
    with dense_weights(model.eval()):
        yield Interview(model, tokenizer, questions, job.evaluation)
