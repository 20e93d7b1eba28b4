"""Fold a trained adapter into its base weights, tensor by tensor, and write a plain checkpoint.

A QLoRA adapter learns against the *dequantised* 4-bit base, not the 16-bit weights it came from;
folded into those it meets weights it never saw. So a merge names its base (`Weights`), and what it
cost is measured afterwards (`qlora_core.evaluation.parity`). Every sum is made in float32 and
rounded once, when it is written.

Dims: O out features, I in features, R adapter rank.
Source: Hu et al. 2021, arXiv:2106.09685, sec. 4.1; Dettmers et al. 2023, arXiv:2305.14314, eq. 5;
rank-stabilised scaling: Kalajdzievski 2023, arXiv:2312.03732; DoRA: Liu et al. 2024,
arXiv:2402.09353, eq. 5.
"""

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from qlora_core.errors import ArtifactError, ModelError
from qlora_core.modeling.heap import Stream
from qlora_core.modeling.weights import TensorInfo, Weights, Written, write_checkpoint

_PEFT_PREFIX = "base_model.model."
_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_UNSUPPORTED: dict[str, object] = {
    "alpha_pattern": {},
    "rank_pattern": {},
    "modules_to_save": None,
    "bias": "none",
}
_DTYPE_KEYS = ("torch_dtype", "dtype")


def merge_lora(base_OI: Tensor, a_RI: Tensor, b_OR: Tensor, *, scaling: float) -> Tensor:
    """Return ``base + scaling * b @ a``, summed in float32.

    Args:
        base_OI: Base weight, dequantised or original, any float dtype; left unchanged.
        a_RI: Down projection.
        b_OR: Up projection.
        scaling: alpha / R, or alpha / sqrt(R) with rsLoRA [dimensionless].

    Returns:
        A new (O, I) float32 tensor.

    Raises:
        ArtifactError: The shapes do not chain: this adapter has another base.
    """
    chain = (b_OR.shape[0], a_RI.shape[1])
    if b_OR.shape[1] != a_RI.shape[0] or tuple(base_OI.shape) != chain:
        raise ArtifactError(
            f"an adapter of {tuple(b_OR.shape)} @ {tuple(a_RI.shape)} does not fit a weight of "
            f"{tuple(base_OI.shape)}: it was trained on another base."
        )
    merged_OI: Tensor = torch.addmm(base_OI.float(), b_OR.float(), a_RI.float(), alpha=scaling)
    return merged_OI


def normalize_dora(merged_OI: Tensor, magnitude_O: Tensor) -> Tensor:
    """Return ``magnitude * merged / ||merged||``, each output's weights of norm ``magnitude``.

    Args:
        merged_OI: Base plus scaled update, float32 (the directions of DoRA).
        magnitude_O: Learned length of each row.
    """
    norm_O = torch.linalg.vector_norm(merged_OI, dim=1)
    scaled_OI: Tensor = merged_OI * (magnitude_O.float() / norm_O)[:, None]
    return scaled_OI


@dataclass(frozen=True)
class LayerUpdate:
    """What the adapter adds to one linear layer."""

    a_RI: Tensor
    b_OR: Tensor
    magnitude_O: Tensor | None = None
    """Row lengths, with DoRA."""


@dataclass(frozen=True)
class AdapterUpdates:
    """An adapter as merging needs it."""

    layers: Mapping[str, LayerUpdate]
    """By the name of the weight that each one changes."""
    alpha: float
    is_rslora: bool
    is_transposed: bool
    """The base stores (I, O), as GPT-2 does."""

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """Return the merged weight in float32, or ``weight`` itself where nothing was learned."""
        update = self.layers.get(name)
        if update is None:
            return weight
        base_OI = weight.T if self.is_transposed else weight
        rank = update.a_RI.shape[0]
        scaling = self.alpha / (math.sqrt(rank) if self.is_rslora else rank)
        merged_OI = merge_lora(base_OI, update.a_RI, update.b_OR, scaling=scaling)
        if update.magnitude_O is not None:
            merged_OI = normalize_dora(merged_OI, update.magnitude_O)
        return merged_OI.T if self.is_transposed else merged_OI


def read_updates(folder: Path) -> AdapterUpdates:
    """Read an adapter in PEFT's format.

    Raises:
        ArtifactError: The files hold something other than complete LoRA layers.
        ModelError: The adapter uses something that cannot be folded into weights here.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for name, plain in _UNSUPPORTED.items():
        if config.get(name) and config[name] != plain:
            raise ModelError(
                f"the adapter has {name}={config[name]!r}, which merging does not know.",
                fix=f"Train with {name}={plain!r}, or set merge.enabled=false.",
            )
    return AdapterUpdates(
        layers=_read_layers(folder / "adapter_model.safetensors"),
        alpha=float(config["lora_alpha"]),
        is_rslora=bool(config.get("use_rslora")),
        is_transposed=bool(config.get("fan_in_fan_out")),
    )


def write_merged(
    base: Weights,
    updates: AdapterUpdates,
    out: Path,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
    on_tensor: Callable[[int, int], None],
) -> Written:
    """Write ``base`` with ``updates`` folded in; one tensor is in memory at a time.

    Args:
        base: Where the weights come from.
        updates: The adapter.
        out: Folder for the safetensors files; must exist.
        dtype: Of all floating-point tensors as written.
        max_shard_bytes: Largest file.
        on_tensor: Called with (tensors written, tensors in all).

    Raises:
        ArtifactError: The adapter has layers that the base lacks, or a merged value is not finite.
    """
    stored = base.infos()
    _require_targets(updates, stored)
    infos = {name: _as_written(info, dtype) for name, info in stored.items()}
    position = {name: i for i, name in enumerate(infos, start=1)}
    stream = Stream()

    def merged(name: str) -> Tensor:
        stream.passed(stored[name].size_bytes)  # before this one, the last has been let go of
        tensor = updates.apply(name, base.read(name)).to(infos[name].dtype)
        _require_finite(name, tensor)
        on_tensor(position[name], len(infos))
        return tensor

    return write_checkpoint(out, infos, merged, max_shard_bytes=max_shard_bytes)


def copy_companions(base_folder: Path, out: Path, *, dtype: torch.dtype) -> None:
    """Copy all that a checkpoint holds beside weights: config, tokenizer, chat template.

    The config loses its `quantization_config` and gets the dtype of the merged weights.
    """
    for path in sorted(base_folder.iterdir()):
        is_weights = ".safetensors" in path.name
        if path.is_file() and not is_weights and path.name != "config.json":
            shutil.copyfile(path, out / path.name)
    config = json.loads((base_folder / "config.json").read_text(encoding="utf-8"))
    for key in ("quantization_config", *_DTYPE_KEYS):
        config.pop(key, None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (out / "config.json").write_text(text + "\n", encoding="utf-8")


def _read_layers(path: Path) -> dict[str, LayerUpdate]:
    parts: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    with safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118  # not a dict
            layer, part = _split(name)
            parts[layer][part] = file.get_tensor(name)
    broken = sorted(layer for layer, found in parts.items() if not {_A, _B} <= set(found))
    if broken or not parts:
        raise ArtifactError(f"{path} lacks lora_A or lora_B for: {', '.join(broken) or 'all'}.")
    return {
        f"{layer}.weight": LayerUpdate(found[_A], found[_B], found.get(_MAGNITUDE))
        for layer, found in parts.items()
    }


def _split(name: str) -> tuple[str, str]:
    for part in (_A, _B, _MAGNITUDE):
        if name.startswith(_PEFT_PREFIX) and name.endswith(part):
            return name.removeprefix(_PEFT_PREFIX).removesuffix(part), part
    raise ArtifactError(f"the adapter holds {name!r}, which is no part of a LoRA layer.")


def _require_targets(updates: AdapterUpdates, stored: Mapping[str, TensorInfo]) -> None:
    missing = sorted(set(updates.layers) - set(stored))
    if missing:
        raise ArtifactError(
            f"the base has no weight {missing[0]!r} ({len(missing)} such layers of the adapter).",
            why="The adapter was trained on another base, or it changes a weight that is tied to "
            "another one (an lm_head that shares the embedding).",
            fix="Leave tied layers out of adapter.targets, e.g. adapter.targets=all-linear.",
        )


def _as_written(info: TensorInfo, dtype: torch.dtype) -> TensorInfo:
    return TensorInfo(info.shape, dtype) if info.dtype.is_floating_point else info


def _require_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ArtifactError(
            f"{name} is not finite after merging to {tensor.dtype}.",
            why="The adapter holds NaN, or values leave the range of the dtype (float16: 65504).",
            fix="Use merge.dtype=bfloat16; if that fails too, train with a lower learning rate.",
        )
