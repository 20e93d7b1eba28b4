"""Rows end to end in one line, each attending to itself alone: no padding, no dense mask.

A padded micro-batch multiplies as many rows as its longest one has tokens, and the padding is
thrown away. Packed, its rows lie one behind the other as a single row of N tokens. Everything but
attention works on tokens one by one and does not notice; positions count anew in each row; and
attention, which would look across, is computed row by row by the function below.

Rows that begin with the same tokens (a chat template's opening, a system message) need those only
once: causal attention makes their states the same in every row. They stand first, as the *prefix*;
each row then holds its own tokens and sees prefix and itself. Exact unless dropout draws a mask for
each token.

        tokens     p p p a a a a b b b          prefix 3, rows of 4 and 3
        positions  0 1 2 3 4 5 6 3 4 5

transformers lets a model's attention be replaced by name (`ALL_ATTENTION_FUNCTIONS`) and hands
keyword arguments down to it, so this works on any model built that way. Whether it does on a given
one is not guessed but tried: see `qlora_core.training.objective`.

Dims: N packed tokens, H query heads, G key heads, D head size, S own tokens of a row, P prefix.
On a CPU in float32 `qlora_core.modeling.attention` computes rows that are not short, on a GPU in 16
bits FlashAttention does (there, prefixes are not shared: its rows lie in one piece). The rest, such
as a soft cap, is computed row by row by torch.

Source: Krell et al. 2021, arXiv:2107.02027 (packing); Dao et al. 2022, arXiv:2205.14135 (no scores
in memory).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_core.modeling.attention import attend_grouped
from qlora_core.modeling.flash import attend_flash, is_for_flash

NAME = "qloraflow_packed"
_MIN_REACH = 64  # of the longest row; in shorter ones Python takes longer than what is gained


@dataclass(frozen=True)
class Layout:
    """Where the rows lie.

    Args:
        prefix: P, tokens that all rows begin with; they stand first, once.
        lengths: S of every row, the prefix not counted; at least 1 each.
    """

    prefix: int
    lengths: tuple[int, ...]
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict, repr=False)
    _starts: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    @property
    def num_tokens(self) -> int:
        """N, what goes through the model."""
        return self.prefix + sum(self.lengths)

    @cached_property
    def longest(self) -> int:
        """S of the longest row."""
        return max(self.lengths)

    def positions(self) -> list[int]:
        """Return the (N,) positions of the tokens in their rows."""
        own = (range(self.prefix, self.prefix + length) for length in self.lengths)
        return [*range(self.prefix), *(position for row in own for position in row)]

    def spans(self) -> Iterator[tuple[slice, int]]:
        """Yield where each row's own tokens lie, and how many tokens before them it sees."""
        if self.prefix:
            yield slice(0, self.prefix), 0
        start = self.prefix
        for length in self.lengths:
            yield slice(start, start + length), self.prefix
            start += length

    def starts(self, device: torch.device) -> Tensor:
        """Return (number of rows + 1,) where each row starts, int32; there is no prefix."""
        if device not in self._starts:
            ends = torch.tensor(list(accumulate(self.lengths, initial=0)), dtype=torch.int32)
            if device.type == "cuda":  # so the host need not wait for what is queued there
                ends = ends.pin_memory().to(device, non_blocking=True)
            self._starts[device] = ends
        return self._starts[device]

    def mask(self, own: int, before: int, window: int | None, device: torch.device) -> Tensor:
        """Return the (S, P + S) bool mask of a row: what each of its tokens sees."""
        key = (own, before, window)
        if key not in self._masks:
            at_S = torch.arange(before, before + own, device=device)[:, None]
            seen_K = torch.arange(before + own, device=device)[None, :]
            mask_SK = seen_K <= at_S
            if window is not None:
                mask_SK &= seen_K > at_S - window
            self._masks[key] = mask_SK
        return self._masks[key]


@contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Let ``model`` attend by the ``layout`` that each forward call must then be given."""
    found: dict[int, Any] = {
        id(m.config): m.config for m in model.modules() if hasattr(m, "config")
    }
    configs = [c for c in found.values() if getattr(c, "_attn_implementation", None) is not None]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def attend(
    module: nn.Module,
    query_1HND: Tensor,
    key_1GND: Tensor,
    value_1GND: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the (1, N, H, D) attention of each row over its prefix and itself.

    Raises:
        ValueError: The model asks for an attention that is not this one.
    """
    unknown = [name for name in ("s_aux", "position_bias") if others.get(name) is not None]
    if attention_mask is not None or unknown or not getattr(module, "is_causal", True):
        raise ValueError(f"{type(module).__name__} wants more than causal attention: {unknown}")
    reach = layout.prefix + layout.longest
    if sliding_window is not None and sliding_window >= reach:
        sliding_window = None  # over the longest row
    if softcap is None and not dropout:
        states = (query_1HND, key_1GND, value_1GND)
        if sliding_window is None and reach >= _MIN_REACH and _is_plain(query_1HND):
            scale = query_1HND.shape[-1] ** -0.5 if scaling is None else scaling
            return attend_grouped(*states, layout, scale), None
        if not layout.prefix and is_for_flash(query_1HND):
            starts = layout.starts(query_1HND.device)
            return attend_flash(*states, starts, layout.longest, scaling, sliding_window), None
    groups = query_1HND.shape[1] // key_1GND.shape[1]
    key_1HND = key_1GND.repeat_interleave(groups, 1) if groups > 1 else key_1GND
    value_1HND = value_1GND.repeat_interleave(groups, 1) if groups > 1 else value_1GND
    outputs = []
    for own, before in layout.spans():
        output_1HSD = _attend_row(
            query_1HND[:, :, own],
            _seen(key_1HND, own, before),
            _seen(value_1HND, own, before),
            layout,
            scaling=scaling,
            dropout=dropout,
            window=sliding_window,
            softcap=softcap,
        )
        outputs.append(output_1HSD.transpose(1, 2))
    return torch.cat(outputs, 1), None


def _is_plain(states: Tensor) -> bool:
    return states.device.type == "cpu" and states.dtype == torch.float32


def _seen(states_1HND: Tensor, own: slice, before: int) -> Tensor:
    if not before:
        return states_1HND[:, :, own]
    return torch.cat([states_1HND[:, :, :before], states_1HND[:, :, own]], 2)


def _attend_row(
    query_1HSD: Tensor,
    key_1HKD: Tensor,
    value_1HKD: Tensor,
    layout: Layout,
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    own, seen = query_1HSD.shape[2], key_1HKD.shape[2]
    if window is not None and window >= seen:
        window = None  # reaches over the whole row
    if own == seen and window is None and softcap is None:
        return F.scaled_dot_product_attention(
            query_1HSD, key_1HKD, value_1HKD, is_causal=True, dropout_p=dropout, scale=scaling
        )
    mask_SK = layout.mask(own, seen - own, window, query_1HSD.device)
    if softcap is None:
        return F.scaled_dot_product_attention(
            query_1HSD, key_1HKD, value_1HKD, attn_mask=mask_SK, dropout_p=dropout, scale=scaling
        )
    scale = 1 / math.sqrt(query_1HSD.shape[-1]) if scaling is None else scaling
    scores_1HSK = softcap * torch.tanh(query_1HSD @ key_1HKD.transpose(2, 3) * scale / softcap)
    shares_1HSK = torch.softmax(scores_1HSK.float().masked_fill(~mask_SK, -math.inf), -1)
    shares_1HSK = F.dropout(shares_1HSK.to(value_1HKD.dtype), dropout)
    return shares_1HSK @ value_1HKD


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
