"""The loss: cross-entropy summed over supervised positions, and logits for no others.

The output head is a third of a small model's work, but only supervised positions need it. So the
head is given those hidden states alone, laid out as one row; the model's own forward does the rest.
If the model returns what its head returned, the head returns the hidden states, and head and loss
are computed together without logits (`qlora_core.modeling.head`). If it does more (Granite's
scaling, Gemma's soft cap, Cohere's factor), that is element-wise and happens to the kept positions
as it would have to all, so no architecture needs a case of its own. A model that never calls its
head as a module gets the full logits instead. What is not the fast way is said
(`LossFunction.notes`).

The loss is a *sum*: the loop divides by the supervised tokens of the whole optimizer step, over all
workers, so neither micro-batch nor number of workers weighs rows differently.

Rows lie end to end where the model's attention allows it (`qlora_core.modeling.packing`), else they
are padded on the right. Which of the two is not read off the architecture but tried: a few rows go
through both, and packing is used if the logits agree. Padded rows get no attention mask: in a
causal model nothing real looks at what comes after it, and attention is fastest without one.

Dims: B rows, T tokens of the longest (packed: B = 1, T = N), V vocabulary, K supervised positions.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_core.data.prepared import IGNORED, Rows
from qlora_core.modeling.head import cross_entropy_sum
from qlora_core.modeling.packing import Layout, packed_attention
from qlora_core.training.batching import Indices

_MIN_PREFIX = 4  # a shorter one saves less than its concatenations cost
_NUM_TRIED = 3
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its device."""

    input_ids_BT: Tensor
    next_labels_BT: Tensor
    """What each position must predict; IGNORED where nothing is supervised."""
    positions_BT: Tensor | None = None
    layout: Layout | None = None
    """Where the rows lie, if they are packed."""


def collate(rows: Rows, chunk: Indices, device: torch.device) -> Batch:
    """Return the rows of ``chunk`` padded on the right to the longest of them."""
    length = int(rows.lengths[chunk].max())
    input_ids = np.zeros((len(chunk), length), np.int64)
    next_labels = np.full((len(chunk), length), IGNORED, np.int64)
    for place, row in enumerate(chunk):
        input_ids[place, : rows.lengths[row]] = rows.input_ids(row)
        next_labels[place, : rows.lengths[row] - 1] = rows.labels(row)[1:]
    return Batch(torch.from_numpy(input_ids).to(device), torch.from_numpy(next_labels).to(device))


def pack(rows: Rows, chunk: Indices, device: torch.device, *, shares_prefix: bool) -> Batch:
    """Return the rows of ``chunk`` end to end; what all begin with, once if ``shares_prefix``."""
    prefix = common_prefix(rows, chunk) if shares_prefix else 0
    first = int(chunk[0])
    input_ids = [rows.input_ids(first)[:prefix]]
    next_labels = [np.full(prefix, IGNORED, np.int32)]
    for row in chunk:
        input_ids.append(rows.input_ids(row)[prefix:])
        next_labels += [rows.labels(row)[prefix + 1 :], np.full(1, IGNORED, np.int32)]
    layout = Layout(prefix, tuple(int(rows.lengths[row]) - prefix for row in chunk))
    ids_1N, labels_1N, positions_1N = (
        torch.from_numpy(np.asarray(values, np.int64)[None]).to(device)
        for values in (np.concatenate(input_ids), np.concatenate(next_labels), layout.positions())
    )
    return Batch(ids_1N, labels_1N, positions_1N, layout)


def common_prefix(rows: Rows, chunk: Indices) -> int:
    """Return how many tokens all rows of ``chunk`` begin with, none of them predicting anything.

    The last token of a prefix predicts another one in every row, so no row's first supervised token
    may come right after it; and each row keeps at least one token of its own.
    """
    if len(chunk) < 2:
        return 0
    first = rows.input_ids(int(chunk[0]))
    length = len(first)
    for row in chunk:
        ids, supervised = rows.input_ids(row), np.flatnonzero(rows.labels(row)[1:] != IGNORED)
        length = min(length, len(ids) - 1, int(supervised[0]) if len(supervised) else len(ids))
        differs = np.flatnonzero(ids[:length] != first[:length])
        length = int(differs[0]) if len(differs) else length
    return length if length >= _MIN_PREFIX else 0


class _Call(threading.local):
    """What the head shall do in this thread's next call, and what it did."""

    positions_BT: Tensor | None = None
    """Keep these alone; none: behave as ever."""
    passes_through: bool = False
    """Return the hidden states themselves."""
    returned: Tensor | None = None


@dataclass
class _Head:
    """A model's output head, which computes only what it is asked for."""

    layer: Any
    forward: Callable[[Tensor], Tensor]
    """The layer's own."""
    call: _Call = field(default_factory=_Call)

    def __call__(self, hidden_BTH: Tensor) -> Tensor:
        positions_BT, self.call.positions_BT = self.call.positions_BT, None
        if positions_BT is None:
            return self.forward(hidden_BTH)
        hidden_1KH = hidden_BTH[positions_BT][None]
        returned = hidden_1KH if self.call.passes_through else self.forward(hidden_1KH)
        self.call.returned = returned
        return returned

    @property
    def is_plain(self) -> bool:
        """A frozen product without bias, which `cross_entropy_sum` can compute."""
        return (
            type(self.layer) is nn.Linear
            and self.layer.bias is None
            and not self.layer.weight.requires_grad
        )


@dataclass
class LossFunction:
    """Computes losses of one model; remembers which way works for it.

    Args:
        model: A causal language model, with or without PEFT's adapter.
        notes: Where it is said what had to be done the slow way.
        shares_prefix: Rows may share states: there is no dropout.
    """

    model: nn.Module
    notes: list[str] = field(default_factory=list)
    shares_prefix: bool = True
    packs: bool = False
    """Rows are packed; the model must attend by `packed_attention` then."""
    _head: _Head | None = None
    _fuses_head: bool = False

    def __post_init__(self) -> None:
        layer = self.model.get_output_embeddings()  # type: ignore[operator]
        if layer is not None:
            self._head = _Head(layer, layer.forward)
            self._fuses_head = self._head.is_plain
            layer.forward = self._head

    def batch(self, rows: Rows, chunk: Indices, device: torch.device) -> Batch:
        """Return the rows of ``chunk`` as this model takes them."""
        if not self.packs:
            return collate(rows, chunk, device)
        return pack(rows, chunk, device, shares_prefix=self.shares_prefix)

    def try_packing(self, rows: Rows, device: torch.device) -> None:
        """Pack from now on if that gives the logits of padding; say so in ``notes`` if not.

        Args:
            rows: Some of them, of middling length, go through the model both ways.
            device: Where the model is.
        """
        middling = np.argsort(rows.lengths, kind="stable")[len(rows) // 2 :][:_NUM_TRIED]
        usable = middling[rows.num_supervised[middling] > 0]
        if not len(usable):
            return
        was_training = self.model.training
        self.model.eval()
        try:
            why = self._difference(rows, usable, device)
        except Exception as error:  # whatever an architecture objects to, padding serves it
            why = f"{type(error).__name__}: {error}"
        finally:
            self.model.train(was_training)
        self.packs = not why
        if why:
            self.notes.append(
                f"Rows are padded, not packed: {type(self.model).__name__} computes something else "
                f"then ({why}). Correct, but slower."
            )

    @torch.no_grad()
    def _difference(self, rows: Rows, chunk: Indices, device: torch.device) -> str:
        """Return what is wrong with packed logits; nothing if they are right."""
        padded = collate(rows, chunk, device)
        expected_KV = self._logits(padded, padded.next_labels_BT != IGNORED).float()
        packed = pack(rows, chunk, device, shares_prefix=self.shares_prefix)
        with packed_attention(self.model):
            found_KV = self._logits(packed, packed.next_labels_BT != IGNORED)
        error = float((found_KV.float() - expected_KV).norm() / expected_KV.norm())
        allowed = _TOLERANCE.get(found_KV.dtype, 1e-4)
        return "" if error <= allowed else f"logits {error:.1e} off, {allowed:.0e} allowed"

    def __call__(self, batch: Batch) -> Tensor:
        """Return the cross-entropy summed over supervised positions, float32, a scalar."""
        keep_BT = batch.next_labels_BT != IGNORED
        if not keep_BT.any():
            return torch.zeros((), device=keep_BT.device)
        labels_K = batch.next_labels_BT[keep_BT]
        if self._head is not None and self._fuses_head:
            hidden_1KH = self._run(batch, keep_BT, passes_through=True)
            if hidden_1KH is self._head.call.returned:
                return cross_entropy_sum(hidden_1KH[0], self._head.layer.weight, labels_K)
            self._stop_fusing(was_called=self._head.call.returned is not None)
        logits_KV = self._logits(batch, keep_BT)
        return F.cross_entropy(logits_KV.float(), labels_K, reduction="sum")

    def _stop_fusing(self, *, was_called: bool) -> None:
        was_fusing, self._fuses_head = self._fuses_head, False  # another lane may have been first
        if was_fusing and was_called:
            self.notes.append(
                f"{type(self.model).__name__} does more to its logits than multiply by its head, "
                "so they are computed whole at supervised positions: correct, but larger."
            )

    def _logits(self, batch: Batch, keep_BT: Tensor) -> Tensor:
        """Return the (K, V) logits at the positions to keep."""
        head = self._head
        if head is not None:
            logits = self._run(batch, keep_BT)
            if head.call.returned is not None:
                return logits[0]
            self._head = None
            self.notes.append(
                f"{type(self.model).__name__} does not call its output head as a module, so logits "
                "are computed at all positions: correct, but slower and larger."
            )
            return logits[keep_BT]
        return self._run(batch)[keep_BT]

    def _run(
        self, batch: Batch, keep_BT: Tensor | None = None, passes_through: bool = False
    ) -> Tensor:
        """Return what the model returns as logits, of ``keep_BT`` alone if its head is called."""
        options: dict[str, Any] = {}
        if batch.layout is not None:
            options = {"position_ids": batch.positions_BT, "layout": batch.layout}
        call = self._head.call if self._head is not None else _Call()
        call.positions_BT, call.passes_through, call.returned = keep_BT, passes_through, None
        try:
            output: Any = self.model(input_ids=batch.input_ids_BT, use_cache=False, **options)
        finally:
            call.positions_BT = None
        logits: Tensor = output.logits
        return logits
