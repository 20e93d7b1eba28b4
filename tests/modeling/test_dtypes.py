import pytest
import torch

from qlora_core.modeling.dtypes import dtype_name, resolve_compute_dtype, torch_dtype


def test_a_cpu_computes_in_float32_whatever_instructions_it_has():
    assert resolve_compute_dtype("auto", "cpu") is torch.float32


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_a_named_dtype_is_taken_on_every_device(name):
    assert resolve_compute_dtype(name, "cpu") is resolve_compute_dtype(name, "cuda")
    assert dtype_name(resolve_compute_dtype(name, "cpu")) == name


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_a_gpu_that_is_elsewhere_is_taken_for_a_recent_one():
    assert resolve_compute_dtype("auto", "cuda") is torch.bfloat16


def test_an_unknown_dtype_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"float8.*bfloat16, float16, float32"):
        torch_dtype("float8")
