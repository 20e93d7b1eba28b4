"""What a device fails with: it has too little memory, it is broken, or the program is.

CUDA tells these apart by a text alone, such as "CUDA error: uncorrectable ECC error encountered".
After most of them nothing works in that process any more.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from qlora_core.errors import DeviceError, ResourceError
from qlora_core.training.memory import is_out_of_memory
from qlora_core.training.room import SMALLER

_OF_THE_PROGRAM = ("device-side assert", "invalid", "no kernel image", "unsupported")
"""In CUDA's errors that would come again on any GPU."""


@contextmanager
def device_errors() -> Iterator[None]:
    """Say in our words what a device failed with; what the program did wrong stays as it is.

    Raises:
        ResourceError: It has too little memory.
        DeviceError: It has failed.
    """
    try:
        with lost_devices_told():
            yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise ResourceError(
                "The device ran out of memory outside of a pass.",  # those are halved
                why=_first_line(error),
                fix=SMALLER,
            ) from error
        raise


@contextmanager
def lost_devices_told() -> Iterator[None]:
    """Say in our words that a device has failed; all else stays as it is.

    Raises:
        DeviceError: It has failed.
    """
    try:
        yield
    except RuntimeError as error:
        if is_device_lost(error):
            raise DeviceError(
                f"A GPU of {socket.gethostname()} has failed: {_first_line(error)}",
                why="A process that has met this cannot use it any more; a new one may.",
                fix="If it comes back, take that node out of the cluster and look at its GPU "
                "(`nvidia-smi -q`, and Xid in its kernel's log).",
            ) from error
        raise


def is_device_lost(error: RuntimeError) -> bool:
    """Say whether a GPU has failed (an ECC error, it fell off the bus), and not the program."""
    said = _first_line(error)
    is_other = is_out_of_memory(error) or any(text in said for text in _OF_THE_PROGRAM)
    return "CUDA error" in said and not is_other


def _first_line(error: RuntimeError) -> str:
    """Return what torch says before it goes on about how to find out more."""
    return str(error).strip().partition("\n")[0][:300]
