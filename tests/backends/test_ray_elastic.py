"""Workers come and go with the nodes of a cluster."""

import pytest

from qlora_core.artifacts import AdapterCheckpoint
from qlora_core.backends.in_process import InProcessLauncher
from qlora_core.backends.ray_train import RayTrainLauncher
from qlora_core.config import ClusterConfig, SnapshotConfig
from qlora_core.training.desk import SUMMARY_FILE
from qlora_core.training.incidents import history
from tests.backends.ray_nodes import ray_cluster

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.ray]
SNAPSHOTS = SnapshotConfig(every_steps=25)
# Two workers sum a step's gradient in another order than one, which moves a loss by some 2e-7 of
# itself. 2,200 steps at 3e-5 keep it there; at 1e-4 and more, training amplifies it from some step
# on (as it does a learning rate that is 2e-7 larger), and no two such curves could be compared.
GENTLE = {"epochs": 800, "heldout_every": None, "learning_rate": 3e-5}


def test_a_node_that_is_lost_and_one_that_joins_only_pause_the_run(make_job):
    alone, told = make_job("alone", **GENTLE), []
    InProcessLauncher(SNAPSHOTS).train(alone, told.append)
    job, losses = make_job("ray", **GENTLE), []

    with ray_cluster() as nodes:
        nodes.start_head()
        second = nodes.add_node()
        nodes.wait_for(2)
        workers = {"min": 1, "max": 2}
        cluster = ClusterConfig(
            address=nodes.address, workers=workers, cpus_per_worker=1, resize_every_s=2.0
        )

        def come_and_go(metrics) -> None:
            losses.append(metrics.loss)
            if metrics.step == 60:
                second.kill()
            if len(nodes.nodes) == 2 and resized_to(job) == [1]:
                nodes.add_node()

        RayTrainLauncher(cluster, SNAPSHOTS, print).train(job, come_and_go)

    assert resized_to(job) == [1, 2]
    assert losses == pytest.approx([step.loss for step in told], rel=1e-5)
    facts = AdapterCheckpoint.model_validate_json((job.scratch / SUMMARY_FILE).read_bytes())
    assert facts.num_workers == 2


def resized_to(job) -> list[int]:
    """Return the numbers of workers that training went on with, in order."""
    said = (incident.what for incident in history(job.scratch) if incident.kind == "resized")
    return [int(what.split()[2]) for what in said]
