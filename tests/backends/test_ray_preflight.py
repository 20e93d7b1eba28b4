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

address, job, answer_s, *torch = sys.argv[1:]
cluster = ClusterConfig(address=address, workers=2)
ray.init(address, log_to_driver=False)
launcher = own_installation()
if torch:
    launcher = launcher.model_copy(update={"versions": launcher.versions | {"torch": torch[0]}})
print("connected", ray.get_runtime_context().get_node_id(), flush=True)
sys.stdin.readline()
try:
    errand = training_errand(TrainJob.model_validate_json(job), cluster, 1, 0.0)
    require_ready(cluster, errand, 1, 0.0, launcher, answer_s=float(answer_s))
    print("{}")
except QLoraError as error:
    print(json.dumps(error.to_json()))
"""

ASK_FOR_MEMORY = """
import json, sys, time
from pathlib import Path
import ray
from qlora_core.backends.errands import Errand, Needs
from qlora_core.backends.node_probe import own_installation
from qlora_core.backends.ray_preflight import require_ready
from qlora_core.config import ClusterConfig
from qlora_core.errors import QLoraError
from qlora_core.modeling.machine import free_bytes, total_bytes

address, scratch = sys.argv[1:]
cluster = ClusterConfig(address=address, workers=1, gpus_per_worker=0)
ray.init(address, log_to_driver=False)

def answer(least_bytes):
    errand = Errand(Path(scratch), (), "", lambda: Needs(least_bytes))
    try:
        require_ready(cluster, errand, 1, 0.0, own_installation())
    except QLoraError as error:
        return type(error).__name__
    return "ready"

in_all = total_bytes()
taken = (free_bytes() + in_all) // 2  # more than is free, and less than there is
answers = [answer(1), answer(taken), answer(2 * in_all)]

@ray.remote(num_cpus=1)
class Other:
    def is_here(self):
        return True

other = Other.remote()
ray.get(other.is_here.remote())
deadline = time.monotonic() + 30
while ray.available_resources().get("CPU", 0) and time.monotonic() < deadline:
    time.sleep(0.1)
print(json.dumps([*answers, answer(taken), answer(2 * in_all)]))
"""


class Asking:
    """A process that is connected to the cluster, and asks its nodes when told."""

    def __init__(self, nodes: RayCluster, job: TrainJob, answer_s: float, *torch: str) -> None:
        said = (nodes.address, job.model_dump_json(), str(answer_s), *torch)
        self._process = subprocess.Popen(
            [sys.executable, "-c", ASK, *said],
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

        asking = Asking(nodes, job, answer_s=15)
        raylet = second.raylet()
        raylet.send_signal(signal.SIGSTOP)
        try:
            started = time.monotonic()
            error = asking.error()
            seconds = time.monotonic() - started
        finally:
            raylet.send_signal(signal.SIGCONT)

    assert isinstance(error, LaunchError)
    assert "it did not answer within 15 s" in str(error)
    assert asking.own_node[:8] not in str(error)
    assert seconds < 60, "it is not waited for until Ray gives it up"


def test_memory_in_use_is_waited_for_and_no_matter_where_ray_has_given_the_node_away(tmp_path):
    with ray_cluster() as nodes:
        nodes.start_head()
        asked = subprocess.run(
            [sys.executable, "-c", ASK_FOR_MEMORY, nodes.address, str(tmp_path)],
            capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip

    idle, booked = ["ready", "NoRoomError", "ClusterError"], ["ready", "ClusterError"]
    assert json.loads(asked.stdout.splitlines()[-1]) == idle + booked


def test_every_node_the_drivers_too_is_compared_with_what_the_launcher_imports(make_job):
    with ray_cluster() as nodes:
        nodes.start_head()
        nodes.add_node()
        nodes.wait_for(2)
        error = Asking(nodes, make_job(), 60, "1.0.0").error()

    assert isinstance(error, ClusterError)
    assert str(error).count("the launcher's is 1.0.0") == 2
