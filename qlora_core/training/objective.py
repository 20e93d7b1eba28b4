"""The loss: cross-entropy summed over supervised positions, and logits for no others.

The output head is a third of a small model's work, but only supervised positions need it. So just
before the head, a hook keeps those hidden states alone, laid out as one row; the model's own
forward does the rest. Whatever it does around the head (Granite's scaling, Gemma's soft cap,
Cohere's factor) is element-wise and happens to the kept positions as it would have to all, so no
architecture needs a case of its own. A model that never calls its head as a module gets the full
logits instead, and says so (`LossFunction.notes`).

The loss is a *sum*: the loop divides by the supervised tokens of the whole optimizer step, over all
workers, so neither micro-batch nor number of workers weighs rows differently.

Rows are padded on the right and no attention mask is given: in a causal model nothing real looks at
what comes after it, and without a mask attention takes its fastest path.

Dims: B rows, T tokens of the longest, V vocabulary, K supervised positions.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_core.data.prepared import IGNORED, Rows
from qlora_core.training.batching import Indices


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its device."""

    input_ids_BT: Tensor
    labels_BT: Tensor
    """Aligned with the tokens, not shifted; IGNORED where nothing is supervised."""


def collate(rows: Rows, chunk: Indices, device: torch.device) -> Batch:
    """Return the rows of ``chunk`` padded on the right to the longest of them."""
    length = int(rows.lengths[chunk].max())
    input_ids = np.zeros((len(chunk), length), np.int64)
    labels = np.full((len(chunk), length), IGNORED, np.int64)
    for place, row in enumerate(chunk):
        input_ids[place, : rows.lengths[row]] = rows.input_ids(row)
        labels[place, : rows.lengths[row]] = rows.labels(row)
    return Batch(torch.from_numpy(input_ids).to(device), torch.from_numpy(labels).to(device))


@dataclass
class LossFunction:
    """Computes losses of one model; remembers which way works for it.

    Args:
        model: A causal language model, with or without PEFT's adapter.
    """

    model: nn.Module
    notes: list[str] = field(default_factory=list)
    _head_is_called: bool = True

    def __call__(self, batch: Batch) -> Tensor:
        """Return the cross-entropy summed over supervised positions, float32, a scalar."""
        next_label_BT = F.pad(batch.labels_BT[:, 1:], (0, 1), value=IGNORED)
        keep_BT = next_label_BT != IGNORED
        if not keep_BT.any():
            return torch.zeros((), device=keep_BT.device)
        logits_KV = self._logits(batch.input_ids_BT, keep_BT)
        return F.cross_entropy(logits_KV.float(), next_label_BT[keep_BT], reduction="sum")

    def _logits(self, input_ids_BT: Tensor, keep_BT: Tensor) -> Tensor:
        """Return the (K, V) logits at the positions to keep."""
        head = self.model.get_output_embeddings() if self._head_is_called else None  # type: ignore[operator]
        if head is None:
            return self._forward(input_ids_BT)[keep_BT]
        logits, was_called = self._with_hook(head, input_ids_BT, keep_BT)
        if was_called:
            return logits[0]
        self._head_is_called = False
        self.notes.append(
            f"{type(self.model).__name__} does not call its output head as a module, so logits are "
            "computed at all positions: correct, but slower and larger."
        )
        return logits[keep_BT]

    def _with_hook(
        self, head: nn.Module, input_ids_BT: Tensor, keep_BT: Tensor
    ) -> tuple[Tensor, bool]:
        calls = []

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            calls.append(1)
            return (args[0][keep_BT][None], *args[1:])

        handle = head.register_forward_pre_hook(keep)
        try:
            return self._forward(input_ids_BT), bool(calls)
        finally:
            handle.remove()

    def _forward(self, input_ids_BT: Tensor) -> Tensor:
        output: Any = self.model(input_ids=input_ids_BT, use_cache=False)
        logits: Tensor = output.logits
        return logits
