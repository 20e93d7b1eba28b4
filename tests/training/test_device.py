"""What torch says of a device, told apart by the texts that CUDA has for it."""

import pytest
import torch

from qlora_core.errors import DeviceError, ResourceError
from qlora_core.training.device import device_errors, lost_devices_told

HINT = "\nCUDA kernel errors might be asynchronously reported at some other API call."


def met(error: Exception) -> Exception:
    with pytest.raises(Exception) as caught, device_errors():
        raise error
    return caught.value


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: unspecified launch failure",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`",
        "CUDA error: all CUDA-capable devices are busy or unavailable",
    ],
)
@pytest.mark.parametrize("kind", [RuntimeError, getattr(torch, "AcceleratorError", RuntimeError)])
def test_a_gpu_that_fails_is_worth_another_process(said, kind):
    error = met(kind(said + HINT))

    assert isinstance(error, DeviceError)
    assert error.is_transient
    assert error.what.endswith(said)
    assert "nvidia-smi" in error.fix


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: device-side assert triggered",
        "CUDA error: invalid device function",
        "CUDA error: no kernel image is available for execution on the device",
        "shapes do not fit",
    ],
)
def test_what_the_program_did_wrong_stays_as_it_is(said):
    error = RuntimeError(said + HINT)

    assert met(error) is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory" + HINT),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
def test_too_little_memory_outside_of_a_pass_is_too_little(error):
    assert isinstance(met(error), ResourceError)
    with pytest.raises(type(error)), lost_devices_told():  # asked for by who has other advice
        raise error
