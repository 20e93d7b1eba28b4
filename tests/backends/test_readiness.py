from pathlib import Path

import pytest

from qlora_core.backends.host_room import HostNeed
from qlora_core.backends.node_probe import Difference, Gpu, NodeReport, own_versions
from qlora_core.backends.readiness import Node, Wanted, readiness_error
from qlora_core.errors import ClusterError, LaunchError

VERSIONS = own_versions()
MEETING = Path("/store/meeting/abc")
H100 = Gpu(name="H100", capability=(9, 0), free_bytes=80_000_000_000)
T4 = Gpu(name="T4", capability=(7, 5), free_bytes=16_000_000_000)
WANTED = Wanted(
    versions=VERSIONS,
    code="c" * 64,
    num_workers=2,
    gpus_per_worker=0,
    num_gpus=0,
    compute_dtype="",
    need_bytes=3_000_000_000,
    smaller="Try a smaller one.",
)
FIT = NodeReport(paths=(), versions=VERSIONS, code="c" * 64, free_bytes=8_000_000_000)
GPU_WANTED = {"gpus_per_worker": 1, "num_gpus": 1, "compute_dtype": "bfloat16"}


def node(name="10.0.0.7 (ab12)", *, is_heard=True, silence="", wanted=None, **report) -> Node:
    return Node(
        name,
        None if silence else FIT.model_copy(update=report),
        silence,
        WANTED.model_copy(update=wanted or {}),
        MEETING,
        is_heard,
    )


def said(*nodes: Node) -> str:
    error = readiness_error(list(nodes), "head:6379")
    assert isinstance(error, ClusterError)
    return str(error)


def test_nodes_that_have_what_is_wanted_are_no_error():
    gpu_node = node(wanted=GPU_WANTED, gpus=(H100,))

    assert readiness_error([node(), gpu_node], "head:6379") is None


def test_all_problems_of_all_nodes_are_told_at_once():
    lost = Difference(path=Path("/store/x/nonce"), found="no such file", wanted="the word")
    old = VERSIONS | {"transformers": "5.1.0"}

    text = said(node("10.0.0.7", paths=(lost,)), node("10.0.0.8"), node("10.0.0.9", versions=old))

    assert "cluster at head:6379" in text
    assert "2 problems" in text
    assert "node 10.0.0.7: /store/x/nonce: found no such file, wanted the word" in text
    assert (
        f"node 10.0.0.9: transformers is 5.1.0, the launcher's is {VERSIONS['transformers']}"
        in text
    )
    assert "10.0.0.8" not in text


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"is_heard": False}, "did not arrive at the launcher's"),
        ({"versions": VERSIONS | {"peft": None}}, "peft is not installed"),
        ({"versions": VERSIONS | {"safetensors": None}}, "safetensors is not installed"),
        ({"versions": VERSIONS | {"python": "3.9.1"}}, "python is 3.9.1"),
        ({"code": "d" * 64}, "another qlora_core (source dddddddddddd)"),
        ({"trouble": "OSError: libcudart"}, "torch cannot be used there (OSError: libcudart)"),
        ({"free_bytes": 5_900_000_000}, "finds 2.95 GB of memory free"),
        ({"wanted": GPU_WANTED}, "Ray counts 1 GPUs, torch sees 0"),
        ({"wanted": GPU_WANTED, "gpus": (T4,)}, "its T4 has CUDA capability 7.5"),
        (
            {"wanted": GPU_WANTED | {"need_bytes": 81_000_000_000}, "gpus": (H100,)},
            "finds 80.00 GB of GPU memory free, and the smallest pass needs 81.00 GB",
        ),
        (
            {"wanted": GPU_WANTED | {"gpus_per_worker": 0.5, "need_bytes": 41 * 10**9},
             "gpus": (H100,)},
            "finds 40.00 GB",
        ),
    ],
)  # fmt: skip
def test_each_problem_is_told_with_what_was_found(broken, words):
    assert words in said(node(**broken))


HOSTED = HostNeed(size_bytes=3 * 10**9, enough_gpu_bytes=81 * 10**9)
ON_GPUS = GPU_WANTED | {"need_bytes": 10**9, "num_workers": 3}


def wanting(host: HostNeed, free_bytes: int) -> Node:
    return node(wanted=ON_GPUS | {"host": host}, gpus=(H100,), free_bytes=free_bytes)


def test_where_no_gpu_holds_the_base_the_host_has_to_for_every_worker():
    text = said(wanting(HOSTED, free_bytes=9 * 10**9 - 1))

    assert "9.00 GB there for 3 workers, unless a GPU has 81.00 GB free" in text
    assert readiness_error([wanting(HOSTED, free_bytes=9 * 10**9)], "head:6379") is None


def test_a_gpu_that_holds_the_base_needs_no_host_unless_the_recipe_wants_it_there():
    fits = HOSTED.model_copy(update={"enough_gpu_bytes": 80 * 10**9})
    wanted = HOSTED.model_copy(update={"enough_gpu_bytes": None})

    assert readiness_error([wanting(fits, free_bytes=0)], "head:6379") is None
    assert "9.00 GB there for 3 workers; free some" in said(wanting(wanted, free_bytes=0))


DIVIDED = HostNeed(size_bytes=3 * 10**9, enough_gpu_bytes=70 * 10**9, num_dividing=2)
"""Parts of two workers; a GPU with 70 GB free holds all of the base."""


def test_if_one_nodes_gpu_is_too_small_for_the_base_the_hosts_of_all_nodes_need_room_for_parts():
    large = node("large", wanted=ON_GPUS | {"host": DIVIDED}, gpus=(H100,), free_bytes=10**9)
    small_gpu = H100.model_copy(update={"free_bytes": 60 * 10**9})
    small = node("small", wanted=ON_GPUS | {"host": DIVIDED}, gpus=(small_gpu,), free_bytes=10**10)

    assert readiness_error([large], "head:6379") is None
    text = said(large, small)
    assert "node large: it has 1.00 GB of memory free" in text
    assert "node small" not in text


def test_a_host_is_asked_for_no_more_parts_than_the_base_is_divided_into():
    small = DIVIDED.model_copy(update={"enough_gpu_bytes": None})

    assert readiness_error([wanting(small, free_bytes=6 * 10**9)], "head:6379") is None
    assert "6.00 GB there for 2 workers" in said(wanting(small, free_bytes=6 * 10**9 - 1))


@pytest.mark.parametrize(
    "fine",
    [
        {"versions": VERSIONS | {"torch": VERSIONS["torch"].split("+")[0] + "+cu128"}},
        {"free_bytes": 6_000_000_000},
        {"wanted": {"num_workers": 0, "need_bytes": 10**15}},
        {"wanted": {"need_bytes": None}},
        {"wanted": GPU_WANTED | {"num_workers": 1, "num_gpus": 2, "need_bytes": 70_000_000_000},
         "gpus": (H100.model_copy(update={"free_bytes": 0}), H100)},
        {"wanted": GPU_WANTED | {"compute_dtype": "float16"}, "gpus": (T4,)},
    ],
)  # fmt: skip
def test_what_does_not_matter_is_no_problem(fine):
    assert readiness_error([node(**fine)], "head:6379") is None


def test_of_many_lost_files_a_few_are_told_and_the_others_counted():
    lost = tuple(Difference(path=Path(f"/s/{n}"), found="?", wanted="!") for n in range(30))

    text = said(node(paths=lost))

    assert "/s/4" in text
    assert "/s/5" not in text
    assert "and 25 more files" in text


def test_a_node_that_only_does_not_answer_may_do_so_later():
    error = readiness_error([node(), node("10.0.0.9", silence="it said nothing")], "head:6379")

    assert isinstance(error, LaunchError)
    assert "node 10.0.0.9: it said nothing" in str(error)


def test_a_silent_node_is_told_beside_the_problems_of_others():
    text = said(node("10.0.0.9", silence="it said nothing"), node("10.0.0.7", code="d"))

    assert "10.0.0.9: it said nothing" in text
    assert "10.0.0.7: it imports another" in text
