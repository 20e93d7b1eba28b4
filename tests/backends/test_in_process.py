import pytest

from qlora_core.backends.in_process import InProcessLauncher
from qlora_core.config import SnapshotConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_trains_here_and_tells_every_step_in_order(make_job):
    job, told = make_job(), []

    InProcessLauncher(SnapshotConfig()).train(job, told.append)

    assert [step.step for step in told] == [1, 2, 3, 4, 5, 6]
    assert (job.out / "adapter_model.safetensors").is_file()


def test_training_again_tells_all_steps_again_and_trains_none(make_job):
    job, first, second = make_job(), [], []
    InProcessLauncher(SnapshotConfig()).train(job, first.append)

    InProcessLauncher(SnapshotConfig()).train(job, second.append)

    assert second == first
