"""FlashAttention over rows that lie end to end, through torch's own door, where it has one.

torch 2.10 and later bring it (`torch.nn.attention.varlen`), and the arguments still change from one
version to the next. So the door is looked at first. A version that does not know of grouped heads
gets every key head as many times as query heads read it: the same numbers, more memory.

Dims: N packed tokens, H query heads, G key heads, D head size, R rows.
Source: Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LARGEST_HEAD = 256
_OLDEST_GPU = (8, 0)  # compute capability, Ampere; older ones have no FlashAttention 2


def is_for_flash(states: Tensor) -> bool:
    """Say whether `attend_flash` can compute queries like these."""
    size = states.shape[-1]
    is_short = states.dtype in (torch.float16, torch.bfloat16)
    if states.device.type != "cuda" or not is_short or size % 8 or size > _LARGEST_HEAD:
        return False
    return _door() is not None and _is_young(states.device)


def attend_flash(
    query_1HND: Tensor,
    key_1GND: Tensor,
    value_1GND: Tensor,
    starts: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Return the (1, N, H, D) causal attention of all rows at once.

    Args:
        query_1HND: Rows end to end.
        key_1GND: H is a multiple of G.
        value_1GND: As the keys.
        starts: (R + 1,) int32, where each row starts, and where the last ends.
        longest: Tokens of the longest row.
        scaling: Of the scores; none: 1 / sqrt(D).
        window: How many tokens each sees, itself included; none: all before it.
    """
    q_NHD, k_NGD, v_NGD = (s[0].transpose(0, 1) for s in (query_1HND, key_1GND, value_1GND))
    groups = q_NHD.shape[1] // k_NGD.shape[1]
    options: dict[str, Any] = {}
    if groups > 1 and _knows_groups():
        options["enable_gqa"] = True
    elif groups > 1:
        k_NGD, v_NGD = (s.repeat_interleave(groups, 1) for s in (k_NGD, v_NGD))
    attend: Any = _door()
    output_NHD: Tensor = attend(
        q_NHD,
        k_NGD,
        v_NGD,
        starts,
        starts,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),  # nothing to the right: causal
        **options,
    )
    return output_NHD[None]


@functools.cache
def _is_young(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= _OLDEST_GPU


@functools.cache
def _door() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size"} <= known.keys() else None


@functools.cache
def _knows_groups() -> bool:
    return "enable_gqa" in inspect.signature(_door() or _knows_groups).parameters
