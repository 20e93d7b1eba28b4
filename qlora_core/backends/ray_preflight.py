"""Ask every node that may get work whether it can do it, before anything is booked there.

One small task pinned to each node, without a CPU, so that a busy cluster answers, too. Each has a
process of its own (`max_calls=1`): it may touch a GPU, and must let go of it. A node that does not
answer in time is named, and not waited for.

How many workers a node may get follows from what it has; so may others have it now. Ray says so:
what it has given away is not counted as lacking (`readiness`), as ours will wait for it.

Asked are the nodes with room for a worker, and the driver's own, where Ray Train keeps its books.
Those that join later are not: a worker there says itself what it lacks.
"""

import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray._private.state import available_resources_per_node  # Ray's own libraries do so, too
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qlora_core.backends.errands import Errand
from qlora_core.backends.node_probe import (
    NONCE_FILE,
    Installation,
    NodeReport,
    Question,
    list_folder,
    probe_plain,
)
from qlora_core.backends.ray_losses import is_loss
from qlora_core.backends.ray_resources import places_on
from qlora_core.backends.readiness import Node, Wanted, readiness_error
from qlora_core.config import ClusterConfig
from qlora_core.errors import storing
from qlora_core.training.durable import write_durably

ANSWER_S = 120.0
"""To start a process on a node, with our package shipped to it, and to import torch there."""


def require_ready(
    cluster: ClusterConfig,
    errand: Errand,
    cpus: int,
    gpus: float,
    launcher: Installation,
    answer_s: float = ANSWER_S,
) -> None:
    """Return once every node that may get a worker has shown that it can run one.

    Args:
        cluster: Which Ray; this process is connected to it.
        errand: What workers will do.
        cpus: Of a worker.
        gpus: Of a worker.
        launcher: What the run's flow imports; this process may be a job on the cluster itself.
        answer_s: How long a node may take to answer.

    Raises:
        ClusterError: Nodes cannot: all problems of all of them.
        NoRoomError: They could, if others than Ray's workers did not use their memory.
        LaunchLostError: Nodes do not answer.
        LaunchError: Nodes fail at answering.
        StoreError: The store cannot be written from here.
    """
    own = ray.get_runtime_context().get_node_id()
    rooms = {
        node["NodeID"]: (node, places_on(node["Resources"], cpus, gpus))
        for node in ray.nodes()
        if node["Alive"]
    }
    asked = {name: pair for name, pair in rooms.items() if pair[1] or name == own}
    with _meeting(errand, needs_gpu=gpus > 0) as question:
        answers = _Answers(question, list(asked), answer_s)
        of_all = _wanted_of_all(errand, gpus, launcher)  # takes seconds, in which they look around
        free = _free_resources()
        nodes = []
        for name, (node, room) in asked.items():
            counted = {
                "num_workers": min(room, cluster.max_workers),
                "num_gpus": int(node["Resources"].get("GPU", 0)),
                "is_booked": is_booked(node["Resources"], free.get(name, {}), gpus),
            }
            report, silence, is_at_fault = answers.of(name)
            file = question.meeting / name
            wanted, is_heard = of_all.model_copy(update=counted), _holds(file, question.nonce)
            answer = (report, silence, wanted, file, is_heard, is_at_fault)
            nodes.append(Node(_called(node), *answer))
    if error := readiness_error(nodes, str(cluster.address)):
        raise error


def _free_resources() -> dict[str, dict[str, float]]:
    """Return what Ray has not given away on each node; over ray:// the cluster asks."""
    if not ray.util.client.ray.is_connected():
        return dict(available_resources_per_node())
    asked = ray.remote(num_cpus=0)(available_resources_per_node)
    return dict(ray.get(asked.remote()))


def is_booked(node: Mapping[str, float], free: Mapping[str, float], gpus: float) -> bool:
    """Say whether Ray has given away some of what the memory of workers goes with.

    Args:
        node: What it has.
        free: What is left of that; Ray leaves out what is used up.
        gpus: Of a worker.
    """
    kind = "GPU" if gpus else "CPU"
    return free.get(kind, 0.0) < node.get(kind, 0.0)


def _wanted_of_all(errand: Errand, gpus: float, launcher: Installation) -> Wanted:
    needs = errand.needs()
    return Wanted(
        installed=launcher,
        num_workers=0,
        gpus_per_worker=gpus,
        num_gpus=0,
        compute_dtype=errand.compute_dtype if gpus else "",
        need_bytes=needs.least_bytes,
        smaller=errand.smaller,
        host=needs.host,
    )


class _Answers:
    """What nodes answer, or why they do not.

    Args:
        question: For all of them.
        names: Ray's ids of the nodes to ask.
        answer_s: How long they may take.
    """

    def __init__(self, question: Question, names: list[str], answer_s: float) -> None:
        self._answer_s, self._deadline = answer_s, time.monotonic() + answer_s
        # Ray's own retries would take a lost node for one that is slow
        task = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(probe_plain)
        text = question.model_dump_json()
        self._asked = {name: task.options(**_pinned(name)).remote(text, name) for name in names}

    def of(self, name: str) -> tuple[NodeReport | None, str, bool]:
        """Return the report of a node; or None, why there is none, and if the node has failed."""
        asked = self._asked[name]
        try:
            left_s = max(0.0, self._deadline - time.monotonic())
            return NodeReport.model_validate_json(ray.get(asked, timeout=left_s)), "", False
        except ray.exceptions.GetTimeoutError:
            ray.cancel(asked, force=True)
            return None, f"it did not answer within {self._answer_s:g} s", False
        except RayError as error:
            first_line = str(error).strip().partition("\n")[0]
            silence = f"it could not be asked: {type(error).__name__}: {first_line}"
            return None, silence, not is_loss(error)


def _pinned(name: str) -> dict[str, Any]:
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(name, soft=False)}


@contextmanager
def _meeting(errand: Errand, *, needs_gpu: bool) -> Iterator[Question]:
    """Make the folder in which launcher and nodes have to find each other's words."""
    meeting = errand.scratch / f"preflight-{uuid4().hex}"
    question = Question(
        meeting=meeting,
        nonce=secrets.token_hex(16),
        folders=tuple(list_folder(folder) for folder in errand.folders),
        needs_gpu=needs_gpu,
    )
    with storing(meeting):
        meeting.mkdir(parents=True)
    try:
        write_durably(meeting / NONCE_FILE, question.nonce.encode())
        yield question
    finally:
        shutil.rmtree(meeting, ignore_errors=True)


def _holds(file: Path, nonce: str) -> bool:
    try:
        return file.read_text("utf-8") == nonce
    except OSError:
        return False


def _called(node: Mapping[str, Any]) -> str:
    """Return address and the beginning of the id: nodes of one machine share an address."""
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"
