"""merge_adapter: a stand-alone model from base and adapter, with the measured cost of merging.

The adapter was trained on dequantised 4-bit weights. Folded into those, the merged model is the
tuned model but for rounding to 16 bits; folded into the original ones it may even score better, yet
it is another model. `auto` makes both and keeps the one that says most nearly what was trained,
by KL divergence. Each way is built under `ctx.scratch` and renamed when whole, so a killed attempt
builds none twice.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_core.artifacts import (
    AdapterCheckpoint,
    Artifact,
    MergedModel,
    Parity,
    PreparedDataset,
    QuantizedBase,
)
from qlora_core.config import MergeConfig, ModelConfig
from qlora_core.data.prepared import read_split
from qlora_core.errors import ArtifactError
from qlora_core.evaluation.parity import Model, measure_parity
from qlora_core.modeling.dense import asking_budget, dense_weights
from qlora_core.modeling.loading import load_base, quiet
from qlora_core.modeling.lora import load_adapter
from qlora_core.modeling.merge import copy_companions, read_updates, write_merged
from qlora_core.modeling.originals import open_original
from qlora_core.modeling.passing import open_passing
from qlora_core.modeling.weights import CheckpointWeights, Weights
from qlora_core.ports import Context, Progress, stage
from qlora_core.sources import Source

Onto = Literal["dequantized", "original"]
_NAME = "merge_adapter"
HELD_BYTES = 2_000_000_000
"""Two models that take no more in float32 are compared in memory; of larger ones, on a CPU, only
the weights that compute at the moment are there."""


@dataclass(frozen=True)
class _Inputs:
    """What every way of merging reads."""

    merge: MergeConfig
    model: ModelConfig
    base: Artifact[QuantizedBase]
    adapter: Artifact[AdapterCheckpoint]
    data: Artifact[PreparedDataset]
    source: Source
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.merge.dtype)
        return dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """float32 on a CPU, which is exact and fast there; on a GPU as the weights are saved."""
        return torch.float32 if self.device.type == "cpu" else self.dtype


@stage(
    _NAME,
    version=1,
    facts=MergedModel,
    packages=("torch", "transformers", "peft", "bitsandbytes"),
)
def merge_adapter(
    ctx: Context,
    merge: MergeConfig,
    model: ModelConfig,
    base: Artifact[QuantizedBase],
    adapter: Artifact[AdapterCheckpoint],
    data: Artifact[PreparedDataset],
    source: Source,
) -> MergedModel:
    """Fold ``adapter`` into weights, measure what that changed, keep the nearest.

    Leaves a transformers checkpoint in `model/`: safetensors, config, tokenizer, chat template.

    Args:
        ctx: Where to write.
        merge: Onto what, in which dtype, compared on how many rows.
        model: The recipe's model, for reading the original weights.
        base: The quantised base that the adapter was trained on.
        adapter: The trained adapter.
        data: Whose held-out rows the comparison uses.
        source: Where the original weights lie.

    Raises:
        ArtifactError: The adapter has another base, or the merged weights are not finite.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = _Inputs(merge, model, base, adapter, data, source, device)
    ways = _ways(merge, base)
    notes: list[str] = _way_notes(merge, base)
    for number, way in enumerate(ways):
        notes += _build(ctx, inputs, way, _share(ctx.progress, number, 2 * len(ways)))
    parities = _measure_all(ctx, inputs, ways)
    kept = parities[0]
    shutil.move(ctx.scratch / kept.onto, ctx.out / "model")
    stored = CheckpointWeights(ctx.out / "model").infos().values()
    return MergedModel(
        onto=kept.onto,
        dtype=merge.dtype,
        size_bytes=sum(info.size_bytes for info in stored),
        num_shards=len(list((ctx.out / "model").glob("*.safetensors"))),
        parity=parities,
        notes=(*(describe(parity) for parity in parities), *notes),
    )


def describe(parity: Parity) -> str:
    """Say in one sentence what folding onto these weights changed."""
    kl, error = parity.kl.value, parity.kl.standard_error
    spread = f" ± {error:.1g}" if error is not None else ""
    return (
        f"Merging onto {parity.onto} weights moves the answers by {kl:.2g}{spread} nats per token "
        f"(KL); {100 * parity.agreement.value:.2f} % of greedy tokens agree; "
        f"loss {parity.loss_adapter.value:.4f} -> {parity.loss_merged.value:.4f} "
        f"on {parity.kl.num_rows} rows."
    )


def _ways(merge: MergeConfig, base: Artifact[QuantizedBase]) -> tuple[Onto, ...]:
    if merge.onto != "auto":
        return (merge.onto,)
    return ("dequantized",) if base.facts.method == "none" else ("dequantized", "original")


def _way_notes(merge: MergeConfig, base: Artifact[QuantizedBase]) -> list[str]:
    if merge.onto == "auto" and base.facts.method == "none":
        return ["The base is not quantised, so there is one way to merge, not two."]
    return []


def _build(
    ctx: Context, inputs: _Inputs, way: Onto, report: Callable[[float, str], None]
) -> list[str]:
    """Write one candidate to ``ctx.scratch / way`` unless it is there whole; return notes."""
    finished, partial = ctx.scratch / way, ctx.scratch / f"{way}.partial"
    notes_file = ctx.scratch / f"{way}.notes"
    if finished.is_dir():
        return notes_file.read_text(encoding="utf-8").splitlines()
    base_weights: Weights = CheckpointWeights(inputs.base.path / "model")
    notes: list[str] = []
    if way == "original":
        base_weights, notes = open_original(inputs.model, inputs.source, base_weights.infos())
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    written = write_merged(
        base_weights,
        read_updates(inputs.adapter.path),
        partial,
        dtype=inputs.dtype,
        max_shard_bytes=inputs.merge.max_shard_bytes,
        on_tensor=_noting(report, f"folding into {way} weights"),
    )
    copy_companions(inputs.base.path / "model", partial, dtype=inputs.dtype)
    _require_tensors(partial, written.num_tensors)
    notes_file.write_text("\n".join(notes), encoding="utf-8")
    partial.rename(finished)
    for note in notes:
        ctx.progress.say(_NAME, note)
    return notes


def _measure_all(ctx: Context, inputs: _Inputs, ways: tuple[Onto, ...]) -> tuple[Parity, ...]:
    """Return the parity of each way, the nearest to the tuned model first."""
    rows = read_split(inputs.data.path, "heldout")
    passing = _tuned_passing(ctx, inputs)
    tuned = passing or load_adapter(load_base(inputs.base.path, inputs.device), inputs.adapter.path)
    parities = []
    with dense_weights(tuned, asking_budget(inputs.device)):  # once for many batches
        for number, way in enumerate(ways):
            report = _share(ctx.progress, len(ways) + number, 2 * len(ways))
            merged = open_passing(ctx.scratch / way) if passing is not None else None
            parity = measure_parity(
                tuned,
                merged or _load_merged(ctx.scratch / way, inputs),  # gone before the next comes
                rows,
                onto=way,
                max_rows=inputs.merge.parity_rows,
                batch_size=inputs.merge.batch_size,
                on_batch=_noting(report, f"comparing {way} with the tuned model"),
            )
            parities.append(parity)
    return tuple(sorted(parities, key=lambda parity: parity.kl.value))


def _tuned_passing(ctx: Context, inputs: _Inputs) -> Model | None:
    """Return the tuned model with weights that come and go, where it is too large to be held."""
    stored = CheckpointWeights(inputs.base.path / "model").infos().values()
    size_bytes = sum(4 * torch.Size(info.shape).numel() for info in stored)
    if inputs.device.type != "cpu" or 2 * size_bytes <= HELD_BYTES:
        return None
    is_float32 = inputs.base.facts.compute_dtype == "float32"
    opened = open_passing(inputs.base.path / "model", inputs.adapter.path) if is_float32 else None
    if opened is None:
        ctx.progress.say(
            _NAME,
            f"the comparison loads two models whole ({2 * size_bytes / 1e9:.1f} GB): their weights "
            "cannot be read one at a time",
        )
    return opened


def _load_merged(folder: Path, inputs: _Inputs) -> PreTrainedModel:
    """Load what was saved, as anybody would; transformers only warns of absent weights."""
    with quiet():
        merged, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=inputs.compute_dtype,
            device_map={"": inputs.device},
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=inputs.model.trust_remote_code,
            output_loading_info=True,
        )
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise ArtifactError(
            f"the merged model does not load whole: {len(wrong)} weights are missing, unexpected "
            f"or of another shape, the first {wrong[0]!r}."
        )
    return merged.eval()


def _require_tensors(folder: Path, expected: int) -> None:
    found = len(CheckpointWeights(folder).infos())
    if found != expected:
        raise ArtifactError(f"the merged model has {found} tensors, but {expected} were merged.")


def _share(progress: Progress, done: int, total: int) -> Callable[[float, str], None]:
    """Return a reporter for part ``done`` of ``total`` equal parts of the stage."""
    return lambda part, note: progress.update(_NAME, done + part, total, note)


def _noting(report: Callable[[float, str], None], note: str) -> Callable[[int, int], None]:
    return lambda done, total: report(done / total, note)
