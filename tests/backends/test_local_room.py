"""What a training asks of this machine's memory before a Ray of our own loads its base."""

from types import SimpleNamespace

import psutil
import pytest

from qlora_core.backends.errands import training_errand
from qlora_core.backends.local_room import free_by_uuid, require_memory
from qlora_core.config import ClusterConfig
from qlora_core.errors import NoRoomError, ResourceError
from qlora_core.modeling import machine
from qlora_core.training.room import RUNTIME_BYTES

pytestmark = pytest.mark.usefixtures("one_thread")
ONE = ClusterConfig(workers=1, cpus_per_worker=1, gpus_per_worker=0)


@pytest.fixture
def job(make_job):
    return make_job()


@pytest.fixture
def has(monkeypatch):
    """Let this machine have so many bytes free, in all, and of swap."""

    def have(free: int, in_all: int, swap: int = 0) -> None:
        monkeypatch.setattr(machine, "free_bytes", lambda: free)
        monkeypatch.setattr(machine, "total_bytes", lambda: in_all)
        monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=swap))

    return have


@pytest.fixture
def least(job) -> int:
    return training_errand(job, ONE, cpus=1, gpus=0.0).needs().least_bytes


def test_a_machine_with_just_enough_memory_will_do(job, has, least):
    has(least, least)

    require_memory(job, ONE, is_waiting=False)


def test_less_in_all_than_the_smallest_pass_needs_is_refused_for_good(job, has, least):
    has(least - 1, least - 1)

    with pytest.raises(ResourceError, match=r"of memory in all, .*smallest pass") as caught:
        require_memory(job, ONE, is_waiting=True)

    assert "training.checkpointing=on" in str(caught.value)
    assert not caught.value.is_transient


def test_what_others_use_of_the_memory_is_worth_another_look(job, has, least):
    has(least - 1, 2 * least)

    with pytest.raises(NoRoomError, match=r"of memory free, .*smallest pass"):
        require_memory(job, ONE, is_waiting=False)


def test_swap_counts_as_free_and_not_as_memory(job, has, least):
    has(least - 1, least, swap=1)
    require_memory(job, ONE, is_waiting=False)

    has(least - 1, least - 1, swap=least)
    with pytest.raises(ResourceError):
        require_memory(job, ONE, is_waiting=False)


def test_what_workers_that_wait_hold_is_free_for_them(job, has, least):
    has(least - RUNTIME_BYTES, 2 * least)

    require_memory(job, ONE, is_waiting=True)
    with pytest.raises(NoRoomError):
        require_memory(job, ONE, is_waiting=False)


def test_two_workers_need_twice_as_much(job, has, least):
    two = ClusterConfig(workers=2, gpus_per_worker=0)
    has(least, 2 * least)
    require_memory(job, ONE, is_waiting=False)

    with pytest.raises(NoRoomError):
        require_memory(job, two, is_waiting=False)


def test_a_base_that_cannot_be_read_is_left_to_a_worker_to_tell(job, has, tmp_path):
    has(0, 0)

    require_memory(job.model_copy(update={"base": tmp_path}), ONE, is_waiting=False)


def test_the_drivers_tool_is_read_as_torch_names_gpus_and_what_it_does_not_say_left_out():
    said = "GPU-0b9e-1, 80994\nGPU-77aa-2, [N/A]\n\nno devices were found\n"

    assert free_by_uuid(said) == {"0b9e-1": 80994 * 2**20}
