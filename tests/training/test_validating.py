"""Snapshots that are measured beside training."""

import errno
import shutil

import pytest
import torch

from qlora_core.backends.in_process import InProcessLauncher
from qlora_core.config import AdapterConfig, SnapshotConfig
from qlora_core.data.prepared import read_split
from qlora_core.errors import ResourceError
from qlora_core.modeling.hosted import BasePlace, load_hosted
from qlora_core.training import placing, snapshot, validating
from qlora_core.training.placing import place_judged_base
from qlora_core.training.snapshot import FOLDER, snapshots_in, step_of
from qlora_core.training.validating import open_validator
from tests.tiny import bring_own_code
from tests.training.faulty_disk import FaultyDisk

CPU = torch.device("cpu")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_snapshot_measured_elsewhere_has_the_loss_that_training_measured_itself(
    make_job, dropout
):
    job, told = make_job(dropout=dropout, heldout_every=1), []
    InProcessLauncher(SnapshotConfig(every_steps=1, keep=10)).train(job, told.append)

    with open_validator(job, CPU) as validate:
        found = [validate(folder) for folder in snapshots_in(job.scratch / FOLDER)]

    assert {each.step: each.heldout_loss for each in found} == {
        step.step: step.heldout_loss for step in told
    }
    assert len(found) == len(told) == 6


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_base_that_lies_with_the_host_gives_the_same_losses_and_the_first_says_where_it_lies(
    make_job, monkeypatch, dropout
):
    job = make_job(dropout=dropout)
    InProcessLauncher(SnapshotConfig(every_steps=1, keep=10)).train(job, lambda _: None)
    folders = snapshots_in(job.scratch / FOLDER)

    with open_validator(job, CPU) as validate:
        whole = [validate(folder) for folder in folders]
    place = BasePlace(is_hosted=True, notes=("it lies with the host",))
    monkeypatch.setattr(validating, "place_judged_base", lambda *_, **__: place)
    bases = []

    def loading(*given):
        model, base = load_hosted(*given)
        bases.append(base)
        return model, base

    monkeypatch.setattr(validating, "load_hosted", loading)
    with open_validator(job, CPU) as validate:
        hosted = [validate(folder) for folder in folders]

    (base,) = bases
    assert base.num_gathered_bytes >= len(folders) * base.part_bytes
    assert base.present_bytes == 0
    assert [each.heldout_loss for each in hosted] == [each.heldout_loss for each in whole]
    assert [each.note for each in hosted] == ["Beside training it lies with the host.", *[""] * 5]
    assert not any(each.note for each in whole)


def placed(monkeypatch, job, gpu_bytes: int, host_bytes: int = 10**12, *, wants_host=False):
    """Where the base would lie on a GPU, of which only its free memory is asked."""
    monkeypatch.setattr(placing, "memory_for_worker", lambda *_, **__: gpu_bytes)
    monkeypatch.setattr(placing, "free_bytes", lambda: host_bytes)
    rows = read_split(job.data, "train")
    return place_judged_base(job, rows, torch.device("cuda"), wants_host=wants_host)


def test_who_measures_snapshots_keeps_the_base_on_the_gpu_if_it_fits_and_with_the_host_if_not(
    make_job, monkeypatch
):
    job = make_job()

    assert not placed(monkeypatch, job, 10**12).is_hosted
    assert placed(monkeypatch, job, 10**12, wants_host=True).is_hosted
    place = placed(monkeypatch, job, 10**5)
    assert place.is_hosted
    assert "in the host's memory" in place.notes[0]
    with pytest.raises(ResourceError, match="host's memory"):
        placed(monkeypatch, job, 10**5, host_bytes=10**4)


def test_who_measures_snapshots_of_dora_needs_a_gpu_that_holds_the_base(make_job, monkeypatch):
    dora = make_job().model_copy(update={"adapter": AdapterConfig(rank=4, dora=True)})

    assert not placed(monkeypatch, dora, 10**12, wants_host=True).is_hosted
    with pytest.raises(ResourceError, match="starts from all weights"):
        placed(monkeypatch, dora, 10**4)


def test_a_base_that_brings_code_is_whole_as_nobody_can_count_it(make_job, monkeypatch, tmp_path):
    shutil.copytree(make_job().base, tmp_path / "base")
    bring_own_code(tmp_path / "base" / "model")
    mine = make_job().model_copy(update={"base": tmp_path / "base"})

    assert not placed(monkeypatch, mine, 1000).is_hosted


def test_on_a_cpu_the_base_of_who_measures_snapshots_is_whole(make_job):
    job = make_job()

    place = place_judged_base(job, read_split(job.data, "train"), CPU, wants_host=True)

    assert not place.is_hosted


def test_a_snapshot_that_cannot_be_read_just_now_is_told_and_the_next_is_measured(
    make_job, monkeypatch
):
    job = make_job()
    InProcessLauncher(SnapshotConfig(every_steps=1, keep=2)).train(job, lambda _: None)
    newest, before = snapshots_in(job.scratch / FOLDER)

    with open_validator(job, CPU) as validate:
        disk = FaultyDisk((job.scratch,)).install(monkeypatch)
        disk.fail_at("open scratch/snapshots/step_#-#.#/MANIFEST.json r", errno.ESTALE)
        first, second = validate(newest), validate(before)

    assert first.heldout_loss is None
    assert "lost track" in first.note
    assert newest.name in first.note
    assert second.heldout_loss is not None


def test_a_snapshot_that_is_cleared_away_while_it_is_read_is_told(make_job, monkeypatch):
    job = make_job()
    InProcessLauncher(SnapshotConfig(every_steps=1, keep=1)).train(job, lambda _: None)
    (only,) = snapshots_in(job.scratch / FOLDER)
    load = snapshot.load_adapter

    def late(folder):
        shutil.rmtree(folder)
        return load(folder)

    monkeypatch.setattr(snapshot, "load_adapter", late)
    with open_validator(job, CPU) as validate:
        found = validate(only)

    assert found.heldout_loss is None
    assert only.name in found.note


def test_a_damaged_snapshot_and_one_that_is_gone_are_told_and_the_next_is_measured(make_job):
    job = make_job()
    InProcessLauncher(SnapshotConfig(every_steps=1, keep=3)).train(job, lambda _: None)
    whole, damaged, gone = snapshots_in(job.scratch / FOLDER)
    (damaged / "adapter.safetensors").write_bytes(b"")
    for file in gone.iterdir():
        file.unlink()
    gone.rmdir()

    with open_validator(job, CPU) as validate:
        first, second, third = (validate(folder) for folder in (damaged, gone, whole))

    assert first.heldout_loss is second.heldout_loss is None
    assert damaged.name in first.note
    assert gone.name in second.note
    assert third.step == step_of(whole)
    assert third.heldout_loss is not None
