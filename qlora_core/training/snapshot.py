"""Snapshots: resumable training state, whole or not there, and never trusted unread.

::

    <scratch>/snapshots/step_00000010-0001.1/     step, and the attempt that wrote it
        adapter.safetensors     the trained parameters, float32
        optimizer.safetensors   AdamW's moments, exactly
        best.safetensors        the best adapter so far, if held-out losses are measured on the way
        journal.jsonl           the steps so far
        state.json              position, and what of the optimizer is not a tensor
        MANIFEST.json           written last: size and SHA-256 of each file, attempt, job

Files are written and synced in a hidden folder that one rename makes visible. Reading verifies
every byte; a damaged snapshot is set aside, aloud, and the one before it is used. What cannot be
*read* is not damaged: a network file system that hiccups for a moment would otherwise have every
snapshot set aside. An old one goes only when its successor is on disk. safetensors and JSON only: a
snapshot is data, not a program.
"""

import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from safetensors.torch import load_file, save
from torch import Tensor

from qlora_core.artifacts import Frozen
from qlora_core.config import SnapshotConfig
from qlora_core.errors import StoreError, storing
from qlora_core.fingerprint import file_digest
from qlora_core.ports import StepMetrics
from qlora_core.training.attempt import Attempt
from qlora_core.training.durable import sync, write_durably
from qlora_core.training.journal import read_journal
from qlora_core.training.loop import Position
from qlora_core.training.optimizer import OptimizerState
from qlora_core.training.room import Passes

SCHEMA = 1
HURRY_S = 300.0
"""After a node has been announced to be taken away: notices are of 30 to 120 s."""
FOLDER = "snapshots"
MANIFEST_FILE = "MANIFEST.json"
_ADAPTER, _OPTIMIZER, _BEST = "adapter.safetensors", "optimizer.safetensors", "best.safetensors"
_JOURNAL, _STATE = "journal.jsonl", "state.json"
_TORSO = re.compile(r"\.step_\d+-\d+\.\d+\.tmp")


@dataclass(frozen=True)
class TrainingState:
    """Everything that training needs to go on as if it had never stopped."""

    position: Position
    adapter: dict[str, Tensor]
    optimizer: OptimizerState
    steps: list[StepMetrics]
    passes: tuple[Passes, ...] = ()
    """How each worker makes its passes, by rank."""


class SnapshotFile(Frozen):
    """One file as it was written."""

    name: str
    size_bytes: int
    sha256: str


class SnapshotManifest(Frozen):
    """What a snapshot says of itself."""

    schema_version: int
    step: int
    attempt: str
    job: str
    """Fingerprint of what is trained and how; only the same job may go on from here."""
    files: tuple[SnapshotFile, ...]


class _State(Frozen):
    """`state.json`."""

    step: int
    seconds: float
    num_tokens: int
    num_supervised_tokens: int
    best_loss: float
    best_step: int
    num_measured_since_best: int
    stopped_early: bool
    optimizer_numbers: dict[str, int | float]
    passes: tuple[Passes, ...] = ()
    """By rank; snapshots of older versions have none."""


class SnapshotWriter:
    """Saves when it is time to, and clears away what is no longer needed.

    Args:
        scratch: The job's scratch folder.
        config: When to save and how many to keep.
        attempt: The right to write.
        job: Fingerprint of the job.

    Raises:
        StoreError: There is no room for a folder, say.
    """

    def __init__(self, scratch: Path, config: SnapshotConfig, attempt: Attempt, job: str) -> None:
        self._root = scratch / FOLDER
        self._config, self._attempt, self._job = config, attempt, job
        self._saved_at = time.monotonic()
        self._took_s, self._hurried_until = 0.0, 0.0
        with storing(self._root):
            self._root.mkdir(exist_ok=True)
        self._clear_torsos(attempt.token)  # now: a nearly full store may need the room

    def is_due(self, step: int) -> bool:
        """Say whether to save after ``step``."""
        every, now = self._config.every_steps, time.monotonic()
        by_step = every is not None and step % every == 0
        every_s = self._config.every_s if now > self._hurried_until else self._took_s
        return by_step or now - self._saved_at >= every_s

    def hurry(self) -> None:
        """For some minutes, save after each step, but spend no more than half of the time on it."""
        self._hurried_until = time.monotonic() + HURRY_S

    def save(self, state: TrainingState) -> Path:
        """Write a snapshot; afterwards remove those beyond ``config.keep``.

        Raises:
            StoreError: There is no room, say; earlier snapshots are untouched.
            LaunchError: A newer attempt has taken over.
        """
        self._attempt.require_current()
        begun = time.monotonic()
        name = _name(state.position.step, self._attempt.token)
        hidden = self._root / f".{name}.tmp"
        shutil.rmtree(hidden, ignore_errors=True)
        try:
            with storing(self._root / name):
                hidden.mkdir()
                _write_files(hidden, state)
                _seal(hidden, state.position.step, self._attempt.token, self._job)
                self._attempt.require_current()
                shutil.rmtree(self._root / name, ignore_errors=True)
                hidden.rename(self._root / name)
                sync(self._root)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
        self._saved_at = time.monotonic()
        self._took_s = self._saved_at - begun
        self._clear(self._root / name)
        return self._root / name

    def _clear(self, newest: Path) -> None:
        """Remove what ``newest`` makes superfluous; never what a newer attempt has written.

        A worker may sleep for minutes before any line of this, so asking whether it is current is
        not enough: what it removes must be superfluous whoever else writes here.
        """
        self._attempt.require_current()
        with storing(self._root, "read"):
            ours = [f for f in snapshots_in(self._root) if f != newest and _is_before(f, newest)]
        for folder in ours[self._config.keep - 1 :]:
            shutil.rmtree(folder, ignore_errors=True)
        self._clear_torsos(self._attempt.token)

    def _clear_torsos(self, token: str) -> None:
        """Remove what attempts up to ``token``'s began to save and did not end."""
        with storing(self._root, "read"):
            hidden = [path for path in self._root.iterdir() if _TORSO.fullmatch(path.name)]
        for folder in hidden:
            if _token_of(folder) <= _numbers(token):
                shutil.rmtree(folder, ignore_errors=True)


def _name(step: int, attempt: str) -> str:
    return f"step_{step:08d}-{attempt}"


def _token_of(folder: Path) -> tuple[int, int]:
    """Return launch and start of the attempt that a snapshot, or its torso, is of."""
    return _numbers(folder.name.removesuffix(".tmp").partition("-")[2])


def _numbers(token: str) -> tuple[int, int]:
    launch, _, start = token.partition(".")
    return int(launch), int(start)


def _is_before(folder: Path, other: Path) -> bool:
    """Say whether a snapshot is of no later step and no newer attempt than another."""
    return step_of(folder) <= step_of(other) and _token_of(folder) <= _token_of(other)


def step_of(folder: Path) -> int:
    """Return the step after which a snapshot was taken, by its name."""
    return int(folder.name.removeprefix("step_").partition("-")[0])


def snapshots_in(root: Path) -> list[Path]:
    """Return the snapshots' folders, newest first, verified or not.

    Raises:
        OSError: ``root`` cannot be read; from Python 3.13 on, `glob` would find it empty.
    """
    try:
        folders = [path for path in root.iterdir() if path.name.startswith("step_")]
    except FileNotFoundError:
        return []
    return sorted(folders, key=lambda folder: folder.name, reverse=True)


def newest_step(scratch: Path) -> int:
    """Return the step of the newest snapshot, verified or not; 0: there is none.

    Raises:
        OSError: It cannot be seen.
    """
    return max(map(step_of, snapshots_in(scratch / FOLDER)), default=0)


def load_adapter(folder: Path) -> dict[str, Tensor]:
    """Return the trained parameters in a snapshot, by name, on the CPU; verify it first."""
    tensors: dict[str, Tensor] = load_file(folder / _ADAPTER)
    return tensors


def newest_valid(scratch: Path, job: str, notes: list[str]) -> Path | None:
    """Return the newest snapshot of which every byte is right; set damaged ones aside, aloud.

    Raises:
        StoreError: One cannot be read just now, which says nothing of its bytes.
    """
    with storing(scratch / FOLDER, "read"):
        folders = snapshots_in(scratch / FOLDER)
    for folder in folders:
        problem = _damage_or_way_out(folder, job)
        if problem is None:
            return folder
        with storing(folder):
            folder.rename(folder.with_name(f"damaged_{folder.name}"))
        notes.append(f"Snapshot {folder.name} cannot be used: {problem}; trying the one before it.")
    return None


def _damage_or_way_out(folder: Path, job: str) -> str | None:
    try:
        return damage(folder, job)
    except StoreError as error:
        raise StoreError(
            error.what,
            why="A snapshot that cannot be read just now may be whole, so it is not passed over.",
            fix=f"{error.fix} Should it stay so, move {folder} away: training goes on from the "
            "snapshot before it.",
        ) from error


def damage(folder: Path, job: str) -> str | None:
    """Say what is wrong with a snapshot, or return None.

    Raises:
        StoreError: It cannot be read, so nobody can say.
    """
    with storing(folder, "read"):
        return _damage(folder, job)


def _damage(folder: Path, job: str) -> str | None:
    try:
        text = (folder / MANIFEST_FILE).read_text("utf-8")
        manifest = SnapshotManifest.model_validate_json(text)
    except (FileNotFoundError, UnicodeDecodeError, ValidationError):
        return f"its {MANIFEST_FILE} is missing or damaged"
    if manifest.schema_version != SCHEMA or manifest.job != job:
        return "it belongs to another job or another version of this program"
    if folder.name != _name(manifest.step, manifest.attempt):
        return f"its {MANIFEST_FILE} is damaged, or another snapshot's"
    found = (_damage_of(folder / file.name, file) for file in manifest.files)
    return next(filter(None, found), None)


def _damage_of(path: Path, sealed: SnapshotFile) -> str | None:
    try:
        is_whole = path.stat().st_size == sealed.size_bytes and file_digest(path) == sealed.sha256
    except FileNotFoundError:
        return f"{path.name} is missing"
    return None if is_whole else f"{path.name} is damaged"


def load(folder: Path) -> TrainingState:
    """Read a snapshot that `newest_valid` returned.

    Raises:
        StoreError: This node cannot read it.
    """
    with storing(folder, "read"):
        return _load(folder)


def passes_of_newest(scratch: Path, job: str) -> tuple[Passes, ...]:
    """Return how workers made their passes when the newest snapshot was taken; none: unknown.

    Asked before the base is loaded, so nothing is verified: it says what would be good to do again.

    Raises:
        StoreError: It cannot be read just now.
    """
    with storing(scratch / FOLDER, "read"):
        for folder in snapshots_in(scratch / FOLDER)[:1]:
            with suppress(FileNotFoundError, UnicodeDecodeError, ValidationError):
                text = (folder / MANIFEST_FILE).read_text("utf-8")
                if SnapshotManifest.model_validate_json(text).job == job:
                    return _State.model_validate_json((folder / _STATE).read_text("utf-8")).passes
    return ()


def _load(folder: Path) -> TrainingState:
    state = _State.model_validate_json((folder / _STATE).read_text("utf-8"))
    saved = state.model_dump(exclude={"optimizer_numbers", "passes"})
    best = load_file(folder / _BEST) if (folder / _BEST).exists() else None
    return TrainingState(
        position=Position(**saved, best_adapter=best),
        adapter=load_file(folder / _ADAPTER),
        optimizer=OptimizerState(load_file(folder / _OPTIMIZER), state.optimizer_numbers),
        steps=read_journal(folder / _JOURNAL),
        passes=state.passes,
    )


def _write_files(folder: Path, state: TrainingState) -> None:
    position = dict(vars(state.position))
    best = position.pop("best_adapter")
    numbers = state.optimizer.numbers
    saved = _State(**position, optimizer_numbers=numbers, passes=state.passes)
    lines = "".join(step.model_dump_json() + "\n" for step in state.steps)
    _write_tensors(folder / _ADAPTER, state.adapter)
    _write_tensors(folder / _OPTIMIZER, state.optimizer.tensors)
    if best is not None:
        _write_tensors(folder / _BEST, best)
    write_durably(folder / _JOURNAL, lines.encode())
    write_durably(folder / _STATE, saved.model_dump_json().encode())


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_durably(path, save(on_cpu))


def _seal(folder: Path, step: int, attempt: str, job: str) -> None:
    files = tuple(
        SnapshotFile(name=path.name, size_bytes=path.stat().st_size, sha256=file_digest(path))
        for path in sorted(folder.iterdir())
    )
    manifest = SnapshotManifest(
        schema_version=SCHEMA, step=step, attempt=attempt, job=job, files=files
    )
    write_durably(folder / MANIFEST_FILE, manifest.model_dump_json(indent=1).encode())
    sync(folder)
