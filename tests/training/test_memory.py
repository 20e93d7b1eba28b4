import psutil
import pytest
import torch

from qlora_core.training.memory import free_bytes, is_out_of_memory, memory_for_worker, total_bytes

CPU = torch.device("cpu")


def container(folder, limit: str, current=3_000, inactive=500):
    (folder / "memory.max").write_text(limit)
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")
    return folder


def test_a_containers_limit_counts_where_it_is_below_what_the_machine_has_free(tmp_path):
    assert free_bytes(container(tmp_path, "10000\n")) == 10_000 - 3_000 + 500
    assert free_bytes(container(tmp_path, "2000\n")) == 0


def test_without_a_limit_the_machine_says_what_is_free(tmp_path):
    free = psutil.virtual_memory().available

    assert free_bytes(container(tmp_path, "max\n")) == pytest.approx(free, rel=0.2)
    assert free_bytes(tmp_path / "nowhere") == pytest.approx(free, rel=0.2)


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


def test_a_container_has_what_it_may_use_and_not_what_the_machine_has(tmp_path):
    assert total_bytes(container(tmp_path, "10000\n")) == 10_000
    assert total_bytes(container(tmp_path, "max\n")) == psutil.virtual_memory().total
    assert total_bytes(tmp_path / "nowhere") == psutil.virtual_memory().total
