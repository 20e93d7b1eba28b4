"""Run the tokens that all prompts begin with through the model once.

A chat template puts the same system message and markers before every request; for short requests
that is much of the prompt (24 of 41 tokens with SmolLM2's own template). Attention looks backwards
only, so the keys and values of a common beginning are the same for every row: they are computed for
one row and repeated. Results agree with whole prompts up to float32 rounding.

This needs a model that keeps every position in its cache and is told each token's position; others
(sliding windows, recurrent states, ALiBi by place) get no prefix and read whole prompts.
Dims: P prefix tokens, B rows of a batch.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

MIN_TOKENS = 8
"""Shorter prefixes are not worth a pass of their own."""


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the first tokens of every row; possibly of none."""

    num_tokens: int = 0
    layers: tuple[tuple[Tensor, Tensor], ...] = ()

    def cache(self, num_rows: int) -> DynamicCache | None:
        """Return a new cache that begins with this prefix in each of ``num_rows`` rows."""
        if not self.layers:
            return None
        cache = DynamicCache()
        for i, (keys, values) in enumerate(self.layers):
            shape = (num_rows, *keys.shape[1:])
            cache.update(keys.expand(shape), values.expand(shape), i)
        return cache


@torch.inference_mode()
def shared_prefix(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], limit: int | None = None
) -> Prefix:
    """Return what all sequences begin with, at least one token shorter than the shortest of them.

    Args:
        model: A causal LM.
        sequences: Token numbers.
        limit: Longest prefix [tokens].
    """
    count = common_length(sequences) if limit is None else min(limit, common_length(sequences))
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    if count < MIN_TOKENS or len(sequences) < 2 or not takes_positions:
        return Prefix()
    ids = torch.tensor([[int(token) for token in sequences[0][:count]]], device=model.device)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    if type(cache) is not DynamicCache or any(type(x) is not DynamicLayer for x in cache.layers):
        return Prefix()
    return Prefix(count, tuple((layer.keys, layer.values) for layer in cache.layers))


def common_length(sequences: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens are the same in all, leaving at least one token of each."""
    if not sequences:
        return 0
    shortest = min(map(len, sequences)) - 1
    first = sequences[0]
    for i in range(shortest):
        if any(sequence[i] != first[i] for sequence in sequences):
            return i
    return max(shortest, 0)
