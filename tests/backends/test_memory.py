import inspect
from pathlib import Path

import pytest

from qlora_core.artifacts import Metric
from qlora_core.backends.memory import (
    MemoryRegistry,
    MemoryTracker,
    RecordingProgress,
    SilentProgress,
)
from qlora_core.ports import Candidate, Progress, Registry, Tracker


def candidate(folder: Path, text: str, **changes) -> Candidate:
    folder.mkdir(exist_ok=True)
    (folder / "weights").write_text(text)
    metrics = {"loss": Metric(value=1.0, num_rows=3)}
    fields = {"name": "cron", "adapter": folder, "merged": None, "base": "b", "tags": {}}
    fields |= {"dataset_digest": "d", "metrics": metrics}
    return Candidate(**(fields | changes))


@pytest.mark.parametrize(
    ("service", "port"),
    [
        (MemoryTracker, Tracker),
        (MemoryRegistry, Registry),
        (SilentProgress, Progress),
        (RecordingProgress, Progress),
    ],
)
def test_they_offer_what_the_ports_ask_for(service, port):
    for name in (name for name in vars(port) if not name.startswith("_")):
        wanted = inspect.signature(getattr(port, name))
        assert inspect.signature(getattr(service, name)) == wanted


def test_a_metric_and_step_counts_once_and_params_are_written_once():
    tracker = MemoryTracker()

    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.log_metrics({"loss": 2.0}, 1)
    tracker.log_metrics({"loss": 3.0}, 2)
    tracker.log_params({"rank": 8})
    tracker.log_params({"rank": 16, "alpha": 32})

    assert tracker.metrics == {"loss": {1: 1.0, 2: 3.0}}
    assert tracker.params == {"rank": 8, "alpha": 32}


def test_the_same_files_are_the_same_version(tmp_path):
    registry = MemoryRegistry()

    versions = [
        registry.register(candidate(tmp_path / "a", "1")),
        registry.register(candidate(tmp_path / "b", "2")),
        registry.register(candidate(tmp_path / "c", "1")),
        registry.register(candidate(tmp_path / "a", "1", base="other", merged=tmp_path / "b")),
    ]

    assert versions == [("1", None), ("2", None), ("1", None), ("3", "3")]


def test_the_champion_is_what_was_promoted(tmp_path):
    registry = MemoryRegistry()
    registry.register(candidate(tmp_path / "a", "1", dataset_digest="first"))
    registry.register(candidate(tmp_path / "b", "2", dataset_digest="second"))

    before = registry.champion("cron")
    registry.promote("cron", "1")

    assert before is None
    assert registry.champion("cron").dataset_digest == "first"
    assert registry.aliases["cron"] == {"challenger": "2", "champion": "1"}


def test_a_version_that_is_not_there_cannot_be_promoted():
    registry = MemoryRegistry()

    assert not registry.holds("cron", "1")
    with pytest.raises(KeyError, match="no version 1"):
        registry.promote("cron", "1")


def test_progress_is_kept_in_order():
    progress = RecordingProgress()

    progress.update("train", 1, 10, "loss 2.0")
    progress.say("train", "resumed at step 1")

    assert progress.updates == [("train", 1, 10, "loss 2.0")]
    assert progress.said == [("train", "resumed at step 1")]
