"""What a stage may ask of the world, and nothing else.

A stage gets a `Context`: two folders and a few services, each a Protocol. Real ones live in
`qlora_core.backends` (Ray, MLflow); shipped in-memory ones serve notebooks and tests. The records
that cross these borders (`TrainJob`, `StepMetrics`, ...) are plain data: they go through JSON to
other processes and machines.
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar

from qlora_core.artifacts import Facts, Frozen, Metric
from qlora_core.config import AdapterConfig, EvaluationConfig, QuantizationConfig, TrainingConfig

P = ParamSpec("P")
F = TypeVar("F", bound=Facts)


class StepMetrics(Frozen):
    """What one optimizer step did. Steps count from 1: step n is the n-th update."""

    step: int
    num_steps: int
    epoch: float
    loss: float
    """Mean over the step's supervised tokens, over all workers [nats]."""
    heldout_loss: float | None = None
    """Measured after this step, if it was [nats per supervised token]."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    num_tokens: int
    """Non-padding tokens of this step, over all workers."""
    num_supervised_tokens: int
    num_computed_tokens: int
    """Tokens that went through the model: padding adds to them, shared prefixes take away."""
    seconds: float
    tokens_per_s: float
    supervised_tokens_per_s: float
    memory_bytes: int
    """Peak so far of one worker: allocated on a GPU, resident on a CPU."""


class TrainJob(Frozen):
    """Everything a training worker needs to know; paths lie on storage all workers share."""

    base: Path
    """Files of the QuantizedBase."""
    data: Path
    """Files of the PreparedDataset."""
    out: Path
    """Where rank 0 leaves `adapter_model.safetensors`, `adapter_config.json` and `curve.jsonl`: the
    same bytes for the same job."""
    scratch: Path
    """Where snapshots, the journal and at the end `summary.json` (an AdapterCheckpoint) live; it
    outlasts a killed attempt."""
    quantization: QuantizationConfig
    """How the base was quantised, and whether its weights may be kept dequantised."""
    adapter: AdapterConfig
    training: TrainingConfig
    seed: int
    base_name: str = ""
    """What a reader of the adapter shall load its base from: written to `adapter_config.json`."""

    def absolute(self) -> "TrainJob":
        """Return the job with absolute paths: workers run elsewhere."""
        names = ("base", "data", "out", "scratch")
        return self.model_copy(update={name: getattr(self, name).resolve() for name in names})


class Launcher(Protocol):
    """Runs a training job on some number of workers, wherever they are."""

    def awake(self) -> AbstractContextManager[None]:
        """Start now what a training within the block will need; it need not come to one."""

    def train(self, job: TrainJob, on_step: Callable[[StepMetrics], None]) -> None:
        """Run ``job`` to its end, calling ``on_step`` in order, each step once per call of train.

        Raises:
            TrainingError: Training cannot go on.
            ResourceError: The cluster has not what was asked for.
            LaunchError: Workers were lost more often than allowed.
        """


class AskJob(Frozen):
    """Everything a worker needs to know to put held-out questions to a model."""

    model: Path
    """Files of the QuantizedBase, or of the MergedModel."""
    is_merged: bool
    adapter: Path | None
    """Files of the AdapterCheckpoint, if the base is asked with it."""
    data: Path
    """Files of the PreparedDataset."""
    evaluation: EvaluationConfig
    questions: str
    """Digest of what is asked, so that no worker asks another dataset."""
    scratch: Path
    """Where replies are kept; it outlasts a killed attempt."""
    offloads_base: bool = False
    """A 4-bit base lies in the memory of a GPU's host, though it may fit on the GPU."""

    def absolute(self) -> "AskJob":
        """Return the job with absolute paths: workers run elsewhere."""
        paths: dict[str, Path | None] = {"adapter": self.adapter and self.adapter.resolve()}
        paths |= {name: getattr(self, name).resolve() for name in ("model", "data", "scratch")}
        return self.model_copy(update=paths)


class Answer(Frozen):
    """What a model said to a prompt."""

    text: str
    num_tokens: int
    """The stop token aside."""
    truncated: bool
    """No stop token came within the allowed number of tokens."""


class Batch(Frozen):
    """Questions that go through a model together."""

    kind: Literal["loss", "answers"]
    numbers: tuple[int, ...]
    """Of the held-out rows, or of the prompts."""


class Reply(Frozen):
    """What a model said to one batch."""

    batch: Batch
    nats: tuple[float, ...] = ()
    """Of each row: negative log-likelihood of its supervised tokens."""
    answers: tuple[Answer, ...] = ()
    """To each prompt."""
    notes: tuple[str, ...] = ()
    """What a person should know of how it was asked; the same with every reply of a worker."""


class Crew(Protocol):
    """Workers that put held-out questions to a model, each to a copy of its own."""

    def ask(self, job: AskJob, on_reply: Callable[[Reply], None]) -> None:
        """Ask everything, calling ``on_reply`` once for each batch, in any order.

        Raises:
            ModelError: The model answers with numbers that are not finite.
            ResourceError: The cluster has not what was asked for.
            LaunchError: Workers were lost more often than allowed.
        """


class Progress(Protocol):
    """Shows a person how far a stage is. Cheap to call often."""

    def update(self, stage: str, done: float, total: float, note: str = "") -> None:
        """``done`` of ``total`` units are done."""

    def say(self, stage: str, message: str) -> None:
        """Tell something worth reading once: a fallback taken, rows dropped."""


class Tracker(Protocol):
    """Where a run's numbers and files go. Never blocks for long and never raises for an outage."""

    def log_params(self, params: Mapping[str, str | int | float | bool]) -> None:
        """Write-once parameters of the run."""

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Numbers at a step; the same name and step twice counts once."""

    def log_dataset(self, name: str, digest: str, source: str, context: str, num_rows: int) -> None:
        """A dataset that went in; ``context`` is `training` or `heldout`."""

    def log_file(self, path: Path, folder: str = "") -> None:
        """A file (or every file of a folder) to keep with the run."""

    def log_text(self, place: str, text: str) -> None:
        """Text to keep with the run as a file at a relative place; secrets in it are masked."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Text to find the run by."""


class Champion(Frozen):
    """The model version that currently serves."""

    version: str
    dataset_digest: str
    metrics: dict[str, Metric]


class Candidate(Frozen):
    """A model to publish."""

    name: str
    adapter: Path
    merged: Path | None
    base: str
    """The base model, by name and revision, that the adapter belongs to."""
    tags: dict[str, str]
    dataset_digest: str
    metrics: dict[str, Metric]
    """Of the tuned model."""


class Registry(Protocol):
    """Where models are published under a name, with versions and aliases."""

    def champion(self, name: str) -> Champion | None:
        """Return what `champion` points at, or None."""

    def register(self, candidate: Candidate) -> tuple[str, str | None]:
        """Publish and point `challenger` at it; return (adapter version, merged version).

        The same files published twice give the same versions.
        """

    def promote(self, name: str, version: str) -> None:
        """Point `champion` at ``version``."""

    def holds(self, name: str, version: str) -> bool:
        """Say whether that version is (still) there."""


@dataclass(frozen=True)
class Services:
    """What every stage gets."""

    tracker: Tracker
    registry: Registry
    launcher: Launcher
    progress: Progress
    crew: Crew | None = None
    """None: a stage asks its model by itself, in this process."""
    check: Callable[[str], None] = lambda _: None
    """Called with a stage's name about every second while it waits; what it raises ends that."""
    offloads_base: bool = False
    """Models are asked with their 4-bit base in the host's memory, as `cluster.offload_base`."""


@dataclass(frozen=True)
class Context:
    """What a stage may touch."""

    out: Path
    """Empty folder; what lies there when the stage returns is sealed."""
    scratch: Path
    """Folder that survives a killed attempt at the same key; gone once the artefact is sealed."""
    tracker: Tracker
    registry: Registry
    launcher: Launcher
    progress: Progress
    crew: Crew | None = None
    """None: the stage asks its model by itself, in this process."""
    offloads_base: bool = False
    """Models are asked with their 4-bit base in the host's memory."""


@dataclass(frozen=True)
class Stage(Generic[P, F]):
    """A pure function with a name and a version; call it directly, or let a Store cache it."""

    name: str
    version: int
    """Raise it when the same inputs shall give other bytes than before."""
    facts: type[F]
    packages: tuple[str, ...]
    """Packages whose X.Y version changes the bytes."""
    run: Callable[Concatenate[Context, P], F]

    def __call__(self, ctx: Context, *args: P.args, **kwargs: P.kwargs) -> F:
        """Run the stage without a store."""
        return self.run(ctx, *args, **kwargs)

    def bind(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        """Return the inputs by name, defaults included."""
        signature = inspect.signature(self.run)
        bound = signature.bind(None, *args, **kwargs)
        bound.apply_defaults()
        return dict(list(bound.arguments.items())[1:])


def stage(
    name: str, *, version: int, facts: type[F], packages: tuple[str, ...] = ()
) -> Callable[[Callable[Concatenate[Context, P], F]], Stage[P, F]]:
    """Give a function (ctx, inputs...) -> facts its name and version."""

    def wrap(run: Callable[Concatenate[Context, P], F]) -> Stage[P, F]:
        return Stage(name, version, facts, packages, run)

    return wrap
