"""Snapshots are measured beside training on Ray, which does not wait for it."""

import pytest

from qlora_core.backends.ray_train import RayTrainLauncher
from qlora_core.config import ClusterConfig, SnapshotConfig
from qlora_core.training.journal import VALIDATIONS_FILE, Validation

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.ray]
SNAPSHOTS = SnapshotConfig(every_steps=25, keep=4, validate_beside=True)


def test_snapshots_are_measured_beside_training_and_those_left_out_are_counted(make_job):
    job, told = make_job(epochs=500, heldout_every=25, learning_rate=1e-4), []

    RayTrainLauncher(ClusterConfig(workers=1, cpus_per_worker=1), SNAPSHOTS, print).train(
        job, told.append
    )

    text = (job.scratch / VALIDATIONS_FILE).read_text()
    found = [Validation.model_validate_json(line) for line in text.splitlines()]
    measured = {each.step: each.heldout_loss for each in found if each.heldout_loss is not None}
    by_training = {step.step: step.heldout_loss for step in told if step.heldout_loss is not None}
    assert len(measured) >= 3
    assert measured == {step: by_training[step] for step in measured}
    left = len(by_training) - len(measured)
    assert left == 0 or f"{left} snapshots were not measured beside training" in found[-1].note
