"""Give freed memory back while tensors stream through.

glibc maps large blocks by themselves and unmaps them when they are freed, but what counts as large
grows with what is freed, up to 32 MB. So tensors of usual size end on a heap, which shrinks only at
its top: hundreds of MB of holes, seen from outside, where two tensors are alive. `malloc_trim`
returns the holes. With another C library there is nothing to call, and nothing is done.

Source: mallopt(3), M_MMAP_THRESHOLD; malloc_trim(3).
"""

import ctypes
import sys

_EVERY_BYTES = 64_000_000
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
