"""Open models and tokenizers: the person's original one, and the quantised base made from it.

Originals come as a hub id, a folder or a `.gguf` file, and are vetted before transformers opens
them (see `vetting`). The base comes as a 4-bit checkpoint that a stage of ours sealed, so every
worker and every evaluation reads 4-bit bytes and never the 16-bit model.

Two things would surprise a reader. transformers only *warns* when a checkpoint lacks a layer, and
starts that layer at random: here it is an error. And on a CPU with AVX512-BF16, bitsandbytes
repacks 4-bit weights in place at the first forward in eval mode and then multiplies in bfloat16
whatever the compute dtype: so the same base would answer differently on another CPU, and anything
that reads the packed bytes afterwards would read noise. `load_base` turns that off.
"""

import copy
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.gguf import read_gguf_metadata

from qlora_core.config import ModelConfig
from qlora_core.errors import ArtifactError, ModelError, QLoraError
from qlora_core.modeling.quiet import gguf_read_once
from qlora_core.modeling.quiet import quiet as quiet  # also found here
from qlora_core.modeling.vetting import vet_folder, vet_weights
from qlora_core.modeling.weights import CheckpointWeights, ModelWeights
from qlora_core.sources import Source

UNLIMITED_CONTEXT = 1 << 30
"""Context length [tokens] of models that state none, such as those with ALiBi positions."""

_INT8_LOGGER = "bitsandbytes.autograd._functions"
"""Warns in every layer of every forward that LLM.int8() rounds; the base's notes say it once."""

_TOKENIZER_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]


@dataclass(frozen=True)
class _Place:
    """Where transformers finds a model."""

    folder: Path
    gguf: str | None
    model: ModelConfig

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments every `from_pretrained` of this model needs."""
        options = {"trust_remote_code": self.model.trust_remote_code, "local_files_only": True}
        return options | ({"gguf_file": self.gguf} if self.gguf else {})


def load_tokenizer(
    model: ModelConfig, source: Source, template: Source | None
) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer, its chat template replaced by the Jinja file ``template``.

    Raises:
        ModelError: There is none, or it cannot be read.
    """
    place = _fetch(model, source, with_weights=False)
    with _said_our_way(model, "tokenizer"):
        if place.gguf:
            stat = (place.folder / place.gguf).stat()
            kept = _gguf_tokenizer(place, stat.st_size, stat.st_mtime_ns)
            tokenizer = copy.deepcopy(kept)  # callers change theirs
        else:
            tokenizer = AutoTokenizer.from_pretrained(place.folder, **place.options())
    if template is not None:
        tokenizer.chat_template = template.local().read_text("utf-8")
    return tokenizer


@functools.lru_cache(maxsize=1)
def _gguf_tokenizer(place: _Place, _size: int, _modified: int) -> PreTrainedTokenizerBase:
    """Read a tokenizer out of a GGUF file: seconds, and several stages of a run ask for it."""
    with gguf_read_once():
        return AutoTokenizer.from_pretrained(place.folder, **place.options())


def context_length(model: ModelConfig, source: Source) -> int:
    """Return how many tokens the model can attend to, without loading its weights.

    Raises:
        ModelError: The model's configuration cannot be read.
    """
    place = _fetch(model, source, with_weights=False)
    with _said_our_way(model, "configuration"):
        if place.gguf:
            return _gguf_context_length(place.folder / place.gguf)
        config = AutoConfig.from_pretrained(place.folder, **place.options())
    return context_length_of(config)


def load_config(model: ModelConfig, source: Source) -> Any:
    """Return the model's transformers configuration, without loading its weights.

    Raises:
        ModelError: The model's configuration cannot be read.
    """
    place = _fetch(model, source, with_weights=False)
    with _said_our_way(model, "configuration"):
        return AutoConfig.from_pretrained(place.folder, **place.options())


def context_length_of(config: Any) -> int:
    """Return how many tokens a model with this transformers configuration can attend to."""
    stated = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(stated or UNLIMITED_CONTEXT)


def load_original(model: ModelConfig, source: Source, dtype: torch.dtype | None) -> PreTrainedModel:
    """Return the model as its author published it, on the CPU.

    A GGUF file is dequantised, and the marks of its format taken off, so that the model can be
    saved like any other.

    Args:
        model: The model as the recipe names it.
        source: Where its files are.
        dtype: Of every parameter; none: as stored, float32 for a GGUF file.

    Raises:
        ModelError: It is refused (see `vetting`), damaged or incomplete.
    """
    place = _fetch(model, source, with_weights=True)
    if place.gguf:
        # without `dequantize` transformers may keep the file's blocks and fetch a kernel for them
        unpack = GgufConfig(dequantize=True)
        asked: dict[str, Any] = {"dtype": dtype or torch.float32, "quantization_config": unpack}
    else:
        # transformers would raise over a wrong shape, in words that explain nothing
        asked = {"dtype": dtype or "auto", "use_safetensors": True, "ignore_mismatched_sizes": True}
    with _said_our_way(model, "model"), gguf_read_once():
        loaded, report = AutoModelForCausalLM.from_pretrained(
            place.folder, output_loading_info=True, **asked, **place.options()
        )
    _require_whole(model, report)
    return _plain(loaded)


def load_skeleton(
    model: ModelConfig, source: Source
) -> tuple[PreTrainedModel, CheckpointWeights] | None:
    """Return the model on the meta device, without its weights, and where to read them.

    Its parameters have the dtypes that `load_original` gives them. None where they cannot be read
    under their own names, one at a time: a GGUF file, code of the model's own, or weights that
    transformers renames or joins while it loads.

    Raises:
        ModelError: As in `load_original`.
    """
    place = _fetch(model, source, with_weights=True)
    if place.gguf or any(place.folder.glob("*.py")):
        return None
    try:
        weights = CheckpointWeights(place.folder)
        infos = weights.infos()
    except ArtifactError:
        return None  # transformers may know what it is, or says what is wrong with it
    state = {
        name: torch.empty(info.shape, dtype=info.dtype, device="meta")
        for name, info in infos.items()
    }
    with _said_our_way(model, "model"):
        config = AutoConfig.from_pretrained(place.folder, **place.options())
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config))
        # transformers takes tensors that are given only where no folder is
        skeleton, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=state,
            device_map={"": "meta"},
            dtype="auto",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        skeleton.generation_config = generation_config(place.folder)
    _require_whole(model, report)
    wanted = ModelWeights(skeleton).infos()
    is_plain = not getattr(skeleton, "_weight_conversions", None) and all(
        name in infos and infos[name].shape == info.shape for name, info in wanted.items()
    )
    return (skeleton, weights) if is_plain else None


def generation_config(folder: Path) -> GenerationConfig:
    """Return a model's own settings, or else what its configuration says of them.

    Args:
        folder: A transformers checkpoint.
    """
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )


def load_base(folder: Path, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Return a quantised base on ``device``: frozen, in eval mode.

    Args:
        folder: Files of a QuantizedBase artefact; the checkpoint lies in its `model/`.
        device: Where its weights shall lie.

    Raises:
        ArtifactError: The checkpoint cannot be read or is incomplete.
    """
    loaded = _load_saved(folder, device, "auto")
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if getattr(loaded, "is_loaded_in_8bit", False):
        logging.getLogger(_INT8_LOGGER).setLevel(logging.ERROR)
    return loaded


def load_merged(folder: Path, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Return a stand-alone model on ``device``: frozen, in eval mode.

    Args:
        folder: Files of a MergedModel artefact; the checkpoint lies in its `model/`.
        device: Where its weights shall lie; on a CPU they become float32, which holds 16-bit
            weights exactly and multiplies fast.

    Raises:
        ArtifactError: The checkpoint cannot be read or is incomplete.
    """
    on_cpu = torch.device(device).type == "cpu"
    return _load_saved(folder, device, torch.float32 if on_cpu else "auto")


def brings_code(folder: Path) -> bool:
    """Say whether the model in ``folder/model`` brings Python code, as a recipe trusted it.

    Such a model is built to be loaded, and never only to be counted.
    """
    return any((folder / "model").glob("*.py"))


def load_saved_config(folder: Path) -> Any:
    """Return the transformers configuration that lies in ``folder/model``.

    Raises:
        ArtifactError: It cannot be read.
    """
    place = folder / "model"
    with _said_as_artifact(folder):
        return AutoConfig.from_pretrained(
            place, local_files_only=True, trust_remote_code=brings_code(folder)
        )


def load_saved_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer that lies in ``folder/model``.

    Raises:
        ArtifactError: It cannot be read.
    """
    with _said_as_artifact(folder):
        return AutoTokenizer.from_pretrained(
            folder / "model",
            local_files_only=True,
            trust_remote_code=brings_code(folder),
        )


def _load_saved(
    folder: Path, device: torch.device | str, dtype: torch.dtype | str
) -> PreTrainedModel:
    """Load a checkpoint that a stage saved; it brings code only where the recipe trusted that."""
    place = folder / "model"
    with _said_as_artifact(folder):
        loaded, report = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=dtype,
            device_map={"": torch.device(device)},
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=brings_code(folder),
            output_loading_info=True,
        )
    if absent := _absent_weights(report):
        raise ArtifactError(f"{place} lacks {len(absent)} weights, the first {absent[0]!r}.")
    frozen: PreTrainedModel = loaded.requires_grad_(False).eval()
    return frozen


def _fetch(model: ModelConfig, source: Source, *, with_weights: bool) -> _Place:
    """Find the model's files, download those of a hub model, and vet them."""
    if source.kind == "file":
        path = source.local()
        if path.suffix.lower() != ".gguf":
            raise ModelError(
                f"model.source={model.source!r} is a {path.suffix or 'bare'} file.",
                fix="A model is a folder, a hub id or a .gguf file.",
            )
        return _Place(path.parent, path.name, model)
    folder = source.local() if source.kind == "folder" else _download(model, source, with_weights)
    config = vet_folder(folder, model)
    if with_weights:
        vet_weights(folder, config, model)
    return _Place(folder, None, model)


def _download(model: ModelConfig, source: Source, with_weights: bool) -> Path:
    """Bring a hub model's files here, or find them in the hub's cache."""
    from huggingface_hub import snapshot_download

    wanted = _TOKENIZER_FILES + (["model*.safetensors"] if with_weights else [])
    wanted += ["*.py"] if model.trust_remote_code else []
    with _said_our_way(model, "download"):
        folder = snapshot_download(
            str(source.hub_id),
            revision=source.revision,
            allow_patterns=wanted,
            ignore_patterns=["*/*"],
        )
    return Path(folder)


@contextmanager
def _said_our_way(model: ModelConfig, what: str) -> Iterator[None]:
    """Turn what foreign loaders raise into a ModelError; transformers lets them all through."""
    try:
        with quiet():
            yield
    except (QLoraError, MemoryError):
        raise
    except Exception as error:
        raise ModelError(
            f"The {what} of model.source={model.source!r} cannot be loaded.",
            why=f"{type(error).__name__}: {_first_lines(error)}",
            fix="Check model.source and model.revision, and that the files are whole; a hub model "
            "needs the network once (and HF_TOKEN if it is gated).",
        ) from error


@contextmanager
def _said_as_artifact(folder: Path) -> Iterator[None]:
    try:
        with quiet():
            yield
    except MemoryError:
        raise
    except Exception as error:
        raise ArtifactError(
            f"The model in {folder / 'model'} cannot be loaded.",
            why=f"{type(error).__name__}: {_first_lines(error)}",
            fix="Remove that folder and run again: it will be made anew.",
        ) from error


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _gguf_context_length(path: Path) -> int:
    metadata, _ = read_gguf_metadata(str(path))  # 1 s less than building a configuration
    stated = metadata.get(f"{metadata['general.architecture']}.context_length")
    return int(stated or UNLIMITED_CONTEXT)


def _require_whole(model: ModelConfig, report: dict[str, Any]) -> None:
    if absent := _absent_weights(report):
        raise ModelError(
            f"model.source={model.source!r} is incomplete: {len(absent)} weights are missing or of "
            f"the wrong shape, the first {absent[0]!r}.",
            why="transformers would start them at random.",
            fix="Download the model again; if its config.json was edited, give it the sizes of the "
            "weights (vocab_size and others) back.",
        )


def _absent_weights(report: dict[str, Any]) -> list[str]:
    wrong_shape = [entry[0] for entry in report.get("mismatched_keys", ())]
    return sorted({*report["missing_keys"], *wrong_shape})


def _plain(loaded: PreTrainedModel) -> PreTrainedModel:
    """Take off a GGUF's marks, with which `save_pretrained` refuses to work."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(loaded, name):
            delattr(loaded, name)
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    return loaded
