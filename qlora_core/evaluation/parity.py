"""What merging cost: the merged model against adapter on quantised base, on held-out rows.

Both models read the same rows, and at each supervised position their whole distributions are
compared, not only their losses: onto other weights than it was trained on, an adapter can make a
model of lower loss that gives other answers. The measure is KL(adapter || merged), how surprised
the merged model is by what the tuned model would say.

Logits are only computed where a token is supervised, of one batch at a time; the comparison runs
in float64 over slices of tokens, because a good merge differs by 1e-5 nats and float32 sums over
100 000 words are not that exact.

Dims: N rows, B rows of a batch, L tokens of a row, S positions of a batch, T supervised tokens,
V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from qlora_core.artifacts import Metric, Parity
from qlora_core.data.prepared import IGNORED, Rows
from qlora_core.errors import DataError
from qlora_core.evaluation.estimates import ratio_estimate

Model: TypeAlias = PreTrainedModel | PeftModel
"""A causal language model of transformers, with PEFT's adapter on it or not."""

_TOKENS_PER_SLICE = 128


@dataclass(frozen=True)
class TokenComparison:
    """How two models differ at each supervised token, all (T,) and float64."""

    kl: Tensor
    """KL(adapter || merged) [nats]."""
    agreement: Tensor
    """1 where both choose the same token, else 0."""
    loss_merged: Tensor
    """Of the true token [nats]."""
    loss_adapter: Tensor


def compare_logits(adapter_TV: Tensor, merged_TV: Tensor, target_T: Tensor) -> TokenComparison:
    """Compare two models' logits token by token, in float64, a slice of tokens at a time.

    Args:
        adapter_TV: Logits of the tuned model, any float dtype.
        merged_TV: Logits of the merged model.
        target_T: The true tokens.
    """
    slices = [slice(i, i + _TOKENS_PER_SLICE) for i in range(0, len(target_T), _TOKENS_PER_SLICE)]
    parts = [_compare_slice(adapter_TV[s], merged_TV[s], target_T[s]) for s in slices]
    return TokenComparison(*(torch.cat(column) for column in zip(*parts, strict=True)))


def measure_parity(
    adapter: Model,
    merged: Model,
    rows: Rows,
    *,
    onto: Literal["dequantized", "original"],
    max_rows: int,
    batch_size: int,
    on_batch: Callable[[int, int], None],
) -> Parity:
    """Measure how ``merged`` differs from ``adapter`` on the same held-out rows.

    Args:
        adapter: Causal LM in eval mode: quantised base with adapter.
        merged: Causal LM in eval mode, on the same device.
        rows: Held-out rows.
        onto: What the adapter was folded into.
        max_rows: Compare at most this many rows, spread evenly over ``rows``.
        batch_size: Rows per forward pass.
        on_batch: Called with (rows done, rows in all).

    Raises:
        DataError: No row has a supervised token.
    """
    chosen = _choose(rows, max_rows)
    sums_N4 = np.zeros((len(chosen), 4))
    for first in range(0, len(chosen), batch_size):
        batch = chosen[first : first + batch_size]
        sums_N4[first : first + len(batch)] = _compare_batch(adapter, merged, rows, batch)
        on_batch(first + len(batch), len(chosen))
    counts_N = rows.num_supervised[chosen].astype(np.float64)
    unit_N = _prompt_numbers(rows, chosen)

    def metric(column: int, unit: str, *, higher_is_better: bool) -> Metric:
        estimate = ratio_estimate(sums_N4[:, column], counts_N, unit_N)
        return Metric(
            value=estimate.value,
            standard_error=estimate.standard_error(),
            num_rows=len(chosen),
            unit=unit,
            higher_is_better=higher_is_better,
        )

    return Parity(
        onto=onto,
        kl=metric(0, "nats/token", higher_is_better=False),
        agreement=metric(1, "share of tokens", higher_is_better=True),
        loss_merged=metric(2, "nats/token", higher_is_better=False),
        loss_adapter=metric(3, "nats/token", higher_is_better=False),
    )


def _compare_slice(
    adapter_TV: Tensor, merged_TV: Tensor, target_T: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_p_TV = adapter_TV.double().log_softmax(-1)
    log_q_TV = merged_TV.double().log_softmax(-1)
    kl_T = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)
    same_T = (log_p_TV.argmax(-1) == log_q_TV.argmax(-1)).double()
    target_T1 = target_T[:, None]
    return kl_T, same_T, -log_q_TV.gather(1, target_T1)[:, 0], -log_p_TV.gather(1, target_T1)[:, 0]


def _choose(rows: Rows, max_rows: int) -> NDArray[np.int64]:
    """Return rows with something to predict, evenly spread, then sorted by length against padding.

    Sorted on the whole tuple (length, position), so the order never depends on the sort's kind.
    """
    usable = np.flatnonzero(rows.num_supervised)
    if not usable.size:
        raise DataError(
            "no held-out row has a supervised token, so the merged model cannot be compared.",
            fix="Hold out more rows: raise dataset.heldout.fraction, or give heldout.source.",
        )
    spread = np.linspace(0, usable.size - 1, min(max_rows, usable.size)).round().astype(np.int64)
    chosen = usable[spread]
    return chosen[np.argsort(rows.lengths[chosen], kind="stable")]


def _prompt_numbers(rows: Rows, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the prompts (tokens before the first supervised one): rows that share one hang
    together, so they count as one draw in the standard errors."""
    number_of: dict[bytes, int] = {}
    numbers = []
    for i in chosen.tolist():
        first = int(np.argmax(rows.labels(i) != IGNORED))
        # a row that is supervised from its start (plain text) has no prompt: it stands for itself
        prompt = rows.input_ids(i)[:first].tobytes() if first > 1 else b"row %d" % i
        numbers.append(number_of.setdefault(prompt, len(number_of)))
    return np.array(numbers, dtype=np.int64)


@torch.inference_mode()
def _compare_batch(
    adapter: Model, merged: Model, rows: Rows, batch: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return (B, 4) sums over each row's supervised tokens: KL, agreement, both losses."""
    device = _computes_on(merged)
    ids_BL, attention_BL, target_BL = (t.to(device) for t in _padded(rows, batch))
    is_target_BL = target_BL != IGNORED
    position_S = is_target_BL.any(0).nonzero()[:, 0]
    wanted_BS = is_target_BL[:, position_S]
    compared = compare_logits(
        _logits_at(adapter, ids_BL, attention_BL, position_S)[wanted_BS],
        _logits_at(merged, ids_BL, attention_BL, position_S)[wanted_BS],
        target_BL[is_target_BL],
    )
    row_T = is_target_BL.nonzero()[:, 0]
    columns = (compared.kl, compared.agreement, compared.loss_merged, compared.loss_adapter)
    sums_B4 = torch.zeros(len(batch), 4, dtype=torch.float64, device=device)
    sums_B4.index_add_(0, row_T, torch.stack(columns, dim=1))
    sums: NDArray[np.float64] = sums_B4.cpu().numpy()
    return sums


def _computes_on(model: Model) -> torch.device:
    """Return where a model computes: on the CPU, if its weights come only then (`passing`)."""
    found = next(model.parameters()).device
    return torch.device("cpu") if found.type == "meta" else found


def _padded(rows: Rows, batch: NDArray[np.int64]) -> Iterator[Tensor]:
    """Yield (B, L) tokens, attention and targets; a target is the label one token further on."""
    longest = int(rows.lengths[batch].max())
    ids = np.zeros((len(batch), longest), np.int64)
    attention = np.zeros((len(batch), longest), np.int64)
    target = np.full((len(batch), longest), IGNORED, np.int64)
    for b, i in enumerate(batch.tolist()):
        length = int(rows.lengths[i])
        ids[b, :length] = rows.input_ids(i)
        attention[b, :length] = 1
        target[b, : length - 1] = rows.labels(i)[1:]
    yield from map(torch.from_numpy, (ids, attention, target))


def _logits_at(model: Model, ids_BL: Tensor, attention_BL: Tensor, position_S: Tensor) -> Tensor:
    """Return (B, S, V) logits at these positions only, where the model can skip the others."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    can_skip = "logits_to_keep" in inspect.signature(inner.forward).parameters
    options = {"logits_to_keep": position_S} if can_skip else {}
    output = model(input_ids=ids_BL, attention_mask=attention_BL, use_cache=False, **options)
    logits: Tensor = output.logits if can_skip else output.logits[:, position_S]
    return logits
