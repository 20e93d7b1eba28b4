"""The cron example on two nodes, one of which is lost on the way, beside the same on one worker.

Real model, real Ray, Prefect and MLflow; few steps and rows: it asks whether the whole chain, from
looking the nodes over to the evaluation on those that are left, comes to the same numbers.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.records import RunRecord
from qlora_core.artifacts import AdapterCheckpoint, EvalReport
from qlora_core.training.journal import read_curve
from tests.backends.ray_nodes import ray_cluster
from tests.e2e.desk import Desk

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.prefect, pytest.mark.timeout(900)]

NUM_STEPS = 16
SMALL = {
    "training.max_steps": NUM_STEPS,
    "training.heldout_rows": 8,
    "evaluation.max_rows": 8,
    "merge.enabled": "false",
    "snapshots.every_steps": 4,
    "snapshots.every_s": 3600,
    "cluster.cpus_per_worker": 1,
}
RUN = ["run", "cron/recipe.yaml", *(f"--set={name}={value}" for name, value in SMALL.items())]


@dataclass(frozen=True)
class Seen:
    """A run and what it left."""

    desk: Desk
    record: RunRecord

    @property
    def adapter(self) -> AdapterCheckpoint:
        return AdapterCheckpoint.model_validate(self.record.artifacts["adapter"].facts)

    def losses(self) -> list[float]:
        (curve,) = self.desk.home.glob("train_adapter/*/curve.jsonl")
        return [point.loss for point in read_curve(curve.parent)]

    def report(self, subject: str) -> EvalReport:
        return EvalReport.model_validate(self.record.artifacts[f"{subject}_report"].facts)


@pytest.fixture(scope="module")
def alone(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    desk = Desk.at(tmp_path_factory.mktemp("alone"))
    try:
        done = desk.qlora(*RUN)
        assert done.returncode == 0, done.stderr
        return Seen(desk, desk.record())
    finally:
        desk.qlora("ui", "--stop")


@pytest.fixture(scope="module")
def on_nodes(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    desk = Desk.at(tmp_path_factory.mktemp("nodes"))
    with ray_cluster() as cluster:
        cluster.start_head()
        node = cluster.add_node()
        cluster.wait_for(2)
        workers = "--set=cluster.workers={min: 1, max: 2}"
        cpus_alone = "--set=cluster.gpus_per_worker=0"
        process = desk.start(*RUN, "--cluster", cluster.address, workers, cpus_alone)
        try:
            while not any(desk.snapshots()):
                assert process.poll() is None, process.communicate()
                time.sleep(0.1)
            node.kill()
            _, said = process.communicate(timeout=480)
            assert process.returncode == 0, said
            return Seen(desk, desk.record())
        finally:
            process.kill()
            process.communicate()
            desk.qlora("ui", "--stop")


def test_the_run_gets_over_the_loss_of_a_node_and_says_so(on_nodes):
    assert on_nodes.record.state == "completed"
    assert [attempt.state for attempt in on_nodes.record.attempts] == ["completed"]
    facts = on_nodes.adapter
    assert facts.num_workers == 1
    assert facts.num_attempts >= 2
    assert all(step % 4 == 0 for step in facts.resumed_at)
    assert {incident.kind for incident in facts.incidents} & {"resized", "lost_worker"}


def test_two_nodes_and_then_one_come_to_the_losses_of_a_single_worker(alone, on_nodes):
    assert len(alone.losses()) == NUM_STEPS
    assert on_nodes.losses() == pytest.approx(alone.losses(), rel=1e-4)
    for subject in ("base", "tuned"):
        ours, theirs = on_nodes.report(subject), alone.report(subject)
        assert ours.metrics["loss"].value == pytest.approx(theirs.metrics["loss"].value, rel=1e-3)
        assert ours.metrics["loss"].num_rows == theirs.metrics["loss"].num_rows == 8
