"""A line that breaks is told as that, whoever broke it."""

import pytest
import torch
import torch.distributed as dist

from qlora_core.errors import CollectiveError
from qlora_core.training.comm import TorchComm


@pytest.fixture
def comm():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield TorchComm(torch.device("cpu"), local_size=1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_group_that_ray_ended_while_a_worker_computed_is_a_lost_line_and_no_bug(comm):
    dist.destroy_process_group()

    with pytest.raises(CollectiveError, match="worker 0 lost the others: Ray has ended"):
        comm.all_reduce_sum(torch.ones(2))
    with pytest.raises(CollectiveError):
        comm.gather({"step": 3})


def test_a_group_that_ray_ended_while_a_worker_started_is_a_lost_line_too():
    with pytest.raises(CollectiveError):
        TorchComm(torch.device("cpu"), local_size=1)


def test_a_bug_of_ours_is_not_taken_for_a_lost_line(comm):
    with pytest.raises(TypeError):
        comm.all_reduce_sum("no tensor")
