"""Stage `quantize_base`: from the model as published to the frozen base everybody loads.

After it, no stage and no worker opens the 16-bit model again (merging onto the original weights
apart). The model passes through memory one module at a time, so a model that is larger than memory
can be quantised. Where its weights cannot be read one at a time (a GGUF file, say) it is loaded
whole, and that is said; peak memory is then the original model plus one layer, as each layer's
float weight is freed once its quantised one stands in its place. Both ways make the same bytes.
"""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_core.artifacts import QuantizedBase
from qlora_core.config import ModelConfig, QuantizationConfig
from qlora_core.errors import ModelError
from qlora_core.modeling.dtypes import dtype_name, present_device_type, resolve_compute_dtype
from qlora_core.modeling.loading import (
    context_length_of,
    load_original,
    load_skeleton,
    load_tokenizer,
)
from qlora_core.modeling.quantization import (
    BLOCK,
    Quantized,
    quantize_model,
    quantize_streamed,
    save_checkpoint,
    stored_bytes,
)
from qlora_core.modeling.spool import open_spool
from qlora_core.ports import Context, stage
from qlora_core.sources import Source

NAME = "quantize_base"


@stage(
    NAME,
    version=1,
    facts=QuantizedBase,
    packages=("torch", "transformers", "bitsandbytes"),
)
def quantize_base(
    ctx: Context,
    model: ModelConfig,
    quantization: QuantizationConfig,
    source: Source,
    template: Source | None,
) -> QuantizedBase:
    """Quantise the model and save it with its tokenizer to ``ctx.out/model``.

    Args:
        ctx: Where to write, and whom to tell.
        model: The model as the recipe names it.
        quantization: How to store it; a `compute_dtype` of `auto` means this machine's device.
        source: Where its files are.
        template: A Jinja file to use instead of the tokenizer's own chat template.

    Raises:
        ModelError: The model is refused, damaged, or does not fit its tokenizer.
        ConfigError: `quantization.skip` names a module that is not there.
        StoreError: The checkpoint cannot be written.
    """
    compute_dtype = resolve_compute_dtype(quantization.compute_dtype, present_device_type())
    tokenizer = load_tokenizer(model, source, template)
    ctx.progress.say(NAME, f"opening {source.uri}")

    def on_layer(done: int, total: int, name: str) -> None:
        ctx.progress.update(NAME, done, total, name)

    folder = ctx.out / "model"
    found = load_skeleton(model, source)
    if found is not None:
        loaded, weights = found
        _check_vocabulary(loaded, tokenizer)
        with open_spool(ctx.scratch) as spool:
            result = quantize_streamed(
                loaded, weights, quantization, compute_dtype, on_layer, spool
            )
            save_checkpoint(loaded, tokenizer, folder, spool)
    else:
        ctx.progress.say(NAME, "its weights cannot be read one at a time: it is loaded whole")
        loaded = load_original(model, source, None)
        _check_vocabulary(loaded, tokenizer)
        result = quantize_model(loaded, quantization, compute_dtype, on_layer)
        save_checkpoint(loaded, tokenizer, folder)
    return _facts(
        loaded, result, model, quantization.method, dtype_name(compute_dtype), stored_bytes(folder)
    )


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"The tokenizer knows {len(tokenizer)} tokens, but the model embeds only {rows}.",
            why="The tokens beyond have no embedding: text with them cannot be read.",
            fix="Use the tokenizer that belongs to this model, or resize the model's embeddings "
            "(model.resize_token_embeddings) and save it before.",
        )


def _facts(
    loaded: PreTrainedModel,
    result: Quantized,
    model: ModelConfig,
    method: str,
    compute_dtype: str,
    size_bytes: int,
) -> QuantizedBase:
    errors = result.layer_errors
    return QuantizedBase(
        method=method,
        architecture=type(loaded).__name__,
        source=f"{model.source}@{model.revision}" if model.revision else model.source,
        compute_dtype=compute_dtype,
        num_parameters=result.num_parameters,
        num_quantized_parameters=result.num_quantized_parameters,
        size_bytes=size_bytes,
        bits_per_parameter=8 * size_bytes / result.num_parameters,
        context_length=context_length_of(loaded.config),
        mean_relative_error=sum(errors.values()) / len(errors) if errors else 0.0,
        layer_errors=errors,
        tied_embeddings=bool(loaded.config.get_text_config().tie_word_embeddings),
        notes=_notes(model, method, result),
    )


def _notes(model: ModelConfig, method: str, result: Quantized) -> tuple[str, ...]:
    notes = []
    if model.source.lower().endswith(".gguf") and method != "none":
        notes.append(
            "The GGUF file is quantised itself: layer errors are against its dequantised weights."
        )
    if method == "int8":
        notes.append(
            "LLM.int8() rounds activations too, and computes outliers in float16; on a CPU "
            "bitsandbytes does so in evaluation but not in training."
        )
    if result.num_stacked_parameters:
        share = result.num_stacked_parameters / result.num_parameters
        notes.append(
            f"{share:.0%} of the parameters are experts stacked in one tensor, no linear layers: "
            "they are not quantised and get no adapter, so they need the memory of the compute "
            "dtype and stay as they are."
        )
    if left := result.left_whole:
        notes.append(
            f"{len(left)} linear layers are not quantised, as their rows are no multiple of "
            f"{BLOCK} weights: {', '.join(left[:3])}{', ...' if len(left) > 3 else ''}."
        )
    return tuple(notes)
