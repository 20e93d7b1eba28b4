"""A 4-bit model with random weights, made where it shall be, a layer at a time.

The model is built on the `meta` device, which holds nothing. Then each linear layer is drawn in 16
bits on the device, quantised and dropped before the next one; so a GPU never holds more than the
4-bit model and one layer. Weights are rounded to bfloat16 whatever is computed in, so the same seed
gives the same 4-bit model in float32 and in 16 bits.
"""

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.gpu.cases import SHAPES

_SPREAD = 0.02
_PAD = 0


def random_model(shape: str, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """Return a frozen NF4 model (double quantisation) that computes in ``dtype``."""
    config = LlamaConfig(**SHAPES[shape], pad_token_id=_PAD)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    generator = torch.Generator(device).manual_seed(seed)
    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer is not head:
            weight_OI = _drawn(layer.weight, generator).to(dtype)
            model.set_submodule(name, _four_bit(weight_OI, dtype))
    _fill(model, generator, dtype)
    base = model.model
    base.rotary_emb = type(base.rotary_emb)(config=config).to(device)
    model.tie_weights()
    model.is_loaded_in_4bit = True  # what PEFT asks for
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise RuntimeError(f"Parameters were left without memory: {left[:3]}")
    return model.requires_grad_(False).eval()


def num_multiplied(model: nn.Module) -> tuple[int, int]:
    """Return how many frozen weights a token is multiplied by: in layers, and in the head."""
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    num_body = sum(layer.in_features * layer.out_features for layer in layers)
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return int(num_body), int(head.weight.numel())


def _drawn(like: Tensor, generator: torch.Generator) -> Tensor:
    device = generator.device
    drawn = torch.empty(like.shape, dtype=torch.bfloat16, device=device)
    return drawn.normal_(0.0, _SPREAD, generator=generator)


def _four_bit(weight_OI: Tensor, dtype: torch.dtype) -> Linear4bit:
    num_out, num_in = weight_OI.shape
    layer = Linear4bit(num_in, num_out, bias=False, compute_dtype=dtype, device="meta")
    weight = Params4bit(
        weight_OI, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    )
    layer.weight = weight.to(weight_OI.device)  # bitsandbytes quantises when a weight is moved
    layer.support_avx512bf16_for_cpu = False
    return layer


def _fill(model: nn.Module, generator: torch.Generator, dtype: torch.dtype) -> None:
    """Give the embeddings random values and the norms ones."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                is_norm = parameter.dim() == 1
                value = _drawn(parameter, generator).to(dtype)
                filled = torch.ones_like(value) if is_norm else value
                setattr(module, name, nn.Parameter(filled, requires_grad=False))
