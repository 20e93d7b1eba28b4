"""What each stage leaves behind: counted facts, and an `Artifact` that names the sealed files.

Facts are what a person asks of a result: how many rows were dropped and why, how much noise the
quantisation added, what merging cost. They travel in the manifest, so `qlora show`, Prefect and
MLflow read them without opening a tensor. Facts may hold measured seconds, so they are recorded
but never hashed: the digest speaks of the files alone.
"""

from pathlib import Path
from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Base of plain, closed, immutable records."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="constants"
    )


class Facts(Frozen):
    """What a stage counted and measured."""


F = TypeVar("F", bound=Facts)
F_co = TypeVar("F_co", bound=Facts, covariant=True)


class Artifact(Frozen, Generic[F]):
    """One sealed result of one stage."""

    stage: str
    key: str
    """What was asked for: SHA-256 of stage, version, config and inputs."""
    digest: str
    """What came out: SHA-256 over relative names and bytes."""
    path: Path
    """Folder of the files, read-only."""
    facts: F


class Metric(Frozen):
    """One measured number with its uncertainty."""

    value: float
    standard_error: float | None = None
    """Of the mean over rows; none where no error can be given."""
    num_rows: int
    unit: str = ""
    higher_is_better: bool = True

    def interval(self, z: float = 1.96) -> tuple[float, float] | None:
        """Return ``value`` -+ z standard errors, or None without a standard error."""
        if self.standard_error is None:
            return None
        return self.value - z * self.standard_error, self.value + z * self.standard_error


class SplitFacts(Frozen):
    """What one side of the split holds."""

    num_rows: int
    num_tokens: int
    num_supervised_tokens: int
    length_quantiles: dict[str, int]
    """Tokens per row at the quantiles `min`, `p25`, `p50`, `p75`, `p95`, `max`."""
    length_histogram: tuple[tuple[int, int], ...] = ()
    """(upper edge in tokens, rows) of at most 20 bins."""


class PreparedDataset(Facts):
    """Tokenised rows: `train.parquet`, `heldout.parquet` (columns `input_ids`, `labels`) and
    `eval.parquet` (columns `prompt`, `prompt_ids`, `references`)."""

    num_rows_read: int
    dropped: dict[str, int]
    """Rows dropped, by reason."""
    train: SplitFacts
    heldout: SplitFacts
    num_prompts: int
    """Distinct held-out prompts to answer; 0 for plain text."""
    format: str
    """The format that was read or told from the columns."""
    num_special_escaped: int = 0
    """Special tokens found inside the text of rows and read as plain characters."""
    notes: tuple[str, ...] = ()
    """What else a person should know."""
    sample: str
    """One rendered row; supervised text between ⟦ and ⟧."""


class QuantizedBase(Facts):
    """The frozen base: a transformers checkpoint in `model/` with its tokenizer."""

    method: str
    architecture: str
    source: str
    """The model as the recipe names it, with its revision."""
    compute_dtype: str
    num_parameters: int
    num_quantized_parameters: int
    size_bytes: int
    """Of the tensors as stored."""
    bits_per_parameter: float
    context_length: int
    mean_relative_error: float
    """Mean over layers of RMS(dequantised - original) / RMS(original)."""
    layer_errors: dict[str, float]
    """That error of each quantised layer."""
    tied_embeddings: bool
    notes: tuple[str, ...] = ()


IncidentKind = Literal[
    "out_of_memory",
    "killed_nearby",
    "collective",
    "not_finite",
    "lost_worker",
    "lost_gpu",
    "lost_driver",
    "lost_launch",
    "lost_head",
    "ray_gave_up",
    "blind_node",
    "halved",
    "no_room",
    "resized",
    "storage",
    "preemption",
]


class Incident(Frozen):
    """A fault that training met, or a warning it got, and what was done about it."""

    kind: IncidentKind
    what: str
    remedy: str
    step: int | None = None
    """The last step that was done, as far as is known."""
    launch: str = ""
    """Of the training's processes that met it; a new launch has new processes."""
    unix_time: float = 0.0

    def sentence(self) -> str:
        """Say it to a person."""
        place = "" if self.step is None else f" after step {self.step}"
        return f"{self.kind.replace('_', ' ').capitalize()}{place}: {self.what} {self.remedy}"


class AdapterCheckpoint(Facts):
    """LoRA weights in PEFT's format, and `curve.jsonl`: a StepMetrics a line, without what a clock
    measured, so that the same training has the same digest."""

    num_trainable_parameters: int
    num_target_layers: int
    num_steps: int
    """Optimizer steps of the adapter kept (the best one, with early stopping)."""
    num_steps_run: int
    num_steps_planned: int
    num_tokens: int
    """Non-padding tokens seen."""
    num_supervised_tokens: int
    train_loss: float
    """Mean over the last tenth of the steps [nats per supervised token]."""
    heldout_loss: float
    """Of the adapter kept [nats per supervised token]."""
    stopped_early: bool
    seconds: float
    """Of training itself, over all attempts."""
    tokens_per_s: float
    supervised_tokens_per_s: float
    peak_memory_bytes: int
    """Largest resident (CPU) or allocated (GPU) memory of one worker."""
    predicted_peak_bytes: int = 0
    """What the memory plan said of that, before training."""
    num_rows_per_pass: int = 0
    """Rows of a forward pass at most: `training.micro_batch`, unless that did not fit."""
    num_workers: int
    num_attempts: int
    """1 without interruption."""
    resumed_at: tuple[int, ...] = ()
    """Steps at which later attempts went on."""
    incidents: tuple[Incident, ...] = ()
    """What went wrong on the way, in order."""
    notes: tuple[str, ...] = ()


class Sample(Frozen):
    """One row of a report, to look at."""

    prompt: str
    reference: str
    prediction: str
    scores: dict[str, float]


class EvalReport(Facts):
    """Held-out quality of one subject; `rows.jsonl` holds every row, for paired comparison."""

    subject: Literal["base", "tuned", "merged"]
    dataset_digest: str
    metrics: dict[str, Metric]
    """`loss` [nats per supervised token], `perplexity`, and one for each scorer."""
    num_truncated: int
    """Answers cut at `max_new_tokens`."""
    samples: tuple[Sample, ...]
    seconds: float
    notes: tuple[str, ...] = ()


class Parity(Frozen):
    """How a merged model differs from adapter on quantised base, on the same rows."""

    onto: Literal["dequantized", "original"]
    kl: Metric
    """KL(adapter || merged), nats per supervised token."""
    agreement: Metric
    """Share of supervised positions where both choose the same token."""
    loss_merged: Metric
    loss_adapter: Metric


class MergedModel(Facts):
    """A stand-alone transformers checkpoint in `model/`: weights, tokenizer, chat template."""

    onto: Literal["dequantized", "original"]
    dtype: str
    size_bytes: int
    num_shards: int
    parity: tuple[Parity, ...]
    """One for each way tried; the kept one first."""
    notes: tuple[str, ...] = ()


class RegisteredModel(Facts):
    """Where the result was published."""

    name: str
    adapter_version: str
    merged_version: str | None
    aliases: tuple[str, ...]
    promoted: bool
    reasons: tuple[str, ...]
    """Why it was promoted, or not."""
