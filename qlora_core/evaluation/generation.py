"""Answer prompts greedily, in batches, exactly as if each were answered alone.

Three things make batched answers differ from single ones, and each is seen to here. Padding goes on
the *left*: on the right, new tokens would follow padding. A model's own `generation_config.json`
(temperature, repetition penalty) silently fills what a call leaves open; so it is put aside, and
greedy means greedy. And an answer ends at *any* of the stop tokens: models that close a turn with
one token often end a text with another.

Stop tokens are cut off; other special tokens stay in the answer's text, because a model that
utters them has not answered well.
Dims: B rows of a batch, P prompt tokens, A answer tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlora_core.data.prepared import Prompt
from qlora_core.errors import ModelError
from qlora_core.evaluation.prefix import Prefix, shared_prefix
from qlora_core.modeling.loading import context_length_of
from qlora_core.ports import Answer

_MAX_PADDING = 1.5
"""A batch ends before a prompt that is this many times shorter than the batch's longest."""


@dataclass(frozen=True)
class Answering:
    """Prompts cut into batches for one model, wherever each batch is then computed.

    What a batch holds, and which prefix is computed once, follows from all prompts; so a batch gets
    the same answers on any worker of the same kind.

    Args:
        model: A causal LM in eval mode.
        tokenizer: The one the prompts were made with.
        prompts: What to answer.
        max_new_tokens: Longest answer; shorter where the model's context ends before.
        batch_size: Most prompts of one forward pass.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Prompt]
    max_new_tokens: int
    batch_size: int

    @cached_property
    def batches(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of prompts of similar length and equal room for the answer, longest first."""
        lengths = [len(prompt.ids) for prompt in self.prompts]
        return tuple(map(tuple, _batches(lengths, self._rooms, self.batch_size)))

    @cached_property
    def _rooms(self) -> list[int]:
        context = context_length_of(self.model.config)
        return [min(self.max_new_tokens, context - len(p.ids) + 1) for p in self.prompts]

    @cached_property
    def _stops(self) -> list[int]:
        return stop_tokens(self.model, self.tokenizer)

    @cached_property
    def _prefix(self) -> Prefix:
        return shared_prefix(self.model, [prompt.ids for prompt in self.prompts])

    def answer(self, batch: Sequence[int]) -> tuple[Answer, ...]:
        """Return the greedy answer to each prompt of ``batch``, in its order.

        Raises:
            ModelError: Neither model nor tokenizer names a stop token.
        """
        stops, ids = self._stops, [self.prompts[i].ids for i in batch]
        with _greedy(self.model, stops, self._rooms[batch[0]]):
            new_BA = _continue(self.model, ids, self._prefix, stops[0])
        return tuple(_answer(self.tokenizer, ids, stops) for ids in new_BA.tolist())


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token that ends an answer: the model's and the tokenizer's, sorted.

    Raises:
        ModelError: There is none.
    """
    own = getattr(model.generation_config, "eos_token_id", None)
    named = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    stops = sorted({int(token) for token in named if token is not None})
    if not stops:
        raise ModelError(
            "Neither the model nor its tokenizer names a stop token.",
            why="Every answer would run on to evaluation.max_new_tokens.",
            fix="Set eos_token in the tokenizer's tokenizer_config.json.",
        )
    return stops


@contextmanager
def _greedy(model: PreTrainedModel, stops: list[int], max_new_tokens: int) -> Iterator[None]:
    """Replace the model's own generation settings inside the block."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=stops[0],
        bos_token_id=own.bos_token_id if own is not None else None,
        disable_compile=True,
    )
    try:
        yield
    finally:
        model.generation_config = own


def _batches(lengths: Sequence[int], rooms: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield numbers of prompts of similar length and equal room for the answer, longest first."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        is_other = batch and (
            rooms[i] != rooms[batch[0]] or lengths[i] * _MAX_PADDING < lengths[batch[0]]
        )
        if is_other or len(batch) == batch_size:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.inference_mode()
def _continue(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], prefix: Prefix, pad: int
) -> Tensor:
    """Return the (B, A) new tokens; after its stop token a row is filled with ``pad``.

    Padding goes between the prefix and the rest: masked, and skipped in counting positions.
    """
    longest, start = max(map(len, prompts)), prefix.num_tokens
    ids_BP = [[*p[:start], *[pad] * (longest - len(p)), *p[start:]] for p in prompts]
    mask_BP = [[1] * start + [0] * (longest - len(p)) + [1] * (len(p) - start) for p in prompts]
    cache = prefix.cache(len(prompts))
    all_BT: Tensor = model.generate(
        input_ids=torch.tensor(ids_BP, device=model.device),
        attention_mask=torch.tensor(mask_BP, device=model.device),
        **({} if cache is None else {"past_key_values": cache}),
    )
    return all_BT[:, longest:]


def _answer(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: list[int]) -> Answer:
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    kept = ids[:end]
    text = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Answer(text=text, num_tokens=len(kept), truncated=end is None)
