"""Hold transformers in check while it loads: no bars, no warnings, no header read three times.

All of it is global state of other libraries, as is the default dtype that transformers sets while
it loads. So one thread at a time is inside, and everything is put back on the way out; importing
this module changes nothing.
"""

import functools
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from transformers import modeling_gguf_pytorch_utils as gguf_loader
from transformers.utils import logging as _log

_ALONE = threading.RLock()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and warnings inside, and put them back after."""
    with _ALONE, warnings.catch_warnings(), _swapped(gguf_loader, "tqdm", _log.tqdm):
        # (that bar alone is out of reach of transformers' own switch)
        bars, verbosity = _log.is_progress_bar_enabled(), _log.get_verbosity()
        warnings.simplefilter("ignore", FutureWarning)  # PEFT uses names transformers will drop
        _log.set_verbosity(logging.ERROR)
        _log.disable_progress_bar()
        try:
            yield
        finally:
            _log.set_verbosity(verbosity)
            if bars:
                _log.enable_progress_bar()


def _plain_reader() -> type:
    """Return a reader that slices its file as a plain array.

    A header of 50,000 tokens is half a million slices, and numpy's memmap takes four times as long
    for each of them; the bytes are mapped all the same.
    """
    import gguf  # needed for such files alone, so who opens none need not have it

    class PlainReader(gguf.GGUFReader):  # type: ignore[misc]
        @property
        def data(self) -> NDArray[np.uint8]:
            return self._plain

        @data.setter
        def data(self, mapped: NDArray[np.uint8]) -> None:
            self._plain = np.asarray(mapped)

    return PlainReader


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """Keep transformers from reading a GGUF's header, and naming its tensors, again and again.

    It does so for the configuration, for the weights and once for each module: 8 of 14 s for
    SmolLM2.
    """
    import gguf  # see `_plain_reader`

    with (
        _ALONE,
        _swapped(gguf, "GGUFReader", functools.cache(_plain_reader())),
        _swapped(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        yield


@contextmanager
def _swapped(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Give a module's attribute another value inside; callers hold `_ALONE`."""
    kept = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, kept)
