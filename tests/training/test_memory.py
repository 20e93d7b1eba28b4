import psutil
import pytest
import torch

from qlora_core.training.memory import is_out_of_memory, memory_for_worker

CPU = torch.device("cpu")


def test_what_a_worker_has_already_is_its_own_and_what_is_free_is_shared():
    own = psutil.Process().memory_info().rss

    alone, one_of_four = memory_for_worker(CPU, 1), memory_for_worker(CPU, 4)

    assert (alone - own) / 4 == pytest.approx(one_of_four - own, rel=0.2)


def test_want_of_memory_is_told_from_other_failures_on_a_cpu_too():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)

    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("size mismatch"))


@pytest.mark.parametrize(
    "said", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"]
)
def test_want_of_memory_is_known_by_what_other_libraries_say(said):
    assert is_out_of_memory(RuntimeError(said))
    assert not is_out_of_memory(RuntimeError("CUDA error: invalid argument"))
