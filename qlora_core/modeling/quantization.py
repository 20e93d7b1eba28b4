"""Replace a model's linear layers by bitsandbytes' 4- or 8-bit ones, and save the checkpoint.

The layers are replaced here, one by one, and not by transformers while it loads: a GGUF file cannot
be loaded and quantised in one go, the float weight is still at hand to measure what quantising it
cost, and each is freed before the next is touched. What is saved is a plain transformers checkpoint
that `from_pretrained` opens as 4-bit again.

Weights are always quantised from float32 and on the CPU, so a GPU in the machine does not change
the bytes; the compute dtype only says what they are dequantised *to* (bitsandbytes keeps that with
each weight). The output head is never quantised: it is often tied to the embeddings, which are
looked up and not multiplied.

Dims: O out features, I in features.
Source: Dettmers et al. 2022, arXiv:2208.07339 (LLM.int8); 2023, arXiv:2305.14314 (NF4, double).
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from qlora_core.config import QuantizationConfig
from qlora_core.errors import ConfigError, ModelError, storing
from qlora_core.modeling.dtypes import dtype_name
from qlora_core.modeling.heap import Stream
from qlora_core.modeling.loading import quiet
from qlora_core.modeling.spool import Spool
from qlora_core.modeling.weights import ModelWeights, Weights

BLOCK = 64
"""Weights that share a scale in 4 bits."""

OnLayer = Callable[[int, int, str], None]
"""Called after each layer with (done, total, name)."""


@dataclass(frozen=True)
class Quantized:
    """What quantising did."""

    layer_errors: dict[str, float]
    """RMS(dequantised - original) / RMS(original) of each layer [dimensionless]."""
    num_parameters: int
    num_quantized_parameters: int
    left_whole: tuple[str, ...]
    """Linear layers left unquantised because of their shape."""
    num_stacked_parameters: int = 0
    """Weights of several experts in one tensor: no linear layers, so left unquantised as well."""


def quantize_model(
    model: PreTrainedModel,
    config: QuantizationConfig,
    compute_dtype: torch.dtype,
    on_layer: OnLayer,
) -> Quantized:
    """Quantise ``model`` in place; whatever stays unquantised is cast to ``compute_dtype``.

    Raises:
        ConfigError: `quantization.skip` names a module that is not there.
        ModelError: A weight is not finite, or the model has no linear layer.
    """
    quantizer = _Quantizer(model, config, compute_dtype, on_layer)
    for name in quantizer.chosen:
        own = dict(model.get_submodule(name).named_parameters(recurse=False))
        model.set_submodule(name, quantizer.quantized(name, own))
        quantizer.tell(name)
    return quantizer.result()


def quantize_streamed(
    skeleton: PreTrainedModel,
    weights: Weights,
    config: QuantizationConfig,
    compute_dtype: torch.dtype,
    on_layer: OnLayer,
    spool: Spool,
) -> Quantized:
    """Quantise a model of which no more than one module's weights are ever in memory.

    The same as `quantize_model`, bit for bit; but what is made goes to ``spool``, and ``skeleton``
    is left without linear layers where they were quantised.

    Args:
        skeleton: The model on the meta device.
        weights: Its weights, under the names of its parameters.
        config: As in `quantize_model`.
        compute_dtype: As in `quantize_model`.
        on_layer: Called after each layer that is quantised.
        spool: Takes all tensors of the checkpoint.

    Raises:
        ConfigError: `quantization.skip` names a module that is not there.
        ModelError: A weight is not finite, or the model has no linear layer.
    """
    quantizer = _Quantizer(skeleton, config, compute_dtype, on_layer)
    names = set(ModelWeights(skeleton).infos())  # tied weights once
    stream = Stream()
    for module_name, module in list(skeleton.named_modules()):
        prefix = f"{module_name}." if module_name else ""
        kinds = {
            prefix + name: parameter.dtype
            for name, parameter in module.named_parameters(recurse=False)
            if prefix + name in names
        }
        buffers = {prefix + name for name, _ in module.named_buffers(recurse=False)} & names
        own = {name: weights.read(name).to(dtype) for name, dtype in kinds.items()}
        stream.passed(sum(tensor.nbytes for tensor in own.values()))
        if module_name in quantizer.chosen:
            plain = {name.removeprefix(prefix): tensor for name, tensor in own.items()}
            own = quantizer.quantized(module_name, plain).state_dict(prefix=prefix)
            skeleton.set_submodule(module_name, nn.Identity())
            quantizer.tell(module_name)
        else:
            own = {name: _as_computed(tensor, compute_dtype) for name, tensor in own.items()}
        own |= {name: weights.read(name) for name in buffers}  # in the dtype they are stored in
        for name, tensor in own.items():
            spool.add(name, tensor)
    return quantizer.result()


class _Quantizer:
    """Quantises one layer after the other, and counts.

    Args:
        model: Whole, or a skeleton on the meta device.
        config: What to quantise, and how.
        compute_dtype: What it is dequantised to.
        on_layer: Called by `tell`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: QuantizationConfig,
        compute_dtype: torch.dtype,
        on_layer: OnLayer,
    ) -> None:
        self.chosen, self._left_whole = layers_to_quantize(model, config)
        self._model, self._config, self._compute_dtype = model, config, compute_dtype
        self._on_layer = on_layer
        self._num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self._num_stacked = _num_stacked(model)
        self._num_quantized = 0
        self._errors: dict[str, float] = {}

    def quantized(self, name: str, own: Mapping[str, Tensor]) -> nn.Module:
        """Return what shall take the place of the layer ``name``, whose tensors are ``own``."""
        layer = self._model.get_submodule(name)
        made, self._errors[name] = _quantized(name, layer, own, self._config, self._compute_dtype)
        self._num_quantized += own["weight"].numel()
        return made

    def tell(self, name: str) -> None:
        """Say that the layer ``name`` is done."""
        self._on_layer(len(self._errors), len(self.chosen), name)

    def result(self) -> Quantized:
        """Note in the model how it is stored now; return what was done."""
        _describe(self._model, self._config, self._compute_dtype, is_quantized=bool(self.chosen))
        return Quantized(
            layer_errors=self._errors,
            num_parameters=self._num_parameters,
            num_quantized_parameters=self._num_quantized,
            left_whole=self._left_whole,
            num_stacked_parameters=self._num_stacked,
        )


def _as_computed(tensor: Tensor, compute_dtype: torch.dtype) -> Tensor:
    return tensor.to(compute_dtype) if tensor.is_floating_point() else tensor


def layers_to_quantize(
    model: PreTrainedModel, config: QuantizationConfig
) -> tuple[list[str], tuple[str, ...]]:
    """Return the names of the layers to quantise, and of those whose shape forbids it.

    A block of 64 weights that spans two rows is dequantised wrongly by bitsandbytes' CPU kernels
    (0.50.2: up to three times the noise), so in 4 bits rows must hold whole blocks.

    Raises:
        ConfigError: `quantization.skip` names a module that is not there.
        ModelError: Nothing is left to quantise.
    """
    known = [name for name, _ in model.named_modules()]
    for skip in config.skip:
        if skip != "lm_head" and not any(_is_within(name, skip) for name in known):
            raise ConfigError(
                f"quantization.skip: {skip!r} matches no module of this model.",
                fix="Name modules by their endings, such as lm_head or mlp.down_proj.",
            )
    if config.method == "none":
        return [], ()
    head = model.get_output_embeddings()
    wanted = {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and module is not head
        and not any(_is_within(name, skip) for skip in config.skip)
    }
    whole_rows = 1 if config.method == "int8" else BLOCK
    chosen = [name for name, module in wanted.items() if _row_length(module) % whole_rows == 0]
    if not chosen:
        raise ModelError(
            f"{type(model).__name__} has no linear layer to quantise: {len(wanted)} are left after "
            f"quantization.skip, none of them with rows of whole blocks of {whole_rows}.",
            fix="Choose quantization.method=none, or skip less.",
        )
    return chosen, tuple(name for name in wanted if name not in chosen)


def _num_stacked(model: nn.Module) -> int:
    """Return how many weights lie in tensors of more than two dimensions, convolutions apart."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return sum(
        parameter.numel()
        for module in model.modules()
        if not isinstance(module, convolutions)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() > 2
    )


def dequantized(layer: Any) -> Tensor:
    """Return what a linear layer's weight stands for, float32, whatever it is stored as."""
    weight: Tensor = layer.weight
    if isinstance(weight, Params4bit):
        full: Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        return full.float()
    if isinstance(weight, Int8Params):
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        full = bnb.functional.int8_vectorwise_dequant(weight.data, scales)
        return full.float()
    return weight.detach().float()


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    spool: Spool | None = None,
) -> None:
    """Write weights, configuration and tokenizer; the same model makes the same bytes.

    Args:
        model: A whole model, or what `quantize_streamed` left of one.
        tokenizer: Its tokenizer.
        folder: Where the files go.
        spool: Where the weights are, if they are not in the model.

    transformers writes down where a tokenizer and a model came from; that is left out, as it says
    nothing about them and differs between machines.

    Raises:
        StoreError: There is no room, say.
    """
    model.config._name_or_path = ""
    if hasattr(model.config, "_model_name_or_path"):
        del model.config._model_name_or_path
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    with quiet(), storing(folder):
        if spool is None:
            model.save_pretrained(folder)
        else:
            model.save_pretrained(folder, state_dict={})  # all that is no weight
            spool.write(folder)
        tokenizer.save_pretrained(folder)


def stored_bytes(folder: Path) -> int:
    """Return the bytes of all tensors in a folder's safetensors files, without their headers."""
    return sum(_tensor_bytes(path) for path in folder.glob("*.safetensors"))


def _quantized(
    name: str,
    layer: Any,
    own: Mapping[str, Tensor],
    config: QuantizationConfig,
    compute_dtype: torch.dtype,
) -> tuple[nn.Module, float]:
    """Return a quantised layer for the place of ``layer``, and its relative error.

    Args:
        name: Of the layer, for the message.
        layer: What kind it is.
        own: Its weight, and its bias if it has one.
        config: How to quantise.
        compute_dtype: What it is dequantised to.
    """
    original_OI: Tensor = own["weight"].detach().float()
    if isinstance(layer, Conv1D):  # GPT-2's linear layer, which stores (I, O)
        original_OI = original_OI.T.contiguous()
    make = _int8_layer if config.method == "int8" else _four_bit_layer
    bias = own.get("bias")
    bias = None if bias is None else bias.detach().to(compute_dtype)
    made = make(original_OI, bias, config, compute_dtype)
    error = relative_error(dequantized(made), original_OI)
    if not math.isfinite(error):
        raise ModelError(
            f"The weight of {name} holds NaN or infinity.",
            fix="The checkpoint is damaged or was trained to overflow; use another one.",
        )
    return made.train(layer.training), error


def relative_error(approximate: Tensor, original: Tensor) -> float:
    """Return RMS(approximate - original) / RMS(original), 0 where both are zero."""
    noise, signal = (approximate - original).norm().item(), original.norm().item()
    return noise / signal if noise else 0.0


def _four_bit_layer(
    weight_OI: Tensor, bias: Tensor | None, config: QuantizationConfig, compute_dtype: torch.dtype
) -> Linear4bit:
    num_out, num_in = weight_OI.shape
    layer = Linear4bit(num_in, num_out, bias is not None, compute_dtype, device="meta")
    weight = Params4bit(
        weight_OI,
        requires_grad=False,
        compress_statistics=config.double,
        quant_type=config.method,
        module=layer,
    )
    layer.weight = weight.to("cpu")  # bitsandbytes quantises when a weight is moved
    layer.weight.quant_state.dtype = compute_dtype
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _int8_layer(
    weight_OI: Tensor, bias: Tensor | None, _config: QuantizationConfig, _dtype: torch.dtype
) -> Linear8bitLt:
    num_out, num_in = weight_OI.shape
    layer = Linear8bitLt(
        num_in, num_out, bias is not None, has_fp16_weights=False, threshold=6.0, device="meta"
    )
    layer.weight = Int8Params(weight_OI, requires_grad=False).to("cpu")
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _describe(
    model: PreTrainedModel,
    config: QuantizationConfig,
    compute_dtype: torch.dtype,
    *,
    is_quantized: bool,
) -> None:
    """Cast what was left unquantised, and note what `from_pretrained` must know of both."""
    for parameter in model.parameters():
        parameter.data = _as_computed(parameter.data, compute_dtype)
    model.config.dtype = compute_dtype
    if is_quantized:
        kept = [name for name, m in model.named_modules() if type(m) is nn.Linear]
        kept += [name for name, m in model.named_modules() if isinstance(m, Conv1D)]
        model.config.quantization_config = _stored_as(config, kept, compute_dtype)


def _stored_as(
    config: QuantizationConfig, kept: list[str], compute_dtype: torch.dtype
) -> BitsAndBytesConfig:
    """Return what builds the same layers again; those that were kept stay as they are."""
    if config.method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.method,
        bnb_4bit_use_double_quant=config.double,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=kept,
    )


def stored_quantization(config: Any) -> QuantizationConfig:
    """Return how a saved base was quantised: what `_stored_as` wrote down, read back.

    Args:
        config: Its transformers configuration, as `loading.load_saved_config` returns it.
    """
    stored = dict(getattr(config, "quantization_config", None) or {})
    found: dict[str, Any] = {"method": "none", "compute_dtype": dtype_name(config.dtype)}
    if stored.get("load_in_8bit"):
        found["method"] = "int8"
    if stored.get("load_in_4bit"):
        found["method"] = stored["bnb_4bit_quant_type"]
        found["double"] = stored["bnb_4bit_use_double_quant"]
    if kept := stored.get("llm_int8_skip_modules"):
        found["skip"] = kept
    return QuantizationConfig.model_validate(found)


def _row_length(layer: Any) -> int:
    return int(layer.nx if isinstance(layer, Conv1D) else layer.in_features)


def _is_within(name: str, module: str) -> bool:
    """Say whether ``name`` is ``module`` or lies below it, wherever that begins in the tree."""
    return f".{module}." in f".{name}."


def _tensor_bytes(path: Path) -> int:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    return int(max(entry["data_offsets"][1] for entry in entries))
