"""Snapshots that are measured beside training."""

import pytest
import torch

from qlora_core.backends.in_process import InProcessLauncher
from qlora_core.config import SnapshotConfig
from qlora_core.training.snapshot import FOLDER, snapshots_in, step_of
from qlora_core.training.validating import open_validator


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_snapshot_measured_elsewhere_has_the_loss_that_training_measured_itself(
    make_job, dropout
):
    job, told = make_job(dropout=dropout, heldout_every=1), []
    InProcessLauncher(SnapshotConfig(every_steps=1, keep=10)).train(job, told.append)

    with open_validator(job, torch.device("cpu")) as validate:
        found = [validate(folder) for folder in snapshots_in(job.scratch / FOLDER)]

    assert {each.step: each.heldout_loss for each in found} == {
        step.step: step.heldout_loss for step in told
    }
    assert len(found) == len(told) == 6


def test_a_damaged_snapshot_and_one_that_is_gone_are_told_and_the_next_is_measured(make_job):
    job = make_job()
    InProcessLauncher(SnapshotConfig(every_steps=1, keep=3)).train(job, lambda _: None)
    whole, damaged, gone = snapshots_in(job.scratch / FOLDER)
    (damaged / "adapter.safetensors").write_bytes(b"")
    for file in gone.iterdir():
        file.unlink()
    gone.rmdir()

    with open_validator(job, torch.device("cpu")) as validate:
        first, second, third = (validate(folder) for folder in (damaged, gone, whole))

    assert first.heldout_loss is second.heldout_loss is None
    assert damaged.name in first.note
    assert gone.name in second.note
    assert third.step == step_of(whole)
    assert third.heldout_loss is not None
