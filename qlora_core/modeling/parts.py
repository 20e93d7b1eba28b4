"""Load a 4-bit base so that it is nowhere whole: block by block, each divided before the next.

transformers loads a checkpoint whole, and a base is sharded because it does not fit. So here the
model is made without memory first, its 4-bit layers are put in place, and then the tensors of one
block after another are read, each block being divided (`modeling.sharding`) before the next one
is read. Two copies of one block are whole at a time, beside the parts. What is in no block
(embeddings, output head, norms) is whole on every worker.

Checkpoints that cannot be read tensor by tensor (with code of their own, or tensors named otherwise
than the model's) are loaded whole and divided then, and that is said.
"""

import copy
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_core.modeling.loading import (
    brings_code,
    generation_config,
    load_base,
    load_saved_config,
)
from qlora_core.modeling.quiet import quiet
from qlora_core.modeling.sharding import Gatherer, ShardedBase, blocks_of
from qlora_core.modeling.stored import PACKED
from qlora_core.modeling.weights import CheckpointWeights, ModelWeights


def obstacle_to_parts(method: str, *, is_dora: bool) -> str:
    """Say what keeps a base from lying in parts; nothing if nothing does.

    Args:
        method: As in `QuantizationConfig.method`.
        is_dora: The adapter on it is one of DoRA, trained or new: PEFT takes the norm of every
            weight when it puts the layers in place, and then not all weights are there.
    """
    if method not in PACKED:
        return f"quantization.method={method}, only with 4-bit weights"
    return "adapter.dora=true, which starts from all weights" if is_dora else ""


def load_in_parts(
    folder: Path,
    device: torch.device,
    comm: Gatherer,
    notes: list[str],
    *,
    is_offloaded: bool = False,
) -> tuple[PreTrainedModel, ShardedBase]:
    """Return a quantised base, frozen and in eval mode, of which this worker keeps a part.

    Args:
        folder: Files of a QuantizedBase artefact; the checkpoint lies in its `model/`.
        device: Where it computes.
        comm: The line to the other workers.
        notes: Where it is said if the base had to be loaded whole.
        is_offloaded: The parts lie in the host's memory.

    Raises:
        ModelError: It has no blocks with 4-bit layers.
        ArtifactError: The checkpoint cannot be read or is incomplete.
    """
    base = ShardedBase(comm, is_offloaded=is_offloaded)
    weights = CheckpointWeights(folder / "model")
    model = _skeleton(folder, weights)
    if model is None:
        notes.append(
            "The base was loaded whole on every worker before it was divided, as its checkpoint "
            "cannot be read tensor by tensor: for a moment a worker needs room for all of it."
        )
        model = load_base(folder, device)
        for block in blocks_of(model):
            base.take(block)
        return model, base
    blocks, names = blocks_of(model), {part: name for name, part in model.named_modules()}
    reader = _Reader(model, weights, device)
    reader.fill(model, skip=set(blocks))
    for block in blocks:
        reader.fill(block, names[block])
        base.take(block)
    return model.requires_grad_(False).eval(), base


def _skeleton(folder: Path, weights: CheckpointWeights) -> PreTrainedModel | None:
    """Return the model without memory, its 4-bit layers in place; none where that is not safe."""
    if brings_code(folder):
        return None
    config = load_saved_config(folder)
    stored = dict(getattr(config, "quantization_config", None) or {})
    if not stored.get("load_in_4bit"):
        return None
    plain = copy.deepcopy(config)
    del plain.quantization_config
    with quiet(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(plain, dtype=config.dtype)
    model.tie_weights()
    if not _is_plain(model, weights):
        return None
    compute_dtype = getattr(torch, str(stored["bnb_4bit_compute_dtype"]).removeprefix("torch."))
    for name in weights.packed_names():
        _put_4bit_layer(model, name.removesuffix(".weight"), compute_dtype)
    model.generation_config = generation_config(folder / "model")  # what ends an answer, say
    model.config.quantization_config = config.quantization_config
    model.is_loaded_in_4bit = True  # PEFT asks for it
    return model


def _is_plain(model: PreTrainedModel, weights: CheckpointWeights) -> bool:
    """Say whether the checkpoint's tensors are the model's, under the same names."""
    infos, packed = weights.infos(), weights.packed_names()
    wanted = ModelWeights(model).infos()
    if {name: info.shape for name, info in wanted.items()} != {
        name: info.shape for name, info in infos.items()
    }:
        return False
    if len(wanted) > len(dict(model.named_parameters())):
        return False  # buffers that are stored
    owners = (model.get_submodule(name.rpartition(".")[0]) for name in packed)
    return all(type(owner) is nn.Linear for owner in owners) and all(
        infos[name].dtype == wanted[name].dtype for name in wanted if name not in packed
    )


def _put_4bit_layer(model: nn.Module, name: str, compute_dtype: torch.dtype) -> None:
    parent, _, last = name.rpartition(".")
    plain: Any = model.get_submodule(name)
    with torch.device("meta"):
        layer = Linear4bit(
            plain.in_features, plain.out_features, plain.bias is not None, compute_dtype
        )
    layer.support_avx512bf16_for_cpu = False  # see `modeling.loading`
    setattr(model.get_submodule(parent), last, layer)


class _Reader:
    """Gives modules their weights; tied ones are read once."""

    def __init__(self, model: nn.Module, weights: CheckpointWeights, device: torch.device) -> None:
        self._weights, self._device = weights, device
        self._empty = {parameter: name for name, parameter in model.named_parameters()}
        self._read: dict[nn.Parameter, nn.Parameter] = {}

    def fill(self, part: nn.Module, name: str = "", skip: Container[nn.Module] = ()) -> None:
        """Read what ``part`` needs, and bring its buffers to the device; leave out ``skip``."""
        for last, child in part.named_children():
            if child not in skip:
                self.fill(child, f"{name}.{last}" if name else last, skip)
        for last, buffer in list(part.named_buffers(recurse=False)):
            part._buffers[last] = buffer.to(self._device)
        for last, empty in list(part.named_parameters(recurse=False)):
            if empty not in self._read:
                self._read[empty] = self._parameter(part, self._empty[empty])
            part._parameters[last] = self._read[empty]

    def _parameter(self, owner: nn.Module, name: str) -> nn.Parameter:
        if name not in self._weights.packed_names():
            tensor = self._weights.read(name).to(self._device)
            return nn.Parameter(tensor, requires_grad=False)
        packed, parts = self._weights.read_packed(name)
        parameter: nn.Parameter = Params4bit.from_prequantized(
            packed, parts, device=self._device, module=owner
        )
        return parameter
