"""Where artefacts live: found by key, built once, sealed whole, checked before use.

::

    <root>/<stage>/<key>/manifest.json     written last: a folder with a manifest is whole
                        /provenance.json   commit, versions, hardware, seconds: recorded, not hashed
                        /...               the stage's files
    <root>/<stage>/.<key>.lock             held while one process builds; others wait for it
                  /.<key>.staging          rubbish if its process is gone
                  /.<key>.scratch          what a killed attempt left for its successor
    <root>/damaged/...                     what failed its check, set aside and rebuilt

Sealing is: write in the staging folder, hash, fsync, manifest, one rename. A reader trusts a file
whose size and modification time are the sealed ones and hashes it otherwise, so finding 20 GB is
as quick as finding 20 KB, and an edited, truncated or swapped file is still noticed. What cannot be
*read* is not damaged: a network file system that hiccups for a moment would otherwise cost a whole
training. Only who holds the lock sets aside. `flock` and not a lock file with contents: the kernel
lets go of it when its holder is killed.
"""

import errno
import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

from pydantic import ValidationError

from qlora_core.artifacts import Artifact, Facts, Frozen
from qlora_core.config import Config
from qlora_core.errors import ArtifactError, StoreError, storage_error, storing
from qlora_core.fingerprint import file_digest, files_below, fingerprint, tree_digest
from qlora_core.ports import Context, Progress, Services, Stage
from qlora_core.sources import Source

P = ParamSpec("P")
F = TypeVar("F", bound=Facts)

SCHEMA = 1
MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"
_BESIDE = {MANIFEST, PROVENANCE}
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 1.0
"""Between two looks at whether another run is done; a builder takes seconds to days."""
_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class SealedFile(Frozen):
    """One file of an artefact as it was sealed."""

    name: str
    size_bytes: int
    sha256: str
    modified_ns: int


class Manifest(Frozen):
    """What an artefact says of itself."""

    schema_version: int
    stage: str
    stage_version: int
    key: str
    digest: str
    inputs: dict[str, Any]
    """What the key was made of: a result can be explained from this alone."""
    facts: dict[str, Any]
    files: tuple[SealedFile, ...]


@dataclass(frozen=True)
class Produced(Generic[F]):
    """An artefact, and whether the store had it already."""

    artifact: Artifact[F]
    cached: bool


class Store:
    """A folder of sealed artefacts.

    Args:
        root: The folder; made if it is not there.
        provenance: What to record beside every new artefact, such as run ids.
    """

    def __init__(self, root: Path, provenance: Mapping[str, str] | None = None) -> None:
        self.root = root
        self._provenance = dict(provenance or {})

    def require_writable(self) -> None:
        """Write and delete one byte, so that a bad place is found before any work is done.

        Raises:
            StoreError: The folder cannot be written.
        """
        with storing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".probe-{os.getpid()}-{time.monotonic_ns()}"
            probe.write_bytes(b"x")
            probe.unlink()

    def key(self, stage: Stage[P, F], *args: P.args, **kwargs: P.kwargs) -> str:
        """Return the name under which this stage with these inputs is kept."""
        return fingerprint(_identity(stage, stage.bind(*args, **kwargs)))

    def find(self, stage: Stage[P, F], key: str) -> Artifact[F] | None:
        """Return the artefact if it is there and whole; a damaged one counts as not there.

        Raises:
            StoreError: It cannot be read just now, so nobody can say.
        """
        try:
            return _read(stage, self._folder(stage.name, key))
        except ArtifactError:
            return None

    def produce(
        self, stage: Stage[P, F], services: Services, /, *args: P.args, **kwargs: P.kwargs
    ) -> Produced[F]:
        """Return the artefact of this stage with these inputs, building it if need be.

        Of several processes that ask for the same at the same time one builds, the others wait.

        Raises:
            StoreError: No room, no permission, a disk that fails. Earlier artefacts are intact.
            QLoraError: What the stage raises, or ``services.check`` while it waits.
        """
        inputs = stage.bind(*args, **kwargs)
        identity = _identity(stage, inputs)
        key = fingerprint(identity)
        if found := self.find(stage, key):
            return Produced(found, cached=True)
        try:
            with self._lock(stage.name, key, services):
                if found := self._whole_or_set_aside(stage, key, services.progress):
                    return Produced(found, cached=True)
                return Produced(self._build(stage, services, inputs, identity), cached=False)
        except OSError as error:
            if error.errno not in _STORAGE_ERRNOS:
                raise
            raise storage_error(error, error.filename or self.root) from error

    def forget(self, artifact: Artifact[Any]) -> None:
        """Set an artefact aside that is whole, but that the world no longer agrees with."""
        _set_aside(artifact.path, self.root / "damaged")

    def scratch(self, stage: Stage[P, F], key: str) -> Path:
        """Return the folder in which attempts at this key leave what their successors need."""
        return self.root / stage.name / f".{key}.scratch"

    def sweep(self) -> list[Path]:
        """Delete what killed processes left, but for scratch folders; return what was deleted."""
        swept = []
        for staging in sorted(self.root.glob("*/.*.staging")):
            lock = staging.with_suffix(".lock")
            with lock.open("a") as handle:
                if _try_flock(handle.fileno()):
                    shutil.rmtree(staging)
                    swept.append(staging)
        return swept

    def _whole_or_set_aside(
        self, stage: Stage[P, F], key: str, progress: Progress
    ) -> Artifact[F] | None:
        folder = self._folder(stage.name, key)
        try:
            return _read(stage, folder)
        except ArtifactError as error:
            place = _set_aside(folder, self.root / "damaged")
            progress.say(stage.name, f"{error.what} Set aside in {place}; building it anew.")
            return None

    def _build(
        self,
        stage: Stage[P, F],
        services: Services,
        inputs: dict[str, Any],
        identity: dict[str, Any],
    ) -> Artifact[F]:
        key = fingerprint(identity)
        staging = self.root / stage.name / f".{key}.staging"
        scratch = self.scratch(stage, key)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        scratch.mkdir(exist_ok=True)
        started = time.monotonic()
        context = Context(
            out=staging,
            scratch=scratch,
            tracker=services.tracker,
            registry=services.registry,
            launcher=services.launcher,
            progress=services.progress,
            crew=services.crew,
            offloads_base=services.offloads_base,
        )
        try:
            facts = stage.run(context, **inputs)  # type: ignore[call-arg]  # bound by name above
            self._seal(stage, staging, facts, identity, time.monotonic() - started)
            staging.rename(self._folder(stage.name, key))
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        _fsync(staging.parent)
        shutil.rmtree(scratch, ignore_errors=True)
        return read_artifact(stage, self._folder(stage.name, key))

    def _seal(
        self,
        stage: Stage[P, F],
        staging: Path,
        facts: F,
        identity: dict[str, Any],
        seconds: float,
    ) -> None:
        files = tuple(_seal_file(staging, name) for name in files_below(staging))
        manifest = Manifest(
            schema_version=SCHEMA,
            stage=stage.name,
            stage_version=stage.version,
            key=fingerprint(identity),
            digest=tree_digest((file.name, file.sha256) for file in files),
            inputs=identity["inputs"],
            facts=facts.model_dump(mode="json"),
            files=files,
        )
        provenance = _machine() | {"seconds": round(seconds, 3)} | self._provenance
        _write_json(staging / PROVENANCE, provenance)
        _write_json(staging / MANIFEST, manifest.model_dump(mode="json"))

    def _folder(self, stage: str, key: str) -> Path:
        return self.root / stage / key

    @contextmanager
    def _lock(self, stage: str, key: str, services: Services) -> Iterator[None]:
        path = self.root / stage / f".{key}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as handle:
            if not _try_flock(handle.fileno()):
                services.progress.say(stage, "another run is building this; waiting for it")
                _wait_for_flock(handle.fileno(), lambda: services.check(stage))
            yield


def read_artifact(stage: Stage[P, F], folder: Path) -> Artifact[F]:
    """Read a sealed folder and check its files.

    Raises:
        ArtifactError: It is not an artefact of this stage, or a file is missing or changed.
        StoreError: It cannot be read just now.
    """
    if found := _read(stage, folder):
        return found
    raise ArtifactError(f"{folder} has no {MANIFEST}.")


def _identity(stage: Stage[P, F], inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "version": stage.version,
        "packages": {name: _short_version(name) for name in stage.packages},
        "inputs": {name: _input_identity(name, value) for name, value in inputs.items()},
    }


def _input_identity(name: str, value: object) -> object:
    if isinstance(value, Artifact):
        return {"artifact": value.stage, "digest": value.digest}
    if isinstance(value, Source):
        return {"source": value.digest}
    if isinstance(value, Config):
        return value.hashed()
    if isinstance(value, tuple):
        return [_input_identity(name, item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"input {name!r} is a {type(value).__name__}, which has no stable name")


def _short_version(package: str) -> str:
    return ".".join(metadata.version(package).split("+")[0].split(".")[:2])


def _read(stage: Stage[P, F], folder: Path) -> Artifact[F] | None:
    """Return what `read_artifact` does; None: there is no manifest."""
    try:
        with storing(folder, "read"):
            return _checked(stage, folder)
    except StoreError as error:
        raise type(error)(
            error.what,
            why="An artefact that cannot be read just now may be whole, so it is not built again.",
            fix=f"{error.fix} Should it stay so, move {folder} away: then it is.",
        ) from error


def _checked(stage: Stage[P, F], folder: Path) -> Artifact[F] | None:
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        facts = stage.facts.model_validate(manifest.facts)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ArtifactError(f"{folder} has no readable manifest: {error}") from error
    if manifest.stage != stage.name:
        raise ArtifactError(f"{folder} holds a {manifest.stage}, not a {stage.name}.")
    for file in manifest.files:
        _check_file(folder, file)
    return Artifact(
        stage=stage.name, key=manifest.key, digest=manifest.digest, path=folder, facts=facts
    )


def _check_file(folder: Path, file: SealedFile) -> None:
    path = folder / file.name
    try:
        stat = path.stat()
        if (stat.st_size, stat.st_mtime_ns) == (file.size_bytes, file.modified_ns):
            return
        intact = stat.st_size == file.size_bytes and file_digest(path) == file.sha256
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(f"{path} is missing.") from error
    if not intact:
        raise ArtifactError(
            f"{path} is damaged.", why=f"It had {file.size_bytes} bytes, SHA-256 {file.sha256}."
        )


def _set_aside(folder: Path, damaged: Path) -> Path:
    damaged.mkdir(exist_ok=True)
    target = damaged / f"{folder.parent.name}-{folder.name}-{time.time_ns()}"
    try:
        folder.rename(target)
    except FileNotFoundError:
        pass  # another process was quicker
    except OSError as error:
        raise StoreError(f"{folder} is damaged and cannot be set aside: {error}.") from error
    return target


def _seal_file(folder: Path, name: str) -> SealedFile:
    path = folder / name
    if path.is_symlink() or name in _BESIDE:
        raise ArtifactError(f"a stage left {name}, which cannot be sealed.")
    path.chmod(0o444)
    _fsync(path)
    stat = path.stat()
    return SealedFile(
        name=name,
        size_bytes=stat.st_size,
        sha256=file_digest(path),
        modified_ns=stat.st_mtime_ns,
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    _fsync(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _try_flock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait_for_flock(handle: int, check: Callable[[], None]) -> None:
    """Wait by asking again and again: a thread that sleeps in the kernel cannot be told to stop."""
    pause_s = _FIRST_PAUSE_S
    while not _try_flock(handle):
        check()
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, _LONGEST_PAUSE_S)


def _machine() -> dict[str, Any]:
    named = ("torch", "transformers", "peft", "bitsandbytes", "ray", "prefect", "mlflow")
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": platform.machine(),
        "num_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in named if _is_installed(name)},
    }


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
