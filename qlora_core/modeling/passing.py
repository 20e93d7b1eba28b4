"""Run a model whose weights are in memory only while the module that they belong to computes.

The comparison after a merge needs the answers of two models, each perhaps larger than memory. So
here a model is a skeleton: before a module computes, its weights are read from their files, and
afterwards they are let go of. Every batch reads all weights again, which costs little beside what
a batch of whole rows computes. The numbers are those of the model loaded whole in float32, with
4-bit weights dequantised.

An adapter's own weights are small and stay. PEFT's layers read their base layer's weight themselves
(DoRA takes its norm), so such a layer and what lies in it come and go as one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora_core.modeling.heap import Stream
from qlora_core.modeling.lora import load_adapter
from qlora_core.modeling.quiet import quiet
from qlora_core.modeling.weights import CheckpointWeights, ModelWeights


@dataclass(frozen=True)
class _Place:
    """Where a parameter belongs: in which module, under which name, and which tensor it is."""

    module: nn.Module
    name: str
    key: str


def open_passing(folder: Path, adapter: Path | None = None) -> PreTrainedModel | PeftModel | None:
    """Return a causal language model that computes in float32 on the CPU, in eval mode.

    Args:
        folder: A transformers checkpoint; 4-bit weights are dequantised.
        adapter: An adapter in PEFT's format to put on it.

    Returns:
        None where the checkpoint cannot be read like that: it brings code of its own, multiplies
        in 8 bits, names its weights otherwise than the model does, or holds more than weights.

    Raises:
        ArtifactError: The checkpoint or the adapter cannot be read.
    """
    if any(folder.glob("*.py")):
        return None
    with quiet():
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if _is_8_bit(config):
        return None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with quiet(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()  # each of them was made without memory by itself
    weights = CheckpointWeights(folder)
    shapes = {name: info.shape for name, info in ModelWeights(model).infos().items()}
    if shapes != {name: info.shape for name, info in weights.infos().items()}:
        return None
    if len(shapes) > len(dict(model.named_parameters())):
        return None  # buffers that are stored
    key_of = {id(parameter): name for name, parameter in model.named_parameters()}
    opened = model if adapter is None else load_adapter(model, adapter)
    stream = Stream()
    for unit in _units(opened):
        _let_pass(unit, key_of, weights, stream)
    return opened.requires_grad_(False).eval()


def _is_8_bit(config: Any) -> bool:
    stored = getattr(config, "quantization_config", None) or {}
    return bool(dict(stored).get("load_in_8bit"))


def _units(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose weights come and go as one."""
    wrappers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    inside = {id(part) for wrapper in wrappers for part in wrapper.modules()}
    others = [
        module
        for module in model.modules()
        if id(module) not in inside and any(p.is_meta for p in module.parameters(recurse=False))
    ]
    return [*wrappers, *others]


def _let_pass(
    unit: nn.Module, key_of: dict[int, str], weights: CheckpointWeights, stream: Stream
) -> None:
    """Read a unit's weights before it computes, and let go of them afterwards."""
    empty = {
        _Place(module, name, key_of[id(parameter)]): parameter
        for module in unit.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta
    }

    def fill(*_: Any) -> None:
        for place in empty:
            tensor = weights.read(place.key).float()
            place.module._parameters[place.name] = nn.Parameter(tensor, requires_grad=False)

    def clear(*_: Any) -> None:
        for place, parameter in empty.items():
            place.module._parameters[place.name] = parameter
            stream.passed(4 * parameter.numel())

    unit.register_forward_pre_hook(fill)
    unit.register_forward_hook(clear, always_call=True)
