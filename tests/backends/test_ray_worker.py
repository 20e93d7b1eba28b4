"""What a worker does with an error, on a store that can hold it and on one that cannot."""

import errno
import json

import pytest

from qlora_core.backends import ray_worker
from qlora_core.backends.ray_worker import RaySpec, WorkerOrder, train_on_worker
from qlora_core.config import AdapterConfig, QuantizationConfig, SnapshotConfig, TrainingConfig
from qlora_core.errors import (
    CollectiveError,
    DeviceError,
    StoreError,
    TrainingError,
    storage_error,
)
from qlora_core.ports import TrainJob
from qlora_core.training.durable import hidden_name, reserve
from qlora_core.training.incidents import history
from tests.training.faulty_disk import FaultyDisk, numberless

FULL = storage_error(OSError(errno.ENOSPC, "full"), "snapshots")


@pytest.fixture
def spec(tmp_path, monkeypatch):
    def full(*_):
        raise FULL

    monkeypatch.setattr(ray_worker, "_train", full)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    job = TrainJob(
        base=tmp_path,
        data=tmp_path,
        out=tmp_path / "out",
        scratch=scratch,
        quantization=QuantizationConfig(),
        adapter=AdapterConfig(),
        training=TrainingConfig(),
        seed=0,
    )
    return RaySpec(job=job, snapshots=SnapshotConfig(), launch="0001", log=scratch / "ray.log")


def train(spec: RaySpec) -> None:
    train_on_worker(WorkerOrder(spec=spec).model_dump(mode="json"))


def left(spec: RaySpec) -> list[dict[str, str]]:
    return [json.loads(file.read_text()) for file in spec.job.scratch.glob("error*.json")]


def test_an_error_that_is_final_is_left_for_the_launcher(spec):
    with pytest.raises(StoreError, match="disk is full"):
        train(spec)

    assert left(spec) == [FULL.to_json()]


def test_an_error_that_nobody_has_thought_of_opens_no_doors(spec, monkeypatch):
    def fetch(*_):
        raise ValueError("no route to https://me:c4nary@host/base with Bearer c4nary")

    monkeypatch.setattr(ray_worker, "_train", fetch)

    with pytest.raises(TrainingError) as caught:
        train(spec)

    assert "https://***@host/base with Bearer ***" in caught.value.what
    assert "c4nary" not in f"{caught.value} {left(spec)}"


def test_an_error_goes_into_the_room_that_was_taken_where_there_is_none_left(spec, monkeypatch):
    reserve(spec.error_file)
    disk = FaultyDisk((spec.job.scratch,)).install(monkeypatch)
    hidden = numberless(hidden_name(spec.error_file).name)
    disk.fail_at(f"open scratch/{hidden} wb", errno.ENOSPC)

    with pytest.raises(StoreError, match="disk is full"):
        train(spec)

    assert left(spec) == [FULL.to_json()]


@pytest.mark.parametrize("is_reserved", [True, False])
def test_where_no_error_can_be_left_ray_gets_the_error_itself(spec, is_reserved, monkeypatch):
    """And brings it to the driver, after as many tries as it is allowed."""
    if is_reserved:
        reserve(spec.error_file)

    def read_only(source, _):
        raise OSError(errno.EROFS, "Read-only file system", str(source))

    monkeypatch.setattr("os.replace", read_only)

    with pytest.raises(StoreError) as caught:
        train(spec)

    assert caught.value.to_json() == FULL.to_json()
    assert left(spec) == []


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DeviceError("A GPU of node7 has failed."), "lost_gpu"),
        (CollectiveError("worker 0 lost the others"), "collective"),
    ],
)
def test_a_loss_that_ray_mends_is_noted_and_not_left_for_the_launcher(
    error, kind, spec, monkeypatch
):
    def lose(*_):
        raise error

    monkeypatch.setattr(ray_worker, "_train", lose)

    with pytest.raises(type(error)):
        train(spec)

    assert left(spec) == []
    assert [incident.kind for incident in history(spec.job.scratch)] == [kind]


def test_a_store_that_cannot_be_asked_for_an_error_is_told_as_that(spec, monkeypatch):
    disk = FaultyDisk((spec.job.scratch,)).install(monkeypatch)
    disk.fail_at(f"stat scratch/{numberless(spec.error_file.name)}", errno.ESTALE)

    with pytest.raises(StoreError, match=r"cannot read .*lost track"):
        train(spec)


def test_an_error_that_is_not_there_in_full_yet_is_asked_for_again(spec):
    seen = [spec.final_error()]
    for text in ("", '{"type": "StoreEr', json.dumps(FULL.to_json()) + " " * 100):
        spec.error_file.write_text(text)
        seen.append(spec.final_error())

    assert seen[:3] == [None, None, None]
    assert seen[3].to_json() == FULL.to_json()


def test_an_error_that_cannot_be_read_is_not_taken_for_none(spec, monkeypatch):
    spec.error_file.write_text("{}")
    disk = FaultyDisk((spec.job.scratch,)).install(monkeypatch)
    disk.fail_at(f"open scratch/{numberless(spec.error_file.name)} r", errno.EIO)

    with pytest.raises(StoreError, match="cannot read"):
        spec.final_error()
