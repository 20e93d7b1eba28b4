import psutil
import pytest

from qlora_core.modeling.machine import free_bytes, total_bytes


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


def test_a_container_has_what_it_may_use_and_not_what_the_machine_has(tmp_path):
    assert total_bytes(container(tmp_path, "10000\n")) == 10_000
    assert total_bytes(container(tmp_path, "max\n")) == psutil.virtual_memory().total
    assert total_bytes(tmp_path / "nowhere") == psutil.virtual_memory().total
