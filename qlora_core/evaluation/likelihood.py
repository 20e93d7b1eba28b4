"""How likely a model finds the held-out answers: nats per row, at supervised tokens only.

The head is the widest layer of all: a row of 400 tokens makes 400 x 49 152 logits, most of them for
the prompt, which nobody asks about. So a hook in front of the head lets only the supervised
positions through. What a model does to its logits afterwards (scaling, soft caps) happens as
always, which slicing hidden states by hand would miss.

Rows of similar length share a batch, padded on the right. Sums are kept by row, so that errors can
be estimated by row; the numbers do not depend on the batch size beyond float32 rounding.
Dims: B rows of a batch, T positions, S supervised positions of the batch, V vocabulary.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_core.data.prepared import IGNORED, Rows
from qlora_core.errors import ModelError
from qlora_core.evaluation.prefix import Prefix, shared_prefix
from qlora_core.evaluation.records import LossRow

_NONE = Prefix()
MAX_LOGITS = 64_000_000
"""Logits of one batch: 256 MB in float32, and as much again in the loss."""


@dataclass(frozen=True)
class Likelihood:
    """Held-out rows cut into batches for one model, wherever each batch is then computed.

    What a batch holds, and which prefix is computed once, follows from all rows; so a batch gives
    the same numbers on any worker of the same kind.

    Args:
        model: A causal LM in eval mode.
        rows: Held-out rows.
        scored: Which of them; each has a predicted token.
        batch_size: Most rows of one forward pass.
    """

    model: PreTrainedModel
    rows: Rows
    scored: tuple[int, ...]
    batch_size: int

    @cached_property
    def batches(self) -> tuple[tuple[int, ...], ...]:
        """Row numbers of similar length, longest first."""
        vocabulary = self.model.config.get_text_config().vocab_size
        return tuple(map(tuple, _batches(self.rows, self.scored, self.batch_size, vocabulary)))

    @cached_property
    def _prefix(self) -> Prefix:
        return _prompt_prefix(self.model, self.rows, self.scored)

    def nats(self, batch: Sequence[int]) -> tuple[float, ...]:
        """Return each row's negative log-likelihood, in order of ``batch``.

        Raises:
            ModelError: The model answers with numbers that are not finite.
        """
        found = _row_nats(self.model, self.rows, batch, self._prefix)
        return tuple(_finite(row, nats) for row, nats in zip(batch, found, strict=True))


def loss_rows(rows: Rows, scored: Sequence[int], nats: Mapping[int, float]) -> tuple[LossRow, ...]:
    """Return what is kept of each row, in order of ``scored``.

    Args:
        rows: Held-out rows.
        scored: Which of them were measured.
        nats: Negative log-likelihood by row.
    """
    units = _units(rows)
    return tuple(
        LossRow(row, units[row], round(nats[row], 6), int(rows.num_supervised[row]))
        for row in scored
    )


@torch.inference_mode()
def logits_at(
    model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, at_BT: Tensor, prefix: Prefix = _NONE
) -> Tensor:
    """Return the (S, V) logits at the positions where ``at_BT`` is true, row by row.

    Args:
        model: A causal LM.
        ids_BT: Tokens, padded on the right.
        mask_BT: 1 for a token, 0 for padding.
        at_BT: Which positions are wanted; none within the prefix, and not all of the others.
        prefix: What the first positions of each row are, already run through the model.
    """
    rest_BT, wanted_BT = ids_BT[:, prefix.num_tokens :], at_BT[:, prefix.num_tokens :]
    cache = prefix.cache(len(ids_BT))
    options = {"use_cache": False} if cache is None else {"past_key_values": cache}
    with _head_only_at(model.get_output_embeddings(), wanted_BT):
        logits: Tensor = model(input_ids=rest_BT, attention_mask=mask_BT, **options).logits
    if logits.shape[:2] == rest_BT.shape:  # this model's head is not called as a module
        return logits[wanted_BT]
    return logits[0]


@contextmanager
def _head_only_at(head: nn.Module | None, at_BT: Tensor) -> Iterator[None]:
    if head is None:
        yield
        return

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTH, *others = inputs
        return (hidden_BTH[at_BT].unsqueeze(0), *others)

    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def _prompt_prefix(model: PreTrainedModel, rows: Rows, indices: Sequence[int]) -> Prefix:
    """Return what all rows begin with; the position before a supervised token stays outside."""
    firsts = [int(np.argmax(rows.labels(i)[1:] != IGNORED)) for i in indices]
    return shared_prefix(
        model, [rows.input_ids(i).tolist() for i in indices], min(firsts, default=0)
    )


def _batches(
    rows: Rows, indices: Sequence[int], batch_size: int, vocabulary: int
) -> Iterator[list[int]]:
    """Yield row numbers of similar length, longest first, so that too little memory shows early."""
    batch: list[int] = []
    num_logits = 0
    for row in sorted(indices, key=lambda row: (-rows.lengths[row], row)):
        more = int(rows.num_supervised[row]) * vocabulary
        if batch and (len(batch) == batch_size or num_logits + more > MAX_LOGITS):
            yield batch
            batch, num_logits = [], 0
        batch.append(row)
        num_logits += more
    if batch:
        yield batch


def _row_nats(
    model: PreTrainedModel, rows: Rows, batch: Sequence[int], prefix: Prefix
) -> list[float]:
    shape = len(batch), int(rows.lengths[list(batch)].max())
    ids_BT, labels_BT = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    mask_BT = np.zeros(shape, np.int64)
    for b, row in enumerate(batch):
        length = int(rows.lengths[row])
        ids_BT[b, :length], mask_BT[b, :length] = rows.input_ids(row), 1
        labels_BT[b, : length - 1] = rows.labels(row)[1:]  # what position t predicts
    ids, mask, labels = (torch.from_numpy(x).to(model.device) for x in (ids_BT, mask_BT, labels_BT))
    at_BT = labels != IGNORED
    logits_SV = logits_at(model, ids, mask, at_BT, prefix)
    nats_S = F.cross_entropy(logits_SV.float(), labels[at_BT], reduction="none").double()
    row_S = at_BT.nonzero()[:, 0]
    sums_B = torch.zeros(len(batch), dtype=torch.float64, device=nats_S.device)
    return sums_B.index_add_(0, row_S, nats_S).tolist()


def _finite(row: int, nats: float) -> float:
    if math.isfinite(nats):
        return nats
    raise ModelError(
        f"The model's loss on held-out row {row} is {nats}.",
        why="Some weight or activation is not finite; answers of this model mean nothing.",
        fix="Lower training.learning_rate; on a GPU set quantization.compute_dtype=bfloat16.",
    )


def _units(rows: Rows) -> list[int]:
    """Return for each row the first row with the same prompt; text without a prompt is its own."""
    first: dict[bytes, int] = {}
    units = []
    for row in range(len(rows)):
        supervised = np.flatnonzero(rows.labels(row)[1:] != IGNORED)
        start = int(supervised[0]) + 1 if supervised.size else 0
        prompt = rows.input_ids(row)[:start].tobytes()
        units.append(first.setdefault(prompt, row) if start > 1 else row)
    return units
