"""A model asked all batches, one after the other, as the stage does where there is no cluster."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_core.config import AdapterConfig
from qlora_core.data.prepared import Prompt, Rows
from qlora_core.evaluation.generation import Answering
from qlora_core.evaluation.likelihood import Likelihood, loss_rows
from qlora_core.evaluation.records import LossRow
from qlora_core.modeling.loading import load_base
from qlora_core.modeling.lora import attach_adapter, save_adapter
from qlora_core.ports import Answer, AskJob


def adapted(job: AskJob, **settings: Any) -> AskJob:
    """The same questions to the base with an adapter that changes its answers."""
    folder = job.scratch / "adapter"
    model = attach_adapter(load_base(job.model), AdapterConfig(rank=4, **settings), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
    save_adapter(model, folder, "base", None)
    return job.model_copy(update={"adapter": folder})


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> tuple[Answer, ...]:
    """Return the greedy answer to each prompt, in order."""
    task = Answering(model, tokenizer, prompts, max_new_tokens, batch_size)
    answers: dict[int, Answer] = {}
    for batch in task.batches:
        answers.update(zip(batch, task.answer(batch), strict=True))
    return tuple(answers[i] for i in range(len(prompts)))


def measure_likelihood(
    model: PreTrainedModel,
    rows: Rows,
    indices: Sequence[int],
    batch_size: int,
) -> tuple[LossRow, ...]:
    """Return the negative log-likelihood of each row, in order of ``indices``."""
    scored = tuple(indices)
    task, found = Likelihood(model, rows, scored, batch_size), dict[int, float]()
    for batch in task.batches:
        found.update(zip(batch, task.nats(batch), strict=True))
    return loss_rows(rows, scored, found)
