"""Which dtype products are computed in, decided once for a recipe on a kind of device.

A GPU since Ampere multiplies bfloat16 natively, older ones only float16. On a CPU the answer is
float32 even where it has bfloat16 instructions: most CPUs emulate them, slower by an order of
magnitude, and a recipe shall not mean one thing on this machine and another on the next.
"""

from typing import Literal

import torch

ComputeDtype = Literal["auto", "bfloat16", "float16", "float32"]
DtypeName = Literal["bfloat16", "float16", "float32"]

_BY_NAME: dict[DtypeName, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def resolve_compute_dtype(choice: ComputeDtype, device_type: str) -> torch.dtype:
    """Return the dtype to compute in on a device.

    Args:
        choice: As in `QuantizationConfig.compute_dtype`.
        device_type: As in `torch.device.type`; for `cuda` the GPUs of this machine are asked, and
            where it has none (planning for a cluster) they are taken to be Ampere or newer.
    """
    if choice != "auto":
        return torch_dtype(choice)
    if device_type != "cuda":
        return torch.bfloat16 if device_type == "xpu" else torch.float32
    if not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def compute_dtype_name(choice: ComputeDtype, device_type: str) -> DtypeName:
    """Return the name of what `resolve_compute_dtype` returns."""
    dtype = resolve_compute_dtype(choice, device_type)
    return next(name for name, known in _BY_NAME.items() if known == dtype)


def present_device_type() -> str:
    """Return `cuda` where this process sees a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_name(dtype: torch.dtype) -> str:
    """Return `bfloat16` for `torch.bfloat16`: the name that recipes and config.json use."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """Return `torch.bfloat16` for `bfloat16`.

    Raises:
        ValueError: It is none of bfloat16, float16 and float32.
    """
    for known, dtype in _BY_NAME.items():
        if known == name:
            return dtype
    raise ValueError(f"dtype {name!r} is none of {', '.join(_BY_NAME)}")
