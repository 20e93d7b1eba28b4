"""The composition root: from a recipe and the environment to a store, services and sources.

Everything that is decided by where a run happens is decided here and nowhere else: which folder,
which MLflow, which Ray, which device. Stages get the results as plain arguments. A `Workspace` is
no dataclass on purpose: Prefect walks through dataclasses that it is given as arguments.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar, cast

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed

from qlora_core.artifacts import Artifact, Facts, RegisteredModel
from qlora_core.backends.memory import SilentProgress
from qlora_core.backends.mlflow_registry import MlflowRegistry
from qlora_core.backends.mlflow_tracking import MlflowTracker
from qlora_core.backends.ray_address import is_jobs_endpoint, require_address
from qlora_core.backends.ray_crew import RayCrew, has_crew
from qlora_core.backends.ray_jobs import RayJobsLauncher
from qlora_core.backends.ray_jobs_crew import RayJobsCrew
from qlora_core.backends.ray_process import WaitingDriver
from qlora_core.backends.ray_resources import require_local_room
from qlora_core.backends.ray_train import RayTrainLauncher
from qlora_core.config import CustomScorer, QuantizationConfig, RunConfig
from qlora_core.errors import LaunchError, QLoraError
from qlora_core.ports import Crew, Launcher, Progress, Services, Stage
from qlora_core.sources import Source, find_source
from qlora_core.store import Produced, Store
from tasks import places
from tasks.progress import RunProgress, StoppedError

P = ParamSpec("P")
F = TypeVar("F", bound=Facts)

SHOWN = {f"{subject}_report": f"evaluate {subject}" for subject in ("base", "tuned", "merged")}
"""Names that stages show themselves by, by role, where it is not the stage's name."""

_PATIENCE_S = 30.0  # of the registry, until MLflow has made the run that its models belong to

Keep = Callable[[str, Artifact[Any], bool], None]
"""Told of every artefact: its role in the run, the artefact, whether the store had it."""


@dataclass(frozen=True)
class Sources:
    """What the recipe points at, found and hashed."""

    model: Source
    template: Source | None
    dataset: Source
    heldout: Source | None
    scorers: tuple[Source, ...]


class Workspace:
    """What the tasks of one run share."""

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        services: Services,
        progress: RunProgress,
        keep: Keep,
    ) -> None:
        self.config = config
        self.store = store
        self.services = services
        self.progress = progress
        self.sources = find_sources(config)
        self.quantization = resolved_quantization(config)
        self._keep = keep
        self._changed = threading.Condition()
        self._under_way: list[str] = []

    def stop(self) -> None:
        """Make every stage that still runs end soon."""
        self.progress.stop()

    def wait_for_stages(self, timeout_s: float) -> list[str]:
        """Wait until no stage is under way; return the names of those that are after that time."""
        with self._changed:
            self._changed.wait_for(lambda: not self._under_way, timeout_s)
            return list(self._under_way)

    def produce(
        self, role: str, stage: Stage[P, F], /, *args: P.args, **kwargs: P.kwargs
    ) -> Artifact[F]:
        """Return the stage's artefact, building it if the store has it not.

        Inside a submitted Prefect task, return what this returns: where the store had the
        artefact it is a state named `Cached` around it, which Prefect unwraps for the next task.

        Raises:
            StoppedError: The run is being stopped.
            QLoraError: What the stage raises.
        """
        with self._counted(stage.name):
            produced = self._produced(stage, *args, **kwargs)
            self._keep(role, produced.artifact, produced.cached)
        if not produced.cached:
            return produced.artifact
        self.progress.update(SHOWN.get(role, stage.name), 1, 1, "cached")
        state: State[Any] = Completed(
            name="Cached", message=f"{stage.name} {produced.artifact.key[:12]}"
        )
        state.data = produced.artifact
        return cast("Artifact[F]", state)

    @contextmanager
    def _counted(self, stage: str) -> Iterator[None]:
        with self._changed:
            self._under_way.append(stage)
        try:
            yield
        finally:
            with self._changed:
                self._under_way.remove(stage)
                self._changed.notify_all()

    def _produced(self, stage: Stage[P, F], /, *args: P.args, **kwargs: P.kwargs) -> Produced[F]:
        self.progress.check(stage.name)
        try:
            produced = self.store.produce(stage, self.services, *args, **kwargs)
            if produced.cached and self._is_lost(produced.artifact):
                self.store.forget(produced.artifact)
                return self.store.produce(stage, self.services, *args, **kwargs)
            return produced
        except QLoraError as error:
            if self.progress.is_stopping and not isinstance(error, StoppedError):
                raise StoppedError(f"{stage.name} was stopped before it was done.") from error
            raise

    def _is_lost(self, artifact: Artifact[Any]) -> bool:
        """Say whether a model that the store says was published is gone from the registry."""
        facts = artifact.facts
        if not isinstance(facts, RegisteredModel):
            return False
        try:
            return not self.services.registry.holds(facts.name, facts.adapter_version)
        except LaunchError as error:
            self.progress.say(artifact.stage, f"taken for registered as before: {error.what}")
            return False


@dataclass(frozen=True)
class Surroundings:
    """What the caller of a flow chooses beyond the recipe; not a parameter, so not on record."""

    progress: Progress
    launcher: Launcher | None = None
    """Instead of Ray: `InProcessLauncher` in a notebook or a test."""
    waiting: WaitingDriver = field(default_factory=WaitingDriver)
    """Of Ray, started ahead."""


_surroundings: ContextVar[Surroundings | None] = ContextVar("surroundings", default=None)


@contextmanager
def surrounded_by(surroundings: Surroundings) -> Iterator[None]:
    """Let flows that are called inside the block use these."""
    token = _surroundings.set(surroundings)
    try:
        yield
    finally:
        _surroundings.reset(token)


def surroundings() -> Surroundings:
    """Return what `surrounded_by` said, or those of a run that nobody watches."""
    return _surroundings.get() or Surroundings(SilentProgress())


def open_workspace(
    config: RunConfig, tracker: MlflowTracker, provenance: Mapping[str, str], keep: Keep
) -> Workspace:
    """Put a run's workspace together.

    Args:
        config: The recipe.
        tracker: The run's own.
        provenance: What to write beside every artefact that this run makes.
        keep: Told of every artefact.

    Raises:
        UserError: Something the recipe points at is not there, the store cannot be written, or
            this machine is too small for the workers.
    """
    around = surroundings()
    progress = RunProgress(around.progress)
    services = Services(
        tracker=tracker,
        registry=_registry(config, tracker),
        launcher=around.launcher or _launcher(config, progress, around.waiting),
        progress=progress,
        crew=None if around.launcher else _crew(config, progress),
        check=progress.check,
        offloads_base=config.cluster.offload_base,
    )
    return Workspace(config, Store(places.store_root(config), provenance), services, progress, keep)


def find_sources(config: RunConfig) -> Sources:
    """Look up and hash everything the recipe points at.

    Raises:
        UserError: Something is not there.
    """
    model, dataset = config.model, config.dataset
    custom = [s for s in config.evaluation.scorers if isinstance(s, CustomScorer)]
    return Sources(
        model=find_source(model.source, model.revision, field="model.source"),
        template=_optional(model.chat_template, "model.chat_template"),
        dataset=find_source(dataset.source, dataset.revision, field="dataset.source"),
        heldout=_optional(dataset.heldout.source, "dataset.heldout.source"),
        scorers=tuple(find_source(s.file, field="evaluation.scorers") for s in custom),
    )


def require_workers(config: RunConfig) -> None:
    """Find before any work that this machine cannot hold the recipe's workers.

    Raises:
        ResourceError: It cannot, and no other cluster is named.
        UserError: What is named cannot be the address of a Ray, or of a Ray Jobs endpoint.
    """
    cluster = places.cluster(config)
    if cluster.address is None:
        require_local_room(cluster)
    else:
        require_address(cluster.address)


def resolved_quantization(config: RunConfig) -> QuantizationConfig:
    """Return the quantisation with `auto` replaced, so that keys say what was really done."""
    from qlora_core.modeling import dtypes

    asked, cluster = config.quantization.compute_dtype, places.cluster(config)
    if cluster.address is None:
        name = dtypes.compute_dtype_name(asked, dtypes.present_device_type())
    elif asked == "auto":  # whatever this machine has: keys are the same wherever a run is started
        name = "bfloat16" if cluster.gpus_per_worker else "float32"
    else:
        name = asked
    return config.quantization.model_copy(update={"compute_dtype": name})


def is_transient(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Say whether trying again may help: workers or a network were lost, not a person's mistake."""
    error = state.data
    if isinstance(error, QLoraError):
        return error.is_transient
    return isinstance(error, ConnectionError | TimeoutError)


def _launcher(config: RunConfig, progress: RunProgress, waiting: WaitingDriver) -> Launcher:
    def say(message: str) -> None:
        progress.say("train_adapter", message)

    def check() -> None:
        progress.check("train_adapter")

    require_workers(config)
    cluster = places.cluster(config)
    if is_jobs_endpoint(cluster.address):
        return RayJobsLauncher(cluster, config.snapshots, say, check)
    return RayTrainLauncher(cluster, config.snapshots, say, check, waiting)


def _crew(config: RunConfig, progress: RunProgress) -> Crew | None:
    def say(message: str) -> None:
        progress.say("evaluate", message)

    def check() -> None:
        progress.check("evaluate")

    cluster = places.cluster(config)
    if not has_crew(cluster):
        return None
    return (RayJobsCrew if is_jobs_endpoint(cluster.address) else RayCrew)(cluster, say, check)


def _registry(config: RunConfig, tracker: MlflowTracker) -> MlflowRegistry:
    place = places.tracking_place(config)
    return MlflowRegistry(
        place.tracking_uri,
        places.experiment(config),
        place.artifact_location,
        lambda: tracker.wait_for_run_id(_PATIENCE_S),
    )


def _optional(uri: str | None, field: str) -> Source | None:
    return find_source(uri, field=field) if uri else None
