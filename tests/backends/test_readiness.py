from dataclasses import replace
from pathlib import Path

import pytest

from qlora_core.backends.host_room import HostNeed
from qlora_core.backends.node_probe import Difference, Gpu, Installation, NodeReport, own_versions
from qlora_core.backends.readiness import Node, Wanted, memory_error, readiness_error
from qlora_core.errors import (
    ClusterError,
    LaunchError,
    LaunchLostError,
    NoRoomError,
    ResourceError,
)

VERSIONS = own_versions()
CODE = "c" * 64
GB = 10**9
MEETING = Path("/store/meeting/abc")
H100 = Gpu(name="H100", capability=(9, 0), total_bytes=80 * GB, free_bytes=80 * GB)
T4 = Gpu(name="T4", capability=(7, 5), total_bytes=16 * GB, free_bytes=16 * GB)
WANTED = Wanted(
    installed=Installation(versions=VERSIONS, code=CODE),
    num_workers=2,
    gpus_per_worker=0,
    num_gpus=0,
    compute_dtype="",
    need_bytes=3_000_000_000,
    smaller="Try a smaller one.",
)
FIT = NodeReport(paths=(), installed=WANTED.installed, free_bytes=8 * GB, total_bytes=8 * GB)
GPU_WANTED = {"gpus_per_worker": 1, "num_gpus": 1, "compute_dtype": "bfloat16"}


def importing(code: str = CODE, **versions: str | None) -> Installation:
    return Installation(versions=VERSIONS | versions, code=code)


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
    old = importing(transformers="5.1.0")

    text = said(node("10.0.0.7", paths=(lost,)), node("10.0.0.8"), node("10.0.0.9", installed=old))

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
        ({"installed": importing(peft=None)}, "peft is not installed"),
        ({"installed": importing(safetensors=None)}, "safetensors is not installed"),
        ({"installed": importing(python="3.9.1")}, "python is 3.9.1"),
        ({"installed": importing("d" * 64)}, "another qlora_core (source dddddddddddd)"),
        ({"trouble": "OSError: libcudart"}, "torch cannot be used there (OSError: libcudart)"),
        ({"total_bytes": 5_900_000_000}, "finds 2.95 GB of memory in all"),
        ({"wanted": GPU_WANTED}, "Ray counts 1 GPUs, torch sees 0"),
        ({"wanted": GPU_WANTED, "gpus": (T4,)}, "its T4 has CUDA capability 7.5"),
        (
            {"wanted": GPU_WANTED | {"need_bytes": 81_000_000_000}, "gpus": (H100,)},
            "finds 80.00 GB of GPU memory in all, and the smallest pass needs 81.00 GB",
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


def host(size_bytes: int) -> dict[str, int]:
    """Memory of a machine, all of it free."""
    return {"free_bytes": size_bytes, "total_bytes": size_bytes}


def wanting(need: HostNeed, host_bytes: int) -> Node:
    return node(wanted=ON_GPUS | {"host": need}, gpus=(H100,), **host(host_bytes))


def test_where_no_gpu_holds_the_base_the_host_has_to_for_every_worker():
    text = said(wanting(HOSTED, host_bytes=9 * 10**9 - 1))

    assert "9.00 GB there for 3 workers, unless a GPU has 81.00 GB free" in text
    assert readiness_error([wanting(HOSTED, host_bytes=9 * 10**9)], "head:6379") is None


def test_a_gpu_that_holds_the_base_needs_no_host_unless_the_recipe_wants_it_there():
    fits = HOSTED.model_copy(update={"enough_gpu_bytes": 80 * 10**9})
    wanted = HOSTED.model_copy(update={"enough_gpu_bytes": None})

    assert readiness_error([wanting(fits, host_bytes=0)], "head:6379") is None
    assert "9.00 GB there for 3 workers; free some" in said(wanting(wanted, host_bytes=0))


DIVIDED = HostNeed(size_bytes=3 * 10**9, enough_gpu_bytes=70 * 10**9, num_dividing=2)
"""Parts of two workers; a GPU with 70 GB free holds all of the base."""


def test_if_one_nodes_gpu_is_too_small_for_the_base_the_hosts_of_all_nodes_need_room_for_parts():
    large = node("large", wanted=ON_GPUS | {"host": DIVIDED}, gpus=(H100,), **host(10**9))
    small_gpu = H100.model_copy(update={"total_bytes": 60 * 10**9, "free_bytes": 60 * 10**9})
    small = node("small", wanted=ON_GPUS | {"host": DIVIDED}, gpus=(small_gpu,), **host(10**10))

    assert readiness_error([large], "head:6379") is None
    text = said(large, small)
    assert "node large: it has 1.00 GB of memory in all" in text
    assert "node small" not in text


def test_hosts_without_room_are_waited_for_if_others_fill_the_gpu_that_would_do_without_them():
    full = H100.model_copy(update={"free_bytes": 60 * 10**9})
    busy = node("busy", wanted=ON_GPUS | {"host": DIVIDED}, gpus=(full,), **host(10**9))

    error = readiness_error([busy], "head:6379")

    assert isinstance(error, NoRoomError)
    assert "node busy: it has 1.00 GB of memory free" in error.what


def test_a_host_is_asked_for_no_more_parts_than_the_base_is_divided_into():
    small = DIVIDED.model_copy(update={"enough_gpu_bytes": None})

    assert readiness_error([wanting(small, 6 * 10**9)], "head:6379") is None
    assert "6.00 GB there for 2 workers" in said(wanting(small, 6 * 10**9 - 1))


@pytest.mark.parametrize(
    "fine",
    [
        {"installed": importing(torch=VERSIONS["torch"].split("+")[0] + "+cu128")},
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

    assert isinstance(error, LaunchLostError)
    assert "node 10.0.0.9: it said nothing" in str(error)


def test_a_node_that_fails_at_answering_is_not_asked_as_if_it_were_lost():
    broken = replace(node("10.0.0.9", silence="it could not be asked"), is_at_fault=True)

    error = readiness_error([node(), node("10.0.0.8", silence="it is gone"), broken], "head:6379")

    assert type(error) is LaunchError


def test_a_silent_node_is_told_beside_the_problems_of_others():
    text = said(
        node("10.0.0.9", silence="it said nothing"), node("10.0.0.7", installed=importing("d"))
    )

    assert "10.0.0.9: it said nothing" in text
    assert "10.0.0.7: it imports another" in text


def taken(free_bytes: int, **gpu) -> Gpu:
    return H100.model_copy(update={"free_bytes": free_bytes} | gpu)


NEEDS_20_GB = GPU_WANTED | {"num_workers": 1, "need_bytes": 20 * GB}


@pytest.mark.parametrize(
    "busy",
    [
        {"wanted": NEEDS_20_GB, "gpus": (taken(19 * GB),)},
        {"wanted": {"num_workers": 2}, "free_bytes": 5_900_000_000},
        {"wanted": NEEDS_20_GB | {"host": HOSTED}, "gpus": (H100,), "free_bytes": 2 * GB},
    ],
)
def test_what_others_use_now_is_waited_for_and_what_ray_has_given_away_is_no_problem(busy):
    now = readiness_error([node(**busy), node("10.0.0.8")], "head:6379")
    booked = busy | {"wanted": busy["wanted"] | {"is_booked": True}}

    assert isinstance(now, NoRoomError)
    assert now.is_transient
    assert "node 10.0.0.7 (ab12): " in now.what
    assert "10.0.0.8" not in str(now)
    assert readiness_error([node(**booked)], "head:6379") is None


def test_a_gpu_that_is_too_small_stays_so_however_much_of_it_ray_has_given_away():
    small = NEEDS_20_GB | {"need_bytes": 81 * GB, "is_booked": True}

    assert "80.00 GB of GPU memory in all" in said(node(wanted=small, gpus=(taken(0),)))


def test_a_gpu_too_full_to_say_what_is_free_is_a_full_one_and_no_broken_torch():
    full = taken(0, trouble="CUDA error: out of memory")

    error = readiness_error([node(wanted=NEEDS_20_GB, gpus=(full,))], "head:6379")

    assert isinstance(error, NoRoomError)
    assert "0.00 GB of GPU memory free (CUDA error: out of memory)" in error.what


def test_what_is_waited_for_is_told_beside_what_a_person_has_to_mend():
    text = said(
        node("10.0.0.8", wanted=NEEDS_20_GB, gpus=(taken(0),)),
        node("10.0.0.7", installed=importing("d")),
    )

    assert "2 problems" in text
    assert "10.0.0.8: a worker finds 0.00 GB" in text


def test_this_machine_is_told_what_it_lacks_for_good_and_what_only_now():
    small = FIT.model_copy(update={"total_bytes": 5_900_000_000, "free_bytes": 1})
    busy = FIT.model_copy(update={"free_bytes": 5_900_000_000})

    for_good, now = memory_error(small, WANTED), memory_error(busy, WANTED)

    assert memory_error(FIT, WANTED) is None
    assert isinstance(for_good, ResourceError)
    assert "finds 2.95 GB of memory in all, and the smallest pass needs 3.00 GB" in str(for_good)
    assert "Try a smaller one." in str(for_good)
    assert isinstance(now, NoRoomError)
    assert "finds 2.95 GB of memory free, and the smallest pass needs 3.00 GB" in str(now)
