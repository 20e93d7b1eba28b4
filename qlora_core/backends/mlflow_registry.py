"""Publish models in MLflow's registry so that what is downloaded is what was trained.

MLflow's transformers flavor reloads a PEFT model whose base is a local folder with *newly
initialised* base weights, and only a line on the console says so. So nothing is pickled or wrapped
here: the files themselves become the artefacts of a LoggedModel, and
`PeftModel.from_pretrained(base, download)` reads them. (`mlflow.pyfunc.load_model` does not.)

Under `<name>` are the adapters (model type `peft-lora`), under `<name>-merged` the merged models
(`merged`); the tag `qlora.adapter_version` on a merged version says whose it is, and aliases move
together (an adapter that was never merged leaves those of `<name>-merged` where they are). Base,
metrics and dataset are tags, so `champion` reads them without a download. A version carries a
digest of its files and base: publishing the same again finds it.

With local files nothing is copied: the artefacts are hard links to the store's sealed files. MLflow
on a database looks `models:/<id>` up at the *global* tracking address, so there the files' address
is the source; a server resolves its own.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from pydantic import TypeAdapter

from qlora_core.artifacts import Metric
from qlora_core.backends.mlflow_client import (
    connect,
    find_experiment,
    is_absent,
    is_refused,
    unreachable,
)
from qlora_core.errors import UserError
from qlora_core.fingerprint import file_digest, files_below, fingerprint, tree_digest
from qlora_core.ports import Candidate, Champion
from qlora_core.store import MANIFEST, PROVENANCE

CHALLENGER, CHAMPION = "challenger", "champion"
_Metrics = TypeAdapter(dict[str, Metric])


@dataclass(frozen=True)
class _Publication:
    """One folder to publish under one name."""

    name: str
    model_type: str
    folder: Path
    digest: str
    tags: dict[str, str]


class MlflowRegistry:
    """A `Registry` in MLflow.

    Args:
        tracking_uri: MLflow server or database.
        experiment: Where the models are logged.
        artifact_location: Where a new experiment keeps its files; none: the server says.
        run_id: Gives the MLflow run that made the models, if there is one by then.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiment: str,
        artifact_location: str | None = None,
        run_id: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._uri = tracking_uri
        self._experiment = experiment
        self._artifact_location = artifact_location
        self._run_id = run_id

    # -- Registry --------------------------------------------------------------------------------

    def champion(self, name: str) -> Champion | None:
        """Return what `champion` points at, or None.

        Raises:
            LaunchError: MLflow does not answer.
        """
        with self._client() as client:
            version = _aliases(client, name).get(CHAMPION)
            if version is None:
                return None
            tags = client.get_model_version(name, version).tags
        return Champion(
            version=str(version),
            dataset_digest=tags.get("qlora.dataset_digest", ""),
            metrics=_Metrics.validate_json(tags.get("qlora.metrics", "{}")),
        )

    def register(self, candidate: Candidate) -> tuple[str, str | None]:
        """Publish and point `challenger` at it; return (adapter version, merged version).

        Raises:
            LaunchError: MLflow does not answer.
            UserError: MLflow refuses the name or the tags.
        """
        with self._client() as client:
            adapter = _publication(candidate, candidate.name, "peft-lora", candidate.adapter, {})
            version = self._publish(client, adapter, candidate)
            if candidate.merged is None:
                return version, None
            whose = {"qlora.adapter_version": version}
            merged_name = merged_model_name(candidate.name)
            merged = _publication(candidate, merged_name, "merged", candidate.merged, whose)
            return version, self._publish(client, merged, candidate)

    def promote(self, name: str, version: str) -> None:
        """Point `champion` at ``version``, and at the merged model made from it.

        Raises:
            LaunchError: MLflow does not answer.
            UserError: There is no such version.
        """
        with self._client() as client:
            client.set_registered_model_alias(name, CHAMPION, version)
            merged = _find(client, merged_model_name(name), "qlora.adapter_version", version)
            if merged is not None:
                client.set_registered_model_alias(merged_model_name(name), CHAMPION, merged)

    def holds(self, name: str, version: str) -> bool:
        """Say whether that version is (still) there.

        Raises:
            LaunchError: MLflow does not answer.
        """
        with self._client() as client:
            try:
                return bool(client.get_model_version(name, version).current_stage != "Archived")
            except Exception as error:
                if is_absent(error):
                    return False
                raise

    # -- inside ----------------------------------------------------------------------------------

    @contextmanager
    def _client(self) -> Iterator[Any]:
        try:
            client = connect(self._uri)
            yield client
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("mlflow", "requests", "urllib3"):
                raise
            if is_refused(error) or is_absent(error):
                raise UserError(f"MLflow refused: {error}") from error
            raise unreachable(self._uri, error) from error

    def _publish(self, client: Any, publication: _Publication, candidate: Candidate) -> str:
        name = publication.name
        version = _find(client, name, "qlora.digest", publication.digest)
        if version is None:
            version = self._new_version(client, publication, candidate)
        else:
            for key, value in publication.tags.items():  # measured again since, perhaps
                client.set_model_version_tag(name, version, key, value)
        client.set_registered_model_alias(name, CHALLENGER, version)
        return version

    def _new_version(self, client: Any, publication: _Publication, candidate: Candidate) -> str:
        run_id = self._run_id()
        experiment_id = find_experiment(client, self._experiment, self._artifact_location)
        model = client.create_logged_model(
            experiment_id=experiment_id,
            name=publication.name,
            source_run_id=run_id,
            tags=publication.tags,
            params={"base": candidate.base},
            model_type=publication.model_type,
        )
        _store_files(client, model, publication.folder)
        client.finalize_logged_model(model.model_id, "READY")
        if run_id is not None:
            _log_metrics(client, run_id, model.model_id, candidate)
        return self._point_at(client, model, publication, run_id)

    def _point_at(
        self, client: Any, model: Any, publication: _Publication, run_id: str | None
    ) -> str:
        _ensure_name(client, publication.name)
        by_server = self._uri.startswith(("http://", "https://"))
        version = client.create_model_version(
            publication.name,
            source=f"models:/{model.model_id}" if by_server else model.artifact_location,
            run_id=run_id,
            tags=publication.tags,
            model_id=model.model_id if by_server else None,
        ).version
        if not by_server:  # a server writes the way back by itself
            link = json.dumps([{"name": publication.name, "version": int(version)}])
            client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": link})
        return str(version)


def merged_model_name(name: str) -> str:
    """Return the name under which the merged models of ``name`` are registered."""
    return f"{name}-merged"


def _publication(
    candidate: Candidate, name: str, model_type: str, folder: Path, more: dict[str, str]
) -> _Publication:
    files = tree_digest((file, file_digest(folder / file)) for file in _files(folder))
    digest = fingerprint({"files": files, "base": candidate.base})
    tags = candidate.tags | more
    tags |= {
        "qlora.digest": digest,
        "qlora.base": candidate.base,
        "qlora.dataset_digest": candidate.dataset_digest,
        "qlora.metrics": _Metrics.dump_json(candidate.metrics).decode(),
    }
    return _Publication(name, model_type, folder, digest, tags)


def _files(folder: Path) -> list[str]:
    """Return what is published: the files, without what the store writes beside them."""
    return [name for name in files_below(folder) if name not in (MANIFEST, PROVENANCE)]


def _aliases(client: Any, name: str) -> dict[str, str]:
    try:
        return dict(client.get_registered_model(name).aliases)
    except Exception as error:
        if is_absent(error):
            return {}
        raise


def _find(client: Any, name: str, key: str, value: str) -> str | None:
    """Return the newest version with this tag, or None."""
    wanted = f"name = '{name}' and tags.`{key}` = '{value}'"
    versions = [int(found.version) for found in client.search_model_versions(wanted)]
    return str(max(versions)) if versions else None


def _ensure_name(client: Any, name: str) -> None:
    try:
        client.create_registered_model(name)
    except Exception as error:
        if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
            raise


def _log_metrics(client: Any, run_id: str, model_id: str, candidate: Candidate) -> None:
    from mlflow.entities import Metric as Point

    now_ms = time.time_ns() // 1_000_000
    points = [
        Point(f"registered/{name}", metric.value, now_ms, 0, model_id=model_id)
        for name, metric in candidate.metrics.items()
    ]
    client.log_batch(run_id, metrics=points)


def _store_files(client: Any, model: Any, folder: Path) -> None:
    place = urlparse(model.artifact_location)
    if place.scheme == "file" and _link_all(folder, Path(unquote(place.path))):
        return
    for name in _files(folder):
        parent = Path(name).parent.as_posix()
        client.log_model_artifact(
            model.model_id, str(folder / name), None if parent == "." else parent
        )


def _link_all(folder: Path, target: Path) -> bool:
    """Hard-link every file; say whether that worked (another disk, say, has no hard links)."""
    try:
        for name in _files(folder):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.link((folder / name).resolve(), target / name)
    except OSError:
        shutil.rmtree(target, ignore_errors=True)  # a copy must not write through a link
        return False
    return True
