"""Causal attention of packed rows on a CPU, forward and backward by hand.

torch's own attention for CPUs is made for long rows: each head by itself, in small blocks, keys and
values repeated for every query head of a group. Fine-tuning has short rows, where it reaches a
third of what the cores can multiply. Here the query heads that share a key head are stacked into
one product with it, a block of queries at a time, and the products end where the block ends, so
nothing above the diagonal is computed but inside the block:

    block of C queries, R heads each     scores  (C R, K) = q k' / sqrt(D),  K = all keys so far
    softmax over what each may see       P
    output                               P v
    backward     dP = g v'     dS = P (dP - rowsum(P dP))
                 dq += dS k    dk += dS' q    dv += P' g

Rows get slices of one output and one gradient each, where autograd's slicing would fill and add a
tensor of the whole length for every row. P is kept for rows up to `KEPT_KEYS`, else computed again
in the backward pass, so memory grows with the tokens and not with their square.

Dims: N packed tokens, S own tokens of a row, K keys it sees, H query heads, G key heads, R = H / G
query heads to a key head, D head size, C queries of a block.
Source: Dao et al. 2022, arXiv:2205.14135, app. B (the backward pass); Ainslie et al. 2023,
arXiv:2305.13245 (grouped heads).
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

BLOCK = 64
KEPT_KEYS = 512


class Spans(Protocol):
    """Where rows lie; see `qlora_core.modeling.packing.Layout`."""

    def spans(self) -> Iterator[tuple[slice, int]]:
        """Yield where each row's own tokens lie, and how many tokens before them it sees."""


def attend_grouped(
    query_1HND: Tensor, key_1GND: Tensor, value_1GND: Tensor, layout: Spans, scaling: float
) -> Tensor:
    """Return the (1, N, H, D) causal attention of each row over its prefix and itself; float32."""
    output_NHD: Tensor = _Grouped.apply(  # type: ignore[no-untyped-call]
        query_1HND[0], key_1GND[0], value_1GND[0], layout, scaling
    )
    return output_NHD[None]


class _Grouped(torch.autograd.Function):
    """The formulas of the header, row by row and block by block."""

    @staticmethod
    def forward(
        ctx: Any, q_HND: Tensor, k_GND: Tensor, v_GND: Tensor, layout: Spans, scaling: float
    ) -> Tensor:
        num_heads, num_groups = len(q_HND), len(k_GND)
        output_HND = _by_token(q_HND)
        kept: list[Tensor | None] = []
        for own, before in layout.spans():
            q_GCD = _stack(q_HND[:, own], num_groups).mul_(scaling)
            k_GKD, v_GKD = _seen(k_GND, own, before), _seen(v_GND, own, before)
            output_GCD = torch.empty_like(q_GCD)
            for rows, num_keys in _blocks(own, before, num_heads // num_groups):
                shares = _shares(q_GCD[:, rows], k_GKD[:, :num_keys], before)
                output_GCD[:, rows] = torch.bmm(shares, v_GKD[:, :num_keys])
                kept.append(shares if k_GKD.shape[1] <= KEPT_KEYS else None)
            output_HND[:, own] = _unstack(output_GCD, num_heads)
        # not as attributes of ctx, which recomputing layers would not let go
        ctx.save_for_backward(q_HND, k_GND, v_GND, *kept)
        ctx.layout, ctx.scaling = layout, scaling
        return output_HND.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, g_NHD: Tensor) -> tuple[Tensor | None, ...]:
        q_HND, k_GND, v_GND, *all_shares = ctx.saved_tensors
        num_heads, num_groups = len(q_HND), len(k_GND)
        dq_HND = _by_token(q_HND)
        dk_GND, dv_GND = _by_token(k_GND).zero_(), _by_token(v_GND).zero_()
        kept = iter(all_shares)
        for own, before in ctx.layout.spans():
            q_GCD = _stack(q_HND[:, own], num_groups).mul_(ctx.scaling)
            g_GCD = _stack(g_NHD[own].transpose(0, 1), num_groups)
            k_GKD, v_GKD = _seen(k_GND, own, before), _seen(v_GND, own, before)
            dq_GCD = torch.empty_like(q_GCD)
            dk_GKD, dv_GKD = torch.zeros_like(k_GKD), torch.zeros_like(v_GKD)
            for rows, num_keys in _blocks(own, before, num_heads // num_groups):
                k, v, dk, dv = (states[:, :num_keys] for states in (k_GKD, v_GKD, dk_GKD, dv_GKD))
                q, g, shares = q_GCD[:, rows], g_GCD[:, rows], next(kept)
                if shares is None:
                    shares = _shares(q, k, before)
                ds = torch.bmm(g, v.transpose(1, 2))
                ds = torch._softmax_backward_data(ds, shares, -1, ds.dtype)
                dq_GCD[:, rows] = torch.bmm(ds, k)
                dk.baddbmm_(ds.transpose(1, 2), q)
                dv.baddbmm_(shares.transpose(1, 2), g)
            dq_HND[:, own] = _unstack(dq_GCD.mul_(ctx.scaling), num_heads)
            for total_GND, part_GKD in ((dk_GND, dk_GKD), (dv_GND, dv_GKD)):
                total_GND[:, own] += part_GKD[:, before:]
                total_GND[:, :before] += part_GKD[:, :before]
        return dq_HND, dk_GND, dv_GND, None, None


def _blocks(own: slice, before: int, repeat: int) -> Iterator[tuple[slice, int]]:
    """Yield which stacked query rows make a block, and how many keys it sees at most."""
    num_own = own.stop - own.start
    for start in range(0, num_own, BLOCK):
        end = min(num_own, start + BLOCK)
        yield slice(start * repeat, end * repeat), before + end


def _shares(q_GCD: Tensor, k_GKD: Tensor, before: int) -> Tensor:
    """Return the (G, C R, K) attention weights of one block, whose own tokens are its last keys."""
    num_keys = k_GKD.shape[1]
    num_own = (num_keys - before - 1) % BLOCK + 1
    repeat = q_GCD.shape[1] // num_own
    scores_GCK = torch.bmm(q_GCD, k_GKD.transpose(1, 2))
    scores_GCK[:, :, num_keys - num_own :] += _diagonal(repeat)[: num_own * repeat, :num_own]
    return torch.softmax(scores_GCK, -1)


@lru_cache
def _diagonal(repeat: int) -> Tensor:
    """Return what hides the keys after a query inside a block: (C R, C) of 0 and -infinity."""
    return torch.full((BLOCK, BLOCK), -math.inf).triu(1).repeat_interleave(repeat, 0)


def _seen(states_GND: Tensor, own: slice, before: int) -> Tensor:
    """Return the (G, K, D) keys or values that a row sees."""
    if not before:
        return states_GND[:, own]
    return torch.cat([states_GND[:, :before], states_GND[:, own]], 1)


def _stack(states_HSD: Tensor, num_groups: int) -> Tensor:
    """Return a (G, S R, D) copy: heads of one group next to each other, token by token."""
    num_heads, num_own, size = states_HSD.shape
    grouped_GRSD = states_HSD.reshape(num_groups, num_heads // num_groups, num_own, size)
    stacked = torch.empty(num_groups, num_own, num_heads // num_groups, size)
    return stacked.copy_(grouped_GRSD.transpose(1, 2)).view(num_groups, -1, size)


def _unstack(states_GCD: Tensor, num_heads: int) -> Tensor:
    """Return (H, S, D) of what `_stack` made."""
    num_groups, _, size = states_GCD.shape
    by_token_GSRD = states_GCD.view(num_groups, -1, num_heads // num_groups, size)
    return by_token_GSRD.transpose(1, 2).reshape(num_heads, -1, size)


def _by_token(states_HND: Tensor) -> Tensor:
    """Return an empty (H, N, D) tensor whose heads of one token lie next to each other."""
    num_heads, num_tokens, size = states_HND.shape
    return states_HND.new_empty(num_tokens, num_heads, size).transpose(0, 1)
