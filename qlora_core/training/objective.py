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
through both, and packing is used if the logits agree, and if those of a row stay the same when its
neighbours change; in 16 bits to the last bit, as a small leak would pass for rounding. (Experts
that multiply the tokens of all rows together round differently then: in 16 bits they are padded.)
Whether the model draws, be it dropout of its own or a router's noise, is tried as well.

Dims: B rows, T tokens of the longest (packed: B = 1, T = N), V vocabulary, K supervised positions.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from qlora_core.data.prepared import Rows
from qlora_core.errors import CollectiveError, ResourceError
from qlora_core.modeling.head import cross_entropy_sum
from qlora_core.modeling.kernels import NO_KERNELS, Kernels
from qlora_core.modeling.packing import packed_attention
from qlora_core.training.batching import Indices
from qlora_core.training.collation import Batch, collate, pack
from qlora_core.training.trying import FailedTryError, Trial

_NUM_COMPARED = 16
_MAX_TRIED = 384  # positions of the tried rows; a large vocabulary's logits fill gigabytes
_LEAK = {torch.float32: 1e-5}
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class _Call(threading.local):
    """What the head shall do in this thread's next call, and what it did."""

    kept_K: Tensor | None = None
    """Keep these positions alone; none: behave as ever."""
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
        kept_K, self.call.kept_K = self.call.kept_K, None
        if kept_K is None:
            return self.forward(hidden_BTH)
        hidden_1KH = _at(kept_K, hidden_BTH)[None]
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
        kernels: From `find_kernels`.
    """

    model: nn.Module
    notes: list[str] = field(default_factory=list)
    kernels: Kernels = NO_KERNELS
    """What the loss may be computed with on a GPU."""
    packs: bool = False
    """Rows are packed; the model must attend by `packed_attention` then."""
    draws: bool = False
    """Something in the model is random: rows share no states, and threads no stream."""
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
        return pack(rows, chunk, device, shares_prefix=self._shares_prefix(device))

    def _shares_prefix(self, device: torch.device) -> bool:
        return not self.draws and device.type == "cpu"

    def try_out(
        self, rows: Rows, device: torch.device, start_trial: Callable[[], Trial] = Trial
    ) -> None:
        """Find out what this model allows; what it does not is said in ``notes``.

        Args:
            rows: Three of them, the longest among them, go through the model in several ways.
            device: Where the model is.
            start_trial: Called for each attempt; all workers of a base in parts try together.

        Raises:
            CollectiveError: Other workers are gone.
            ResourceError: There is no room for a block of a base in parts.
        """
        by_length = np.argsort(rows.lengths, kind="stable")
        usable = by_length[rows.num_supervised[by_length] > 0]
        if not len(usable):
            return
        self._try_fusing(collate(rows, usable[:1], device), start_trial())
        tried = usable[[len(usable) // 2, len(usable) * 3 // 4, -1]]
        for few in (tried, usable[:3]):
            failure = self._try_out(rows, few, device, start_trial())
            if failure is None or not failure.lacks_memory:
                self._say(failure, device)
                return
        self.notes.append("Rows are padded, not packed: there was no memory to try it out.")

    @torch.no_grad()
    def _try_fusing(self, batch: Batch, trial: Trial) -> None:
        """Find out whether the product with the head may be left to the loss.

        Over a whole base the first pass of training tells, as it can be made again. Where blocks
        come from all workers a pass is made once.
        """
        head = self._head
        if trial.base is None or head is None or not self._fuses_head:
            return

        def attempt() -> None:
            self.model.eval()
            returned = trial.run(lambda: self._run(batch, batch.kept_K, passes_through=True))
            if returned is not head.call.returned:
                raise FailedTryError("what the model returns is not what its head does")

        failure = self._verdict(attempt, trial)
        if failure is not None and not failure.lacks_memory:  # which says nothing of the model
            self._stop_fusing(was_called=head.call.returned is not None)

    def _try_out(
        self, rows: Rows, tried: Indices, device: torch.device, trial: Trial
    ) -> FailedTryError | None:
        """Return why rows are not packed; none: they are."""
        self.draws = True  # until it is shown not to

        def attempt() -> None:
            self.draws = self._draws(collate(rows, tried[:1], device), trial)
            self.model.eval()
            if why := self._difference(rows, tried, device, trial):
                raise FailedTryError(why)

        verdict = self._verdict(attempt, trial)
        self.packs = verdict is None
        return verdict

    def _verdict(self, attempt: Callable[[], None], trial: Trial) -> FailedTryError | None:
        """Return why ``attempt`` does not work, here or on another worker; none: it does."""
        was_training, failure = self.model.training, None
        try:
            attempt()
        except (CollectiveError, ResourceError):  # nobody is left to agree with
            raise
        except Exception as error:  # whatever an architecture objects to, a slower way serves it
            failure = FailedTryError.of(error)
        finally:
            self.model.train(was_training)
        return trial.conclude(failure)

    def _say(self, failure: FailedTryError | None, device: torch.device) -> None:
        if failure is not None:
            self.notes.append(
                f"Rows are padded, not packed: {type(self.model).__name__} computes something else "
                f"then ({failure.why}). Correct, but slower."
            )
        elif self.draws and device.type == "cpu":
            self.notes.append("With dropout, what rows begin with is computed for each of them.")

    @torch.no_grad()
    def _difference(self, rows: Rows, chunk: Indices, device: torch.device, trial: Trial) -> str:
        """Return what is wrong with packed logits; nothing if they are right."""
        padded = collate(rows, chunk, device)
        expected_KV = trial.run(lambda: self._logits(padded, _some(padded.kept_K))).float()
        packed = pack(rows, chunk, device, shares_prefix=self._shares_prefix(device))
        with packed_attention(self.model):
            found_KV = trial.run(lambda: self._logits(packed, _some(packed.kept_K)))
            leaks = self._leaks(pack(rows, chunk, device, shares_prefix=False), trial)
        error = float((found_KV.float() - expected_KV).norm() / expected_KV.norm())
        allowed = _TOLERANCE.get(found_KV.dtype, 1e-4)
        if not error <= allowed:  # NaN is no agreement
            return f"logits {error:.1e} off, {allowed:.0e} allowed"
        return "a row sees its neighbours" if leaks else ""

    def _leaks(self, packed: Batch, trial: Trial) -> bool:
        """Say whether what the last row predicts depends on the rows before it."""
        num_tokens = packed.input_ids_BT.shape[1]
        first = num_tokens - (packed.layout.lengths[-1] if packed.layout else 0)
        start = max(first, num_tokens - _NUM_COMPARED)
        last_K = torch.arange(start, num_tokens, device=packed.input_ids_BT.device)
        changed_1N = packed.input_ids_BT.clone()
        changed_1N[:, :first] = changed_1N[:, :first].roll(1, 1)
        changed = replace(packed, input_ids_BT=changed_1N)
        before_KV = trial.run(lambda: self._logits(packed, last_K))
        after_KV = trial.run(lambda: self._logits(changed, last_K))
        change = float((after_KV - before_KV).float().norm() / before_KV.float().norm())
        return not change <= _LEAK.get(before_KV.dtype, 0.0)  # NaN is no proof

    @torch.no_grad()
    def _draws(self, batch: Batch, trial: Trial) -> bool:
        """Say whether something in the model is random when it trains.

        A new adapter adds nothing yet, so its dropout does not show in what the model returns.
        """
        drops = [m.p for m in self.model.modules() if isinstance(m, _DropoutNd)]
        if any(drops):
            return True
        self.model.train()
        kept_K = _some(batch.kept_K)
        device = batch.input_ids_BT.device
        source = torch.cuda if device.type == "cuda" else torch.random
        state = source.get_rng_state()
        first_KV, second_KV = (trial.run(lambda: self._logits(batch, kept_K)) for _ in range(2))
        draws = not torch.equal(first_KV, second_KV)
        if draws:  # else nothing has moved; and other threads may draw at this moment
            source.set_rng_state(state)
        return draws

    def __call__(self, batch: Batch) -> Tensor:
        """Return the cross-entropy summed over supervised positions, float32, a scalar."""
        if not len(batch.kept_K):
            return torch.zeros((), device=batch.kept_K.device)
        if self._head is not None and self._fuses_head:
            hidden_1KH = self._run(batch, batch.kept_K, passes_through=True)
            if hidden_1KH is self._head.call.returned:
                weight_VH = self._head.layer.weight
                return cross_entropy_sum(
                    hidden_1KH[0], weight_VH, batch.labels_K, self.kernels.predict
                )
            self._stop_fusing(was_called=self._head.call.returned is not None)
        logits_KV = self._logits(batch, batch.kept_K)
        return F.cross_entropy(logits_KV.float(), batch.labels_K, reduction="sum")

    def _stop_fusing(self, *, was_called: bool) -> None:
        was_fusing, self._fuses_head = self._fuses_head, False  # another lane may have been first
        if was_fusing and was_called:
            self.notes.append(
                f"{type(self.model).__name__} does more to its logits than multiply by its head, "
                "so they are computed whole at supervised positions: correct, but larger."
            )

    def _logits(self, batch: Batch, kept_K: Tensor) -> Tensor:
        """Return the (K, V) logits at the positions to keep."""
        head = self._head
        if head is not None:
            logits = self._run(batch, kept_K)
            if head.call.returned is not None:
                return logits[0]
            self._head = None
            self.notes.append(
                f"{type(self.model).__name__} does not call its output head as a module, so logits "
                "are computed at all positions: correct, but slower and larger."
            )
            return _at(kept_K, logits)
        return _at(kept_K, self._run(batch))

    def _run(
        self, batch: Batch, kept_K: Tensor | None = None, passes_through: bool = False
    ) -> Tensor:
        """Return what the model returns as logits, of ``kept_K`` alone if its head is called."""
        options: dict[str, Any] = {}
        if batch.layout is not None:
            options = {"position_ids": batch.positions_BT, "layout": batch.layout}
        call = self._head.call if self._head is not None else _Call()
        call.kept_K, call.passes_through, call.returned = kept_K, passes_through, None
        try:
            output: Any = self.model(input_ids=batch.input_ids_BT, use_cache=False, **options)
        finally:
            call.kept_K = None
        logits: Tensor = output.logits
        return logits


def _at(kept_K: Tensor, states_BTX: Tensor) -> Tensor:
    """Return (K, X), the states at these places."""
    return states_BTX.reshape(-1, states_BTX.shape[-1]).index_select(0, kept_K)


def _some(kept_K: Tensor) -> Tensor:
    """Return every n-th place, so that few are left; the same ones, padded or packed."""
    return kept_K[:: max(1, -(-len(kept_K) // _MAX_TRIED))]
