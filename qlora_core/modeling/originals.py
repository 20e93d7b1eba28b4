"""Open a model's original weights for merging, in bounded memory where their format allows it.

A folder or a cached hub model whose safetensors name the same tensors as our base is read tensor by
tensor. Two kinds are not: a GGUF file (other names, other quantisation) and checkpoints that
transformers renames while loading. Those are loaded whole, in float32, so that nothing is rounded
before the merge; the caller gets a note that says so.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from qlora_core.config import ModelConfig
from qlora_core.errors import ArtifactError
from qlora_core.modeling.loading import load_original
from qlora_core.modeling.weights import CheckpointWeights, ModelWeights, TensorInfo, Weights
from qlora_core.sources import Source


def open_original(
    model: ModelConfig, source: Source, like: Mapping[str, TensorInfo]
) -> tuple[Weights, list[str]]:
    """Return the original weights under the names of ``like``, and notes for the facts.

    Args:
        model: The recipe's model.
        source: Where it lies.
        like: Names and shapes of the base's tensors.

    Raises:
        ModelError: The original cannot be read.
        ArtifactError: It has other tensors than the base: it is another model.
    """
    streamed = _streamed(source, like)
    if streamed is not None:
        return streamed, []
    whole = ModelWeights(load_original(model, source, torch.float32))
    if not _same(whole.infos(), like):
        other = sorted(set(whole.infos()) ^ set(like))
        raise ArtifactError(
            f"the original {source.uri} and the quantised base have different tensors"
            f"{f', the first {other[0]!r}' if other else ' (shapes)'}.",
            fix="Use merge.onto=dequantized, which needs the base alone.",
        )
    size_gb = sum(info.size_bytes for info in whole.infos().values()) / 1e9
    return whole, [
        f"The original weights were loaded whole ({size_gb:.1f} GB in memory): "
        f"{source.uri} cannot be read tensor by tensor."
    ]


def _streamed(source: Source, like: Mapping[str, TensorInfo]) -> Weights | None:
    folder = _folder(source)
    if folder is None:
        return None
    try:
        weights = CheckpointWeights(folder)
        infos = weights.infos()
    except ArtifactError:
        return None  # not plain safetensors: load_original reads it, or says what is wrong
    return weights if _same(infos, like) else None


def _same(infos: Mapping[str, TensorInfo], like: Mapping[str, TensorInfo]) -> bool:
    shapes = {name: info.shape for name, info in infos.items()}
    return shapes == {name: info.shape for name, info in like.items()}


def _folder(source: Source) -> Path | None:
    if source.kind == "folder":
        return source.local()
    if source.kind == "file":
        return None
    from huggingface_hub import snapshot_download  # only hub models need the client
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        cached = snapshot_download(
            str(source.hub_id), revision=source.revision, local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None  # made on another machine: load_original downloads it
    return Path(cached)
