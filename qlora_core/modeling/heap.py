"""Give freed memory back, where little of it is what matters.

glibc maps large blocks by themselves and unmaps them when they are freed, but what counts as large
grows with what is freed, up to 32 MB. So tensors of usual size end on a heap, which shrinks only at
its top: hundreds of MB of holes, seen from outside, where two tensors are alive. `malloc_trim`
returns the holes; without them in the first place, every tensor is mapped anew and its pages are
zeroed, which huge pages make bearable. With another C library there is nothing to call, and nothing
is done.

Source: mallopt(3), M_MMAP_THRESHOLD; malloc_trim(3).
"""

import ctypes
import sys

_EVERY_BYTES = 64_000_000
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_LARGE_BYTES = 1 << 20
_IS_LINUX = sys.platform == "linux"


class Stream:
    """Counts what streams through, and has the holes returned now and then."""

    def __init__(self) -> None:
        self._num_bytes = 0
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if _IS_LINUX else None

    def passed(self, num_bytes: int) -> None:
        """Note that a tensor of so many bytes has been let go of."""
        self._num_bytes += num_bytes
        if self._trim is not None and self._num_bytes >= _EVERY_BYTES:
            self._num_bytes = 0
            self._trim(0)


def give_back_at_once() -> None:
    """From now on, have freed tensors leave this process at once, holes never."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if _IS_LINUX else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
