"""What is known of each run: one small file, continued by the next call if the run was killed.

::

    <store>/runs/<run id>/record.json    recipe, state, attempts, artefacts with their facts
                         /owner.lock     held by the process that runs it
                         /...            the tracker's journal lies here too

A killed process cannot say that it was killed. So a record says `running` and its owner holds a
`flock`: if nobody holds it, the run was interrupted. That needs no pid, no boot id and no clock,
and it works between containers that share a disk. The same recipe called again then takes the
record over, and with it the MLflow run: one run, several attempts. A completed one is never
continued: the same recipe tomorrow night is a new run.
"""

import fcntl
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from qlora_core.artifacts import Artifact, F, Frozen
from qlora_core.config import RunConfig
from qlora_core.errors import UserError, storage_error, storing
from qlora_core.fingerprint import fingerprint

SCHEMA = 1
State = Literal["running", "completed", "failed", "cancelled", "interrupted"]
_RECORD, _LOCK = "record.json", "owner.lock"
_SHOWN = 8


class ArtifactRef(Frozen):
    """An artefact of a run, with what was counted and measured, readable without a tensor."""

    stage: str
    key: str
    digest: str
    path: Path
    cached: bool
    """The store had it before this run asked."""
    facts: dict[str, Any]


class Attempt(Frozen):
    """One process that worked at a run."""

    prefect_flow_run_id: str
    host: str
    pid: int
    started: str
    """UTC, ISO 8601."""
    ended: str | None = None
    state: State = "running"


class RunRecord(Frozen):
    """All that is known of a run."""

    schema_version: int = SCHEMA
    run_id: str
    config: RunConfig
    recipe: str
    """SHA-256 of the whole recipe: runs that share it may continue each other."""
    state: State
    """`interrupted`: it says `running`, but no process holds it."""
    attempts: tuple[Attempt, ...]
    artifacts: dict[str, ArtifactRef] = Field(default_factory=dict)
    """By role: `data`, `base`, `adapter`, `base_report`, `tuned_report`, `merged`,
    `merged_report`, `registered`."""
    mlflow_run_id: str | None = None
    error: str | None = None

    @property
    def started(self) -> str:
        """When the first attempt began [UTC, ISO 8601]."""
        return self.attempts[0].started


class OpenRecord:
    """A record whose run this process is; its folder stays locked until `close`.

    After that it may be another process's, and nothing is written any more. Each method raises a
    `StoreError` where the store cannot be written.
    """

    def __init__(self, folder: Path, record: RunRecord, lock: TextIOWrapper) -> None:
        self.folder, self.record = folder, record
        self._lock, self._writing = lock, threading.Lock()

    def add(self, role: str, artifact: Artifact[F], *, cached: bool) -> None:
        """Write down an artefact of this run."""
        ref = ArtifactRef(
            stage=artifact.stage,
            key=artifact.key,
            digest=artifact.digest,
            path=artifact.path,
            cached=cached,
            facts=artifact.facts.model_dump(mode="json"),
        )
        with self._writing:
            self._change(artifacts={**self.record.artifacts, role: ref})

    def track(self, mlflow_run_id: str) -> None:
        """Write down which MLflow run this is."""
        with self._writing:
            self._change(mlflow_run_id=mlflow_run_id)

    def close(self, state: State, error: str | None = None) -> RunRecord:
        """Write down how it ended and let go of it; only the first call counts."""
        with self._writing:
            ended = _with_last_attempt(self.record, ended=_now(), state=state)
            try:
                self._change(state=state, error=error, attempts=ended)
            finally:
                self._lock.close()
        return self.record

    def _change(self, **changes: Any) -> None:
        if self._lock.closed:
            return
        self.record = self.record.model_copy(update=changes)
        with storing(self.folder / _RECORD):
            _write(self.folder, self.record)


def open_record(store: Path, config: RunConfig, prefect_flow_run_id: str) -> OpenRecord:
    """Continue the newest unfinished run of this recipe that nobody works at, or begin one.

    Raises:
        StoreError: ``store`` cannot be written.
    """
    attempt = Attempt(
        prefect_flow_run_id=prefect_flow_run_id,
        host=platform.node(),
        pid=os.getpid(),
        started=_now(),
    )
    recipe = _recipe(config)
    with _locked(store / "runs"):
        return _continued(store, recipe, attempt) or _begun(store, config, recipe, attempt)


def records(store: Path) -> list[RunRecord]:
    """Return all records, newest first; one that cannot be read is not a record."""
    folders = (store / "runs").glob(f"*/{_RECORD}")
    found = [record for path in folders if (record := _read(path.parent))]
    return sorted(found, key=lambda record: (record.attempts[-1].started, record.run_id))[::-1]


def has_adapter(store: Path, config: RunConfig) -> bool:
    """Say whether a run of this very recipe has trained already, or found that another had."""
    recipe = _recipe(config)
    return any(each.recipe == recipe and "adapter" in each.artifacts for each in records(store))


def load_record(
    store: Path, run: str | None = None, is_wanted: Callable[[RunRecord], bool] = lambda _: True
) -> RunRecord:
    """Return the record of ``run`` (its id or how it begins), or the newest that is wanted.

    Raises:
        UserError: There is no such run, or several begin like this.
    """
    known = records(store)
    if not known:
        raise UserError(
            f"no run is known in {store}.",
            fix="Start one: qlora run FILE. One that is kept elsewhere: --store FOLDER",
        )
    return _named(store, known, run) if run else _newest(store, known, is_wanted)


def _newest(
    store: Path, known: list[RunRecord], is_wanted: Callable[[RunRecord], bool]
) -> RunRecord:
    if found := next(filter(is_wanted, known), None):
        return found
    raise UserError(
        f"none of the {len(known)} runs in {store} has got that far.",
        why=f"The newest, {known[0].run_id}, is {known[0].state}.",
        fix="Finish one with `qlora run FILE`; `qlora show --all` lists them.",
    )


def _named(store: Path, known: list[RunRecord], run: str) -> RunRecord:
    matching = [r for r in known if r.run_id.startswith(run)]
    exact = [r for r in matching if r.run_id == run]
    if len(exact or matching) == 1:
        return (exact or matching)[0]
    if matching:
        raise UserError(
            f"{len(matching)} runs begin with {run!r}.",
            fix=f"Say which; the newest first: {_listed(matching)}.",
        )
    raise UserError(
        f"no run {run!r} is known in {store}.",
        fix=f"The newest are: {_listed(known)}. One that is kept elsewhere: --store FOLDER",
    )


def _listed(found: list[RunRecord]) -> str:
    more = f" and {len(found) - _SHOWN} more (qlora show --all)" if len(found) > _SHOWN else ""
    return ", ".join(record.run_id for record in found[:_SHOWN]) + more


def bury_interrupted(store: Path) -> list[str]:
    """Return the Prefect runs whose processes are gone, once: they are then marked here as ended.

    A run stays `interrupted`, and so can be continued; only its attempt is over.
    """
    gone = []
    with _locked(store / "runs"):
        for record in records(store):
            last = record.attempts[-1]
            if record.state == "interrupted" and last.state == "running":
                attempts = _with_last_attempt(record, ended=_now(), state="interrupted")
                buried = record.model_copy(update={"attempts": attempts})
                _write(store / "runs" / record.run_id, buried)
                gone.append(last.prefect_flow_run_id)
    return gone


def _continued(store: Path, recipe: str, attempt: Attempt) -> OpenRecord | None:
    for record in records(store):
        folder = store / "runs" / record.run_id
        if record.recipe != recipe or record.state == "completed":
            continue
        if lock := _try_lock(folder, attempts=3):
            again = {"state": "running", "error": None, "attempts": (*record.attempts, attempt)}
            taken = OpenRecord(folder, record.model_copy(update=again), lock)
            _write(folder, taken.record)
            return taken
    return None


def _recipe(config: RunConfig) -> str:
    return fingerprint(config.model_dump(mode="json"))


def _begun(store: Path, config: RunConfig, recipe: str, attempt: Attempt) -> OpenRecord:
    when = datetime.fromisoformat(attempt.started).strftime("%Y%m%d-%H%M%S")
    run_id = f"{config.name}-{when}-{secrets.token_hex(2)}"
    folder = store / "runs" / run_id
    folder.mkdir(parents=True)
    lock = _try_lock(folder)
    assert lock is not None, "a folder just made under the store's lock is nobody else's"  # noqa: S101
    record = RunRecord(
        run_id=run_id, config=config, recipe=recipe, state="running", attempts=(attempt,)
    )
    _write(folder, record)
    return OpenRecord(folder, record, lock)


def _with_last_attempt(record: RunRecord, **changes: Any) -> tuple[Attempt, ...]:
    return (*record.attempts[:-1], record.attempts[-1].model_copy(update=changes))


def _read(folder: Path) -> RunRecord | None:
    try:
        record = RunRecord.model_validate_json((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None
    if record.state == "running" and not _is_owned(folder):
        return record.model_copy(update={"state": "interrupted"})
    return record


def _is_owned(folder: Path) -> bool:
    with (folder / _LOCK).open() as handle:
        try:
            fcntl.flock(
                handle.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB
            )  # shared: askers never clash
        except BlockingIOError:
            return True
        return False


def _write(folder: Path, record: RunRecord) -> None:
    made = folder / f".{_RECORD}.new"
    text = json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False)
    with made.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    made.replace(folder / _RECORD)


def _try_lock(folder: Path, attempts: int = 1) -> TextIOWrapper | None:
    handle = (folder / _LOCK).open("a")
    for attempt in range(attempts):
        try:
            fcntl.flock(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:  # its owner, or somebody who asks for a moment whether it has one
            time.sleep(0.1 * (attempt < attempts - 1))
    handle.close()
    return None


@contextmanager
def _locked(runs: Path) -> Iterator[None]:
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with (runs / ".lock").open("a") as handle:
            fcntl.flock(handle.fileno(), fcntl.LOCK_EX)
            yield
    except OSError as error:  # what is done under the lock writes here as well
        raise storage_error(error, error.filename or runs) from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
