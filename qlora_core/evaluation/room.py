"""Where the base lies while a model is asked: on the GPU, or with its host if it is too large.

Decided before a weight is loaded, from the model's shape, its questions and what the GPU has free;
`qlora plan` and preflight count with the same functions. On a CPU there is nothing to decide: the
host is the device. A merged model has no 4-bit weights, so it is always whole.

What a pass holds beside weights is a model of it (approximate): without gradients only the widest
moment of one layer, keys and values of all layers, and logits where they are wanted.

Dims: H hidden, F intermediate, V vocabulary, L layers, B rows of a batch, T tokens of the longest.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qlora_core.config import AdapterConfig, EvaluationConfig, QuantizationConfig, RunConfig
from qlora_core.evaluation.likelihood import MAX_LOGITS
from qlora_core.evaluation.questions import Questions
from qlora_core.modeling.dtypes import DtypeName, compute_dtype_name, torch_dtype
from qlora_core.modeling.hosted import BaseNeeds, BasePlace, choose_place, hosted_note
from qlora_core.modeling.loading import brings_code, load_saved_config
from qlora_core.modeling.lora import SavedAdapter, look_at_adapter
from qlora_core.modeling.machine import free_bytes, gpu_bytes
from qlora_core.modeling.memory import USABLE, MemoryEstimate, adapter_sizes
from qlora_core.modeling.parts import obstacle_to_parts
from qlora_core.modeling.quantization import stored_quantization
from qlora_core.modeling.shape import Shape, shape_of
from qlora_core.modeling.stored import FLOAT, PACKED, parts_of, stored_of
from qlora_core.ports import AskJob


@dataclass(frozen=True)
class LongestPasses:
    """The largest batches that a model is asked."""

    num_rows: int
    """Of a batch, at most."""
    row: int
    """Tokens of the longest row whose loss is measured."""
    prompt: int = 0
    """Tokens of the longest prompt; 0: nothing is generated."""
    answer: int = 0
    """Tokens of the longest answer."""

    @classmethod
    def of(cls, questions: Questions, evaluation: EvaluationConfig) -> "LongestPasses":
        """Return those of these questions."""
        prompts = [len(prompt.ids) for prompt in questions.prompts]
        return cls(
            num_rows=min(evaluation.batch_size, max(len(questions.indices), len(prompts))),
            row=int(questions.rows.lengths[list(questions.indices)].max()),
            prompt=max(prompts, default=0),
            answer=evaluation.max_new_tokens if prompts else 0,
        )


def place_base(job: AskJob, questions: Questions, device: torch.device) -> BasePlace:
    """Return where the base of ``job`` shall lie on this device.

    Raises:
        ResourceError: There is no room for it.
        ArtifactError: Its configuration, or the adapter, cannot be read.
    """
    if device.type != "cuda" or job.is_merged:
        return BasePlace()
    needs = needs_of(job, questions)
    if needs is None:
        return BasePlace()
    return choose_place(needs, gpu_bytes(device), free_bytes(), wants_host=job.offloads_base)


def needs_of(job: AskJob, questions: Questions) -> BaseNeeds | None:
    """Return what asking the base needs; none of one that brings code, which loading alone tells.

    Raises:
        ArtifactError: Its configuration, or the adapter, cannot be read.
    """
    if brings_code(job.model):
        return None
    config = load_saved_config(job.model)
    quantization = stored_quantization(config)
    adapter = look_at_adapter(job.adapter) if job.adapter else SavedAdapter(0, is_dora=False)
    return count_needs(
        shape_of(config, quantization, AdapterConfig()),
        quantization,
        LongestPasses.of(questions, job.evaluation),
        compute_dtype_name(quantization.compute_dtype, "cuda"),
        adapter_bytes=adapter.size_bytes,
        is_dora=adapter.is_dora,
    )


def count_needs(
    shape: Shape,
    quantization: QuantizationConfig,
    passes: LongestPasses,
    compute_dtype: DtypeName,
    *,
    adapter_bytes: int,
    is_dora: bool = False,
) -> BaseNeeds:
    """Return what asking a model of this shape needs.

    Args:
        shape: The base's.
        quantization: How it is stored.
        passes: What it is asked.
        compute_dtype: Of its unquantised weights and of products.
        adapter_bytes: Of an adapter on it, in float32; 0: none.
        is_dora: That adapter is one of DoRA.
    """
    number = torch_dtype(compute_dtype).itemsize
    activations, logits = max(_pass_bytes(shape, passes, number, bool(adapter_bytes)), key=sum)

    def estimate(*, is_hosted: bool) -> MemoryEstimate:
        stored = stored_of(
            shape, quantization, number, num_shards=int(is_hosted), is_offloaded=is_hosted
        )
        return MemoryEstimate(
            strategy="qlora",
            **dict(stored),
            adapter=adapter_bytes,
            gradients=0,
            optimizer=0,
            activations=activations,
            logits=logits,
            workspace=number * _largest_quantized(shape) if quantization.method in PACKED else 0,
        )

    if obstacle := obstacle_to_parts(quantization.method, is_dora=is_dora):
        return BaseNeeds(estimate(is_hosted=False), None, obstacle=obstacle)
    host_bytes = parts_of(shape, quantization, 1).pinned
    return BaseNeeds(estimate(is_hosted=False), estimate(is_hosted=True), host_bytes)


def planned_notes(
    config: RunConfig, shape: Shape, compute_dtype: DtypeName, gpu_free_bytes: int, longest: int
) -> list[str]:
    """Say what a recipe's models will not find on a GPU when they are asked.

    Args:
        config: The recipe.
        shape: Of its model.
        compute_dtype: On that GPU.
        gpu_free_bytes: There.
        longest: Tokens of the longest row.
    """
    asked, wants_host = config.evaluation, config.cluster.offload_base
    answer = asked.max_new_tokens if asked.generate else 0
    needs = count_needs(
        shape,
        config.quantization,
        LongestPasses(asked.batch_size, longest, prompt=longest if answer else 0, answer=answer),
        compute_dtype,
        adapter_bytes=FLOAT * sum(adapter_sizes(shape, config.adapter)),
        is_dora=config.adapter.dora,
    )
    notes, usable_bytes = [], int(USABLE * gpu_free_bytes)
    if needs.hosted is None and needs.whole.total > usable_bytes:
        free = f"{needs.enough_gpu_bytes / 1e9:.0f} GB free"
        notes.append(
            f"Evaluation takes a GPU with {free}, as no host can hold this base: {needs.obstacle}."
        )
    elif needs.hosted is not None and (wants_host or needs.whole.total > usable_bytes):
        copies = _copies_note(needs.host_bytes, config.cluster.max_workers)
        notes.append(f"In evaluation {hosted_note(needs, wants_host=wants_host)}{copies}.")
        if needs.hosted.total > usable_bytes:
            free = f"{needs.hosted.total / USABLE / 1e9:.0f} GB free"
            notes.append(f"Even so it takes a GPU with {free}: lower evaluation.batch_size.")
    both_bytes = needs.whole.total + shape.num_parameters * torch_dtype(config.merge.dtype).itemsize
    if config.merge.enabled and both_bytes > usable_bytes:
        notes.append(
            "Comparing the merged model with the tuned one takes a GPU with "
            f"{both_bytes / USABLE / 1e9:.0f} GB free; merge.enabled=false leaves merging out."
        )
    return notes


def _copies_note(host_bytes: int, num_askers: int) -> str:
    """Say that on a cluster each worker has a base of its own; nothing if there is one worker."""
    if num_askers == 1:
        return ""
    return (
        "; on a cluster each worker that evaluates keeps a copy of its own there, "
        f"{num_askers * host_bytes / 1e9:.2f} GB if all {num_askers} share a node"
    )


def _largest_quantized(shape: Shape) -> int:
    """Return how many weights are dequantised at a time."""
    return max((g.num_out * g.num_in for g in shape.linears if g.is_quantized), default=0)


def _pass_bytes(
    shape: Shape, passes: LongestPasses, number: int, is_adapted: bool
) -> Iterator[tuple[int, int]]:
    """Yield (activations, logits) [bytes] of measuring a batch, and of answering one.

    Logits are there as the head gives them, in float32, and as logarithms.
    """
    copies = (number if number != FLOAT else 0) + 2 * FLOAT
    one_row = passes.row * shape.vocabulary
    num_logits = min(passes.num_rows * one_row, max(one_row, MAX_LOGITS))
    of_row = _row_bytes(shape, number, is_adapted, passes.row, passes.row)
    yield passes.num_rows * of_row, copies * num_logits
    end = passes.prompt + passes.answer
    of_row = _row_bytes(shape, number, is_adapted, passes.prompt, end)
    yield passes.num_rows * of_row, copies * passes.num_rows * shape.vocabulary


def _row_bytes(shape: Shape, number: int, is_adapted: bool, length: int, num_cached: int) -> int:
    """Return the widest moment of a layer, the mask, and all keys and values, for one row [bytes].

    PEFT computes an adapter in float32: its input, what it adds to an output, and the sum.

    Args:
        shape: The model's.
        number: Bytes of one in the compute dtype.
        is_adapted: There is an adapter.
        length: Tokens that go through a layer at once.
        num_cached: Tokens whose keys and values are there at the end.
    """
    hidden, wide = shape.hidden, max(shape.intermediate, shape.attention_width)
    token = number * (2 * hidden + 3 * wide)
    if is_adapted:
        token = number * (2 * hidden + 2 * wide) + FLOAT * (hidden + 2 * wide)
    mask = (1 + number) * length  # of one query: as it is made, and as attention takes it
    cached = 2 * shape.kv_width * number * (shape.num_layers + 1)  # one is copied as it grows
    return length * (token + mask) + num_cached * cached
