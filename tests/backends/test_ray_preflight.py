"""Preflight on a real Ray: nodes that are separate raylets on this machine."""

import json
import signal
import subprocess
import sys
import time

import pytest

from qlora_core.backends.ray_train import RayTrainLauncher
from qlora_core.config import ClusterConfig, SnapshotConfig
from qlora_core.errors import ClusterError, LaunchError, QLoraError, from_json
from qlora_core.ports import TrainJob
from tests.backends.ray_nodes import RayCluster, hides, may_unshare, ray_cluster

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.ray]

ASK = """
import json, sys
import ray
from qlora_core.backends.errands import training_errand
from qlora_core.backends.node_probe import own_installation
from qlora_core.backends.ray_preflight import require_ready
from qlora_core.config import ClusterConfig
from qlora_core.errors import QLoraError
from qlora_core.ports import TrainJob

address, job, answer_s = sys.argv[1:]
cluster = ClusterConfig(address=address, workers=2)
ray.init(address, log_to_driver=False)
print("connected", ray.get_runtime_context().get_node_id(), flush=True)
sys.stdin.readline()
try:
    errand = training_errand(TrainJob.model_validate_json(job), cluster, 1, 0.0)
    require_ready(cluster, errand, 1, 0.0, own_installation(), answer_s=float(answer_s))
    print("{}")
except QLoraError as error:
    print(json.dumps(error.to_json()))
"""


class Asking:
    """A process that is connected to the cluster, and asks its nodes when told."""

    def __init__(self, nodes: RayCluster, job: TrainJob, answer_s: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", ASK, nodes.address, job.model_dump_json(), str(answer_s)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.own_node = self._process.stdout.readline().split()[1]

    def error(self) -> QLoraError | None:
        said, _ = self._process.communicate("go\n", timeout=120)
        fields = json.loads(said.splitlines()[-1])
        return from_json(fields) if fields else None


@pytest.mark.skipif(not may_unshare(), reason="needs root: a node with mounts of its own")
def test_a_node_whose_store_is_another_disk_is_named_before_anything_is_booked(
    make_job,
):
    job, told = make_job(), []

    with ray_cluster() as nodes:
        nodes.start_head()
        nodes.add_node(before=hides(job.scratch.parent))
        nodes.wait_for(2)
        cluster = ClusterConfig(address=nodes.address, workers=2, cpus_per_worker=1)
        with pytest.raises(ClusterError) as caught:
            RayTrainLauncher(cluster, SnapshotConfig(), print).train(job, told.append)

    text = str(caught.value)
    problems = [line for line in text.splitlines() if line.startswith("  - ")]
    assert f"the cluster at {nodes.address} is not ready" in text
    assert str(job.scratch) in text
    assert "nonce: found no such file or directory" in text
    assert len(problems) == 1, "the other node sees the store"
    assert not caught.value.is_transient
    assert told == []
    assert not list(job.scratch.glob("preflight-*"))


def test_nodes_that_are_ready_are_found_so_and_one_that_does_not_answer_is_named(make_job):
    job = make_job()
    with ray_cluster() as nodes:
        nodes.start_head()
        second = nodes.add_node()
        nodes.wait_for(2)
        assert Asking(nodes, job, answer_s=60).error() is None
        assert not list(job.scratch.glob("preflight-*"))

        asking = Asking(nodes, job, answer_s=4)
        raylet = second.raylet()
        raylet.send_signal(signal.SIGSTOP)
        try:
            started = time.monotonic()
            error = asking.error()
            seconds = time.monotonic() - started
        finally:
            raylet.send_signal(signal.SIGCONT)

    assert isinstance(error, LaunchError)
    assert "it did not answer within 4 s" in str(error)
    assert asking.own_node[:8] not in str(error)
    assert seconds < 60, "it is not waited for until Ray gives it up"
