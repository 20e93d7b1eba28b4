"""What is refused before a stranger's model is opened, read from its plain JSON alone.

A checkpoint can carry code: as pickled weights, as Python files named by `auto_map`, or as an
attention "implementation" that is in truth a kernel on a hub (``someone/kernel``), which even an
explicit ``attn_implementation="sdpa"`` does not override. transformers decides about these while it
opens the model, in several places and with other defaults in each release; so they are looked for
here first, on bytes that nothing has acted on yet. The other refusals are about models that would
open, and then train the wrong thing: an encoder, weights that are quantised already, a checkpoint
of which some layers are missing and would silently start at random.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qlora_core.config import ModelConfig
from qlora_core.errors import ModelError

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def vet_folder(folder: Path, model: ModelConfig) -> dict[str, Any]:
    """Return the folder's `config.json` when nothing in it would run code of the model's author.

    Raises:
        ModelError: It has no readable `config.json`, or one that asks for foreign code.
    """
    config = read_json(folder / "config.json", model)
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            _refuse_foreign_code(read_json(folder / name, model), name, model)
    return config


def vet_weights(folder: Path, config: dict[str, Any], model: ModelConfig) -> None:
    """Check that the folder holds 16- or 32-bit safetensors of a causal language model.

    Raises:
        ModelError: It does not; the error says what it holds instead.
    """
    _refuse_quantized(config, model)
    _refuse_other_architectures(config, model)
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"model.source={model.source!r} holds pickled weights: {', '.join(pickles[:3])}.",
            why="Opening a pickle can run any code, so only safetensors are read.",
            fix="Convert it once where you trust it: AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(folder), and give that folder.",
        )
    raise ModelError(
        f"model.source={model.source!r} holds no weights: no *.safetensors in {folder}.",
        fix="Give a folder with config.json, model.safetensors and tokenizer files.",
    )


def read_json(path: Path, model: ModelConfig) -> dict[str, Any]:
    """Return a JSON object from a model's folder.

    Raises:
        ModelError: There is no such file, or it is not a JSON object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"model.source={model.source!r} has no {path.name}.",
            fix="Give a transformers folder (config.json, model.safetensors, tokenizer.json), a "
            ".gguf file or a hub id.",
        ) from None
    except ValueError as error:
        raise ModelError(
            f"{path.name} of model.source={model.source!r} is not JSON: {error}.",
            fix="Download the model again.",
        ) from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} of model.source={model.source!r} is not a JSON object.")
    return value


def _refuse_foreign_code(config: dict[str, Any], name: str, model: ModelConfig) -> None:
    for key, value in _entries(config):
        if key == "auto_map" and value and not model.trust_remote_code:
            raise ModelError(
                f"model.source={model.source!r} brings Python code: {name} has auto_map.",
                why="Loading it would run that code on this machine.",
                fix="Read the code, then set model.trust_remote_code=true and model.revision to "
                "the commit you read; or choose a model that transformers knows.",
            )
        if key.endswith("_implementation") and "/" in str(value):
            raise ModelError(
                f"model.source={model.source!r} asks for a kernel from a hub: {name} has "
                f"{key}={value!r}.",
                why="That downloads and runs compiled code that the recipe does not name.",
                fix=f"Take {key} out of {name} (transformers then uses its own, sdpa).",
            )


def _entries(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key), item
            yield from _entries(item)
    elif isinstance(value, list):
        for item in value:
            yield from _entries(item)


def _refuse_quantized(config: dict[str, Any], model: ModelConfig) -> None:
    for key, value in _entries(config):
        if key in ("quantization_config", "compression_config") and value:
            method = value.get("quant_method", "unknown") if isinstance(value, dict) else value
            raise ModelError(
                f"model.source={model.source!r} is quantised already (quant_method={method}).",
                why="Quantising it a second time would add noise to noise.",
                fix="Give the 16-bit model it was made from, and choose quantization.method here.",
            )


def _refuse_other_architectures(config: dict[str, Any], model: ModelConfig) -> None:
    if model.trust_remote_code and "auto_map" in config:
        return  # its author says what it is
    kind = str(config.get("model_type", ""))
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, ())
    heads = {known} if isinstance(known, str) else set(known)
    named = set(config.get("architectures") or heads)
    if named & heads and not config.get("is_encoder_decoder", False):
        return
    found = ", ".join(sorted(named)) or f"model_type={kind!r}"
    raise ModelError(
        f"model.source={model.source!r} is not a causal language model ({found}).",
        why="Chat fine-tuning needs a model that writes text from left to right; encoders (BERT), "
        "encoder-decoders (T5) and classifiers do not.",
        fix="Choose one whose config.json names an architecture such as LlamaForCausalLM.",
    )
