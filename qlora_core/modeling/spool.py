"""Tensors set down on disk while more of them are made, to become a checkpoint in the end.

A safetensors file begins with a header that knows all sizes, but what a layer takes in 4 bits is
only known once it is quantised (its scales are described in JSON). So quantised tensors go to an
unnamed file as they come, and are copied into place when the last one is there: the disk holds
them twice for a while, memory one at a time. The file is gone when the process is, however it ends.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from qlora_core.errors import storing
from qlora_core.modeling.heap import Stream
from qlora_core.modeling.weights import TensorInfo, Written, bytes_of, read_tensor, write_checkpoint

MAX_SHARD_BYTES = 50_000_000_000
"""Largest file, as transformers' `save_pretrained` has it."""

_ORDER = (
    torch.int64, torch.float64, torch.float32, torch.int32, torch.bfloat16, torch.float16,
    torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
"""In which safetensors' own writer sorts a file's tensors, then by name: so all stay aligned."""


@contextmanager
def open_spool(folder: Path) -> Iterator["Spool"]:
    """Give a spool on the disk of ``folder`` for the length of a block."""
    with tempfile.TemporaryFile(dir=folder) as file:
        yield Spool(file, folder)


class Spool:
    """An unnamed file of tensors.

    Args:
        file: Where they go.
        folder: On whose disk it lies.
    """

    def __init__(self, file: IO[bytes], folder: Path) -> None:
        self._file, self._folder = file, folder
        self._placed: dict[str, tuple[int, TensorInfo]] = {}
        self._end = 0
        self._stream = Stream()

    def add(self, name: str, tensor: Tensor) -> None:
        """Set a tensor down; the caller may then let go of it.

        Raises:
            StoreError: The disk is full, say.
        """
        info = TensorInfo(tuple(tensor.shape), tensor.dtype)
        with storing(self._folder):
            self._file.seek(self._end)
            self._file.write(bytes_of(tensor))
            self._file.flush()
        self._placed[name] = (self._end, info)
        self._end += info.size_bytes

    def write(self, folder: Path) -> Written:
        """Write all tensors to safetensors files in ``folder``: one, unless it gets too large.

        Raises:
            StoreError: The disk is full, say.
        """
        with storing(folder):
            return write_checkpoint(
                folder, self._infos(), self._read, max_shard_bytes=MAX_SHARD_BYTES
            )

    def _infos(self) -> Mapping[str, TensorInfo]:
        infos = {name: info for name, (_, info) in self._placed.items()}
        return dict(
            sorted(infos.items(), key=lambda entry: (_ORDER.index(entry[1].dtype), entry[0]))
        )

    def _read(self, name: str) -> Tensor:
        start, info = self._placed[name]
        self._stream.passed(info.size_bytes)
        return read_tensor(self._file, start, info)
