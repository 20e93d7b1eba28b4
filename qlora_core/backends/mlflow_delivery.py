"""Bring one journal to one MLflow run: each (metric, step) exactly once, however often it breaks.

MLflow keeps a point that is sent twice with another time as two points, and an answer that got lost
leaves the sender not knowing. So: the first value of a (metric, step) wins; before sending to a run
that was used before, or after any failure, the server is asked which steps it has; and before a run
ends, its points are compared with the journal and what is missing is sent again.

What MLflow cannot take is not dropped in silence: infinities (it would store 1.8e308) become tags
`nonfinite.<metric>`, a parameter that changed on resume becomes a tag `changed.<param>`, and what
it refuses for good is counted.
"""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_core.backends.journal import (
    DatasetRecord,
    EndRecord,
    Entry,
    FileRecord,
    Journal,
    MetricsRecord,
    Page,
    ParamsRecord,
    StartRecord,
    TagsRecord,
)
from qlora_core.backends.masking import mask_credentials
from qlora_core.backends.mlflow_client import connect, is_refused
from qlora_core.backends.mlflow_run import (
    Destination,
    create_run,
    find_run,
    load_destination,
    save_destination,
)

_DIGEST_CHARS = 36  # mlflow.utils.validation.MAX_DATASET_DIGEST_SIZE
_VALUE_CHARS = 6000  # ... MAX_PARAM_VAL_LENGTH
_MOST = {"metrics": 1000, "params": 100, "tags": 100}  # of one log_batch
_ENTRIES_AT_ONCE = 100
_FORBIDDEN = re.compile(r"[^\w\-. :/]")

PointKey = tuple[str, int]
"""Metric and step."""


@dataclass
class _Batch:
    """What one `log_batch` sends, still as plain values."""

    points: dict[PointKey, tuple[float, int]] = field(default_factory=dict)
    """Value and time [ms]."""
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


class Delivery:
    """Sends a journal's entries, oldest first, and remembers how far it got.

    Not safe for several threads; of several processes only the one that holds `Journal.sending`
    may use it.
    """

    def __init__(self, journal: Journal, destination: Destination) -> None:
        self.journal = journal
        self.destination = destination
        self.num_refused = 0
        self.refusal = ""
        self._client: Any = None
        self._page: Page | None = None
        self._waiting: list[Entry] = []
        self._sent: set[PointKey] = set()
        self._asked: set[str] = set()
        self._params: dict[str, str] = {}
        self._infinite: dict[str, list[int]] = {}

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once there is one."""
        return self.destination.run_id

    def deliver(self) -> None:
        """Send everything that waits.

        Raises:
            Exception: Whatever MLflow raises; what was not acknowledged is sent by the next call.
        """
        try:
            if self._client is None:
                self._open()
            self._read()
            while self._waiting:
                self._send_some()
        except Exception:
            self._client = None  # so that the next call asks the server what it has
            raise

    def num_waiting(self) -> int:
        """Return how many entries no server has yet."""
        return self.journal.num_waiting()

    # -- the run ---------------------------------------------------------------------------------

    def _open(self) -> None:
        kept = load_destination(self.journal.folder)
        if kept and kept.run_id:  # perhaps made by a predecessor that was still dying
            self.destination = self.destination.model_copy(update={"run_id": kept.run_id})
        client = connect(self.destination.tracking_uri)
        run = find_run(client, self.destination)
        if run is None:
            self.journal.acknowledge(0)  # a new run has nothing yet, whatever another had
            run = create_run(client, self.destination)
        self._keep(run.info.run_id)
        self._client = client
        self._params = dict(run.data.params)
        self._page, self._waiting = None, []
        self._sent, self._asked, self._infinite = set(), set(), {}

    def _keep(self, run_id: str) -> None:
        if run_id != self.destination.run_id:
            self.destination = self.destination.model_copy(update={"run_id": run_id})
            save_destination(self.journal.folder, self.destination)

    # -- entries ---------------------------------------------------------------------------------

    def _read(self) -> None:
        page = self.journal.read(self._page)
        acknowledged = self.journal.acknowledged()
        if page.num_lines > acknowledged:
            self.journal.sync()  # a server must not know more than the disk
        for entry in page.entries:
            if entry.number > acknowledged:
                self._waiting.append(entry)
            else:
                self._add(_Batch(), entry)  # only to remember what was sent
        self._page = page.model_copy(update={"entries": ()})
        if page.num_damaged:
            self._refuse(f"{page.num_damaged} damaged lines of {self.journal.folder}")
        if not self._waiting and acknowledged < page.num_lines:
            self.journal.acknowledge(page.num_lines)

    def _send_some(self) -> None:
        count = len(list(itertools.takewhile(_fits_a_batch, self._waiting[:_ENTRIES_AT_ONCE])))
        entries = self._waiting[: max(1, count)]
        self._send_or_refuse(entries)
        self.journal.acknowledge(entries[-1].number)
        del self._waiting[: len(entries)]

    def _send_or_refuse(self, entries: list[Entry]) -> None:
        try:
            self._send(entries)
        except Exception as error:
            if not (is_refused(error) or isinstance(error, FileNotFoundError)):
                raise
            if self._is_gone():
                raise
            if len(entries) == 1:
                return self._refuse(f"{entries[0].record.kind} {entries[0].number}: {error}")
            for entry in entries:
                self._send_or_refuse([entry])

    def _is_gone(self) -> bool:
        return bool(self._client.get_run(self.run_id).info.lifecycle_stage == "deleted")

    def _refuse(self, reason: str) -> None:
        self.num_refused += 1
        self.refusal = self.refusal or mask_credentials(reason)

    def _send(self, entries: list[Entry]) -> None:
        match entries[0].record:
            case DatasetRecord() as record:
                self._client.log_inputs(self.run_id, datasets=[_dataset(record)])
            case FileRecord() as record:
                self._send_file(record)
            case StartRecord():
                self._client.update_run(self.run_id, status="RUNNING")
            case EndRecord() as record:
                self._end(record, entries[0].time_ms)
            case _:
                self._send_batch(entries)

    def _end(self, record: EndRecord, time_ms: int) -> None:
        self._reconcile()
        self._client.set_terminated(self.run_id, status=record.status, end_time=time_ms)

    def _send_file(self, record: FileRecord) -> None:
        path, folder = self.journal.folder / record.copy_at, record.folder or None
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), folder)
        else:
            self._client.log_artifact(self.run_id, str(path), folder)

    def _send_batch(self, entries: list[Entry]) -> None:
        self._ask_for_steps({_key(name) for name in _metric_names(entries)})
        batch = _Batch()
        for entry in entries:
            self._add(batch, entry)
        try:
            self._log(batch)
        except Exception:
            self._sent.difference_update(batch.points)
            raise
        self._params |= batch.params

    def _add(self, batch: _Batch, entry: Entry) -> None:
        match entry.record:
            case MetricsRecord() as record:
                for name, value in record.values.items():
                    self._add_point(batch, (_key(name), record.step), value, entry.time_ms)
            case ParamsRecord() as record:
                for name, text in record.values.items():
                    self._add_param(batch, _key(name), _shortened(text))
            case TagsRecord() as record:
                batch.tags |= {_key(n): _shortened(v) for n, v in record.values.items()}
            case _:
                pass

    def _add_point(self, batch: _Batch, key: PointKey, value: float, time_ms: int) -> None:
        name, step = key
        if math.isinf(value):
            steps = self._infinite.setdefault(name, [])
            steps += [step] if step not in steps else []
            more = f" and {len(steps) - 1} more" if len(steps) > 1 else ""
            batch.tags[f"nonfinite.{name}"] = f"infinite at step {steps[0]}{more}"
        elif key not in self._sent:
            self._sent.add(key)
            batch.points[key] = (value, time_ms)

    def _add_param(self, batch: _Batch, name: str, value: str) -> None:
        known = self._params.get(name, batch.params.get(name))
        if known is None:
            batch.params[name] = value
        elif known != value:
            batch.tags[f"changed.{name}"] = value

    # -- the server ------------------------------------------------------------------------------

    def _ask_for_steps(self, names: set[str]) -> None:
        for name in names - self._asked:
            history = self._client.get_metric_history(self.run_id, name)
            self._sent |= {(name, metric.step) for metric in history}
            self._asked.add(name)

    def _log(self, batch: _Batch) -> None:
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(n, v, ms, step) for (n, step), (v, ms) in batch.points.items()]
        params = [Param(name, value) for name, value in batch.params.items()]
        tags = [RunTag(name, value) for name, value in batch.tags.items()]
        chunks: Iterable[tuple[list[Any], ...]] = itertools.zip_longest(
            _chunks(metrics, _MOST["metrics"]),
            _chunks(params, _MOST["params"]),
            _chunks(tags, _MOST["tags"]),
            fillvalue=[],
        )
        for some_metrics, some_params, some_tags in chunks:
            self._client.log_batch(
                self.run_id, metrics=some_metrics, params=some_params, tags=some_tags
            )

    def _reconcile(self) -> None:
        """Send again what the journal has and the server, against its own word, has not."""
        self._asked.clear()
        self._sent.clear()
        entries = [e for e in self.journal.read().entries if isinstance(e.record, MetricsRecord)]
        for start in range(0, len(entries), _ENTRIES_AT_ONCE):
            self._send_batch(entries[start : start + _ENTRIES_AT_ONCE])


def _fits_a_batch(entry: Entry) -> bool:
    return isinstance(entry.record, MetricsRecord | ParamsRecord | TagsRecord)


def _metric_names(entries: Iterable[Entry]) -> Iterator[str]:
    for entry in entries:
        if isinstance(entry.record, MetricsRecord):
            yield from entry.record.values


def _key(name: str) -> str:
    """Return ``name`` with what MLflow's keys cannot hold replaced."""
    return _FORBIDDEN.sub("_", name)[:250]


def _shortened(value: str) -> str:
    if len(value) <= _VALUE_CHARS:
        return value
    end = f" ... ({len(value)} characters)"
    return value[: _VALUE_CHARS - len(end)] + end


def _dataset(record: DatasetRecord) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    is_local = record.source.startswith(("/", "file:"))
    source: Mapping[str, str] = {"uri": record.source} if is_local else {"path": record.source}
    dataset = Dataset(
        name=record.name,
        digest=record.digest[:_DIGEST_CHARS],
        source_type="local" if is_local else "hugging_face",
        source=json.dumps(source),
        profile=json.dumps({"num_rows": record.num_rows}),
    )
    tags = {"mlflow.data.context": record.context, "digest": record.digest}
    return DatasetInput(dataset, [InputTag(key, value) for key, value in tags.items()])


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
