"""Attach a LoRA adapter to a frozen base, and move its weights in and out.

The layers are PEFT's, so whatever else reads PEFT reads our adapters. What PEFT leaves open is
decided here: adapter weights are always float32 masters (in bfloat16 most small updates round to
nothing, and a resumed run differs from an uninterrupted one); the same seed gives the same adapter
without moving anybody's random state; loading is strict, as PEFT only warns about missing tensors;
and the same weights make the same bytes, as artefacts are compared by digest.

The output head never gets an adapter: it is often tied to the embeddings, where an update would
change both, and training computes it only at supervised positions.

Dims: R adapter rank, I in features, O out features.
Source: Hu et al. 2021, arXiv:2106.09685, sec. 4.1; Dettmers et al. 2023, arXiv:2305.14314, sec. 4.
"""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_core.config import AdapterConfig
from qlora_core.errors import ArtifactError, ConfigError, ModelError, storing
from qlora_core.modeling.loading import quiet

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_NAME = "default"  # PEFT's name of a model's first adapter
_SEEDING = threading.Lock()  # random state is one for all threads


def attach_adapter(model: PreTrainedModel, config: AdapterConfig, seed: int) -> PeftModel:
    """Put a new adapter on ``model``'s linear layers; until trained, it changes nothing.

    Args:
        model: A frozen base; its linear layers are replaced in place.
        config: Rank, scaling, targets and start of the adapter.
        seed: Of A's random start (and B's, for `orthogonal`).

    Returns:
        The same model inside PEFT's; only the adapter requires gradients.

    Raises:
        ModelError: PEFT cannot adapt these layers of this architecture.
        ConfigError: The targets match no layer, the start does not suit the rank, or DoRA is asked
            for on an 8-bit base.
    """
    targets = target_endings(model, config)
    if config.init == "orthogonal" and config.rank % 2:
        raise ConfigError(
            f"adapter.init=orthogonal needs an even adapter.rank, not {config.rank}.",
            fix=f"Try adapter.rank={config.rank + 1}.",
        )
    _refuse_dora_on_int8(model, config)
    with (
        quiet(),
        _SEEDING,
        torch.random.fork_rng(devices=[]),
    ):  # PEFT starts adapters on the CPU, then moves them
        torch.default_generator.manual_seed(seed)
        adapted = _adapted(model, _peft_config(config, targets))
        if config.init == "orthogonal":
            _start_orthogonal(adapted)
    for parameter in trainable_parameters(adapted).values():
        parameter.data = parameter.data.float()
    return adapted


def _adapted(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    name = type(model).__name__
    fix = "Name others in adapter.targets, the attention's for example: [q_proj, k_proj, v_proj]."
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(
            f"PEFT cannot adapt all layers of {name}.", why=str(error), fix=fix
        ) from error
    if any(isinstance(module, ParamWrapper) for module in adapted.modules()):
        raise ModelError(
            f"PEFT would adapt the stacked experts of {name} as well, which cannot be merged.",
            why=f"It takes {', '.join(config.target_modules)} for parts of them.",
            fix=fix,
        )
    return adapted


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, in the order of their names."""
    named = sorted(model.named_parameters(), key=lambda entry: entry[0])
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """Return the adapter's tensors under the names of `adapter_model.safetensors`, sorted.

    They share memory with the model: clone what must outlast the next optimizer step.
    """
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: state[name].detach() for name in sorted(state)}


def load_adapter_state(model: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Copy ``state`` into the adapter, in place, so that an optimizer keeps its parameters.

    Raises:
        ArtifactError: Names or shapes differ: it belongs to another model or another recipe.
    """
    own = adapter_state(model)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = sorted(n for n in own.keys() & state.keys() if own[n].shape != state[n].shape)
    if missing or unexpected or reshaped:
        raise ArtifactError(
            f"The adapter's weights do not fit the model: {len(missing)} missing, "
            f"{len(unexpected)} unexpected, {len(reshaped)} of another shape.",
            why=f"The first: {(missing + unexpected + reshaped)[0]}",
            fix="Use it with the base and the adapter settings it was trained with.",
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def save_adapter(model: PeftModel, folder: Path, base_name: str, base_revision: str | None) -> None:
    """Write the adapter in PEFT's format; the same weights make the same bytes.

    Args:
        model: The model that carries the adapter.
        folder: Where the two files go; made if need be.
        base_name: What a reader shall load the base from.
        base_revision: Commit of the base, for a hub model.

    Raises:
        StoreError: There is no room, say.
    """
    with storing(folder):
        _write_adapter(model, folder, base_name, base_revision)


def _write_adapter(
    model: PeftModel, folder: Path, base_name: str, base_revision: str | None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.cpu().contiguous() for name, t in adapter_state(model).items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    settings = model.peft_config[_NAME].to_dict() | {
        "base_model_name_or_path": base_name,
        "revision": base_revision,
        "inference_mode": True,
    }
    text = json.dumps(settings, sort_keys=True, indent=2, default=_listed)
    (folder / CONFIG_FILE).write_text(text + "\n", "utf-8")


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a saved adapter on its base, frozen and in eval mode.

    Raises:
        ArtifactError: The adapter cannot be read or does not fit ``model``.
    """
    try:
        config = LoraConfig.from_pretrained(str(folder))
        state = load_file(folder / WEIGHTS_FILE)
        config.base_model_name_or_path = None  # else PEFT warns that this copy lies elsewhere
        with quiet(), torch.random.fork_rng(devices=[]):
            adapted = get_peft_model(model, config)
    except Exception as error:  # PEFT and safetensors raise errors of many libraries
        raise ArtifactError(
            f"The adapter in {folder} cannot be loaded.",
            why=f"{type(error).__name__}: {error}",
        ) from error
    _give_room(adapted)
    load_adapter_state(adapted, state)
    return adapted.requires_grad_(False).eval()


@dataclass(frozen=True)
class SavedAdapter:
    """What can be told of a saved adapter without loading it."""

    size_bytes: int
    """Of its float32 weights, and of their file's header."""
    is_dora: bool


def look_at_adapter(folder: Path) -> SavedAdapter:
    """Return what there is to know of an adapter before it is loaded.

    Raises:
        ArtifactError: Its files cannot be read.
    """
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
        size_bytes = (folder / WEIGHTS_FILE).stat().st_size
    except (OSError, ValueError) as error:
        raise ArtifactError(f"The adapter in {folder} cannot be read.", why=str(error)) from error
    return SavedAdapter(size_bytes, bool(settings.get("use_dora")))


def _give_room(model: PeftModel) -> None:
    """Put an adapter on the CPU that PEFT made without memory, as its base has none (`passing`)."""
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and ".lora_" in name:
            owner, _, last = name.rpartition(".")
            room = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
            model.get_submodule(owner).register_parameter(last, room)


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the linear layers that can carry an adapter, by name: all but the output head."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def target_endings(model: PreTrainedModel, config: AdapterConfig) -> list[str]:
    """Return the endings of names that PEFT shall match, sorted.

    Raises:
        ConfigError: One of ``config.targets`` matches no linear layer.
    """
    names = list(linear_layers(model))
    endings = sorted({name.rpartition(".")[2] for name in names})
    if config.targets == "all-linear":
        return endings
    for target in config.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ConfigError(
                f"adapter.targets: {target!r} matches no linear layer of this model.",
                why="The output head never gets an adapter.",
                fix=f"Choose among {', '.join(endings)}; or all-linear.",
            )
    return sorted(set(config.targets))


def _peft_config(config: AdapterConfig, targets: list[str]) -> LoraConfig:
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        use_rslora=config.rslora,
        use_dora=config.dora,
        init_lora_weights="gaussian" if config.init == "gaussian" else True,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _refuse_dora_on_int8(model: PreTrainedModel, config: AdapterConfig) -> None:
    """PEFT's DoRA reads the weight's norm in a way that loses LLM.int8()'s scales."""
    if config.dora and getattr(model, "is_loaded_in_8bit", False):
        raise ConfigError(
            "adapter.dora=true does not work on quantization.method=int8.",
            fix="Choose quantization.method=nf4, fp4 or none; or adapter.dora=false.",
        )


def _start_orthogonal(model: PeftModel) -> None:
    """Start A and B on disjoint rows of one orthogonal R x R matrix, so that B @ A is zero.

    PEFT has the same start, but makes it in the base weight's dtype, which is uint8 for 4 bits.
    Source: datta0.github.io/posts/rethink-lora-init, with PEFT's scale of a tenth.
    """
    for module in model.modules():
        if _NAME not in getattr(module, "lora_A", {}):
            continue
        a_RI, b_OR = module.lora_A[_NAME].weight, module.lora_B[_NAME].weight
        rank = a_RI.shape[0]
        q_RR, _ = torch.linalg.qr(torch.randn(rank, rank))
        a_RI.data.copy_((torch.randn(a_RI.shape[1], rank // 2) @ q_RR[0::2]).T / 10)
        b_OR.data.copy_((torch.randn(b_OR.shape[0], rank // 2) @ q_RR[1::2]) / 10)


def _listed(value: object) -> list[str]:
    """Sets come in another order in every process."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} in a PEFT config is not plain data")
