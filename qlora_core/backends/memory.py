"""Services that keep everything in memory, for notebooks and tests. They ship with the library.

They keep the promises of `qlora_core.ports` like the real ones: the same metric and step counts
once, the same files published twice are one version.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qlora_core.fingerprint import file_digest, files_below, fingerprint
from qlora_core.ports import Candidate, Champion


@dataclass(frozen=True)
class LoggedDataset:
    """What `log_dataset` was told."""

    name: str
    digest: str
    source: str
    context: str
    num_rows: int


@dataclass
class MemoryTracker:
    """Keeps what is tracked in plain fields."""

    params: dict[str, str | int | float | bool] = field(default_factory=dict)
    metrics: dict[str, dict[int, float]] = field(default_factory=dict)
    """Value by step, by name."""
    datasets: list[LoggedDataset] = field(default_factory=list)
    files: list[tuple[Path, str]] = field(default_factory=list)
    """(path, folder among the run's artefacts)."""
    texts: dict[str, str] = field(default_factory=dict)
    """By place among the run's artefacts."""
    tags: dict[str, str] = field(default_factory=dict)

    def log_params(self, params: Mapping[str, str | int | float | bool]) -> None:
        """Write-once parameters: the first value stays."""
        self.params = {**params, **self.params}

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Numbers at a step: the first value stays."""
        for name, value in metrics.items():
            self.metrics.setdefault(name, {}).setdefault(step, float(value))

    def log_dataset(self, name: str, digest: str, source: str, context: str, num_rows: int) -> None:
        """A dataset that went in."""
        dataset = LoggedDataset(name, digest, source, context, num_rows)
        if dataset not in self.datasets:
            self.datasets.append(dataset)

    def log_file(self, path: Path, folder: str = "") -> None:
        """A file to keep with the run; only its path is kept."""
        self.files.append((path, folder))

    def log_text(self, place: str, text: str) -> None:
        """Text to keep with the run, as it is: it goes nowhere."""
        self.texts[place] = text

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Text to find the run by: the last value counts."""
        self.tags.update(tags)


@dataclass
class MemoryRegistry:
    """Versions and aliases in plain fields; a candidate's merged model has its adapter's number."""

    candidates: dict[str, list[Candidate]] = field(default_factory=dict)
    """Version n of a name is number n - 1."""
    aliases: dict[str, dict[str, str]] = field(default_factory=dict)
    """Version by alias, by name."""
    _digests: dict[str, list[str]] = field(default_factory=dict)

    def champion(self, name: str) -> Champion | None:
        """Return what `champion` points at, or None."""
        version = self.aliases.get(name, {}).get("champion")
        if version is None:
            return None
        candidate = self.candidates[name][int(version) - 1]
        return Champion(
            version=version,
            dataset_digest=candidate.dataset_digest,
            metrics=candidate.metrics,
        )

    def register(self, candidate: Candidate) -> tuple[str, str | None]:
        """Publish and point `challenger` at it; return (adapter version, merged version)."""
        digests = self._digests.setdefault(candidate.name, [])
        versions = self.candidates.setdefault(candidate.name, [])
        digest = _digest(candidate)
        if digest in digests:
            versions[digests.index(digest)] = candidate
        else:
            digests.append(digest)
            versions.append(candidate)
        version = str(digests.index(digest) + 1)
        self.aliases.setdefault(candidate.name, {})["challenger"] = version
        return version, version if candidate.merged else None

    def promote(self, name: str, version: str) -> None:
        """Point `champion` at ``version``."""
        if not self.holds(name, version):
            raise KeyError(f"{name} has no version {version}")
        self.aliases.setdefault(name, {})["champion"] = version

    def holds(self, name: str, version: str) -> bool:
        """Say whether that version is there."""
        return version in map(str, range(1, len(self.candidates.get(name, [])) + 1))


class SilentProgress:
    """Shows nothing."""

    def update(self, stage: str, done: float, total: float, note: str = "") -> None:
        """Do nothing."""

    def say(self, stage: str, message: str) -> None:
        """Do nothing."""


@dataclass
class RecordingProgress:
    """Keeps what it was told, to look at afterwards."""

    updates: list[tuple[str, float, float, str]] = field(default_factory=list)
    """(stage, done, total, note)."""
    said: list[tuple[str, str]] = field(default_factory=list)
    """(stage, message)."""

    def update(self, stage: str, done: float, total: float, note: str = "") -> None:
        """Keep how far a stage is."""
        self.updates.append((stage, done, total, note))

    def say(self, stage: str, message: str) -> None:
        """Keep a message."""
        self.said.append((stage, message))


def _digest(candidate: Candidate) -> str:
    folders = [folder for folder in (candidate.adapter, candidate.merged) if folder]
    files = [[(n, file_digest(folder / n)) for n in files_below(folder)] for folder in folders]
    return fingerprint({"base": candidate.base, "files": files})
