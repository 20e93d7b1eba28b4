"""Read and write the tensors of a checkpoint one at a time, 4-bit ones dequantised on the way.

A merge must not need the memory of the model: a 70B model is 140 GB in 16 bits, one of its layers
0.5 GB. So nothing here loads a model, nor maps one: pages of a mapped file stay with the process
until the file is closed, so reading all of it would weigh as much as loading it. Reading notes
where each tensor lies and reads its bytes when asked; a bitsandbytes weight lies there in parts
(`w`, `w.absmax`, `w.nested_absmax`, `w.quant_map`, ...) and is put together and dequantised.
Writing knows all sizes beforehand, so it writes each file's header first and then streams the
tensors behind it; by hand, because the library's `save_file` wants all tensors of a file at once
and turns a full disk into an error of its own kind.

Format: https://github.com/huggingface/safetensors#format
Dims: O out features, I in features.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import bitsandbytes.functional as bnb
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qlora_core.errors import ArtifactError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_QUANT_STATE = ".quant_state.bitsandbytes__"
_SCB = ".SCB"
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of the values, without any header."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Weights(Protocol):
    """The named tensors of a model, read one at a time, never quantised."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return what there is, tied weights once."""

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU; the caller owns it."""


class ModelWeights:
    """The weights of a model that lies in memory as a whole; tied ones count once."""

    def __init__(self, model: nn.Module) -> None:
        # parameters() and buffers() name shared tensors once; state_dict() names them all
        persistent = model.state_dict(keep_vars=True)
        named = [*model.named_parameters(), *model.named_buffers()]
        self._tensors = {name: tensor for name, tensor in named if name in persistent}

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return name, shape and dtype of every tensor."""
        return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """Return a copy of one tensor on the CPU."""
        return self._tensors[name].detach().cpu().clone()


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the values of a tensor as safetensors stores them."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def read_tensor(file: IO[bytes], start: int, info: TensorInfo) -> Tensor:
    """Return the tensor whose bytes begin at ``start`` of a file.

    Raises:
        ArtifactError: The file ends before the tensor does.
    """
    file.seek(start)
    read = np.fromfile(file, np.uint8, info.size_bytes)
    if read.nbytes != info.size_bytes:
        raise ArtifactError(
            f"{file.name} ends {info.size_bytes - read.nbytes} bytes before the tensor does that "
            f"starts at byte {start}."
        )
    return torch.from_numpy(read).view(info.dtype).reshape(info.shape)


@dataclass(frozen=True)
class _StoredTensor:
    """Where a tensor lies."""

    path: Path
    start: int
    """First byte of its values in the file."""
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]

    def info(self, name: str) -> TensorInfo:
        if self.dtype not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise ArtifactError(f"{self.path} stores {name} as {self.dtype}, none of {known}.")
        return TensorInfo(self.shape, _DTYPES[self.dtype])

    def read(self, name: str) -> Tensor:
        with self.path.open("rb") as file:
            return read_tensor(file, self.start, self.info(name))


class CheckpointWeights:
    """The weights in a folder of safetensors files, read only when asked for.

    Args:
        folder: A transformers checkpoint: one safetensors file, or several with an index.

    Raises:
        ArtifactError: A file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._stored_in = _stored_tensors(folder)
        self._quant_state_of = {
            name.split(_QUANT_STATE)[0]: name for name in self._stored_in if _QUANT_STATE in name
        }
        self._scale_of = {
            f"{name.removesuffix(_SCB)}.weight": name
            for name in self._stored_in
            if name.endswith(_SCB)
        }

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return name, shape and dtype of every tensor as `read` gives it."""
        names = sorted(name for name in self._stored_in if not self._is_part(name))
        return {name: self._info(name) for name in names}

    def read(self, name: str) -> Tensor:
        """Return one tensor, dequantised to the dtype that bitsandbytes multiplies with."""
        if name in self._quant_state_of:
            return self._dequantized_4bit(name)
        if name in self._scale_of:
            scale_O = self._stored(self._scale_of[name]).float()
            return self._stored(name).float() * (scale_O / 127.0)[:, None]
        return self._stored(name)

    def packed_names(self) -> frozenset[str]:
        """Return the names of the weights that are stored in 4 bits."""
        return frozenset(self._quant_state_of)

    def read_packed(self, name: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a 4-bit weight as it is stored, and what dequantises it, as bitsandbytes wants.

        Args:
            name: One of `packed_names`.
        """
        parts = [part for part in self._stored_in if part.startswith(f"{name}.")]
        return self._stored(name), {part: self._stored(part) for part in parts}

    def _is_part(self, name: str) -> bool:
        module = name.rpartition(".")[0]
        of_4bit = any(prefix in self._quant_state_of for prefix in _prefixes(name))
        of_int8 = f"{module}.weight" in self._scale_of and name.endswith((_SCB, ".weight_format"))
        return of_4bit or of_int8

    def _info(self, name: str) -> TensorInfo:
        if name in self._quant_state_of:
            return _unpacked_info(self._stored(self._quant_state_of[name]))
        info = self._stored_in[name].info(name)
        return TensorInfo(info.shape, torch.float32) if name in self._scale_of else info

    def _dequantized_4bit(self, name: str) -> Tensor:
        packed, parts = self.read_packed(name)
        state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
        weight_OI: Tensor = bnb.dequantize_4bit(packed, state)
        return weight_OI

    def _stored(self, name: str) -> Tensor:
        return self._stored_in[name].read(name)


@dataclass(frozen=True)
class Written:
    """What `write_checkpoint` left in the folder."""

    num_shards: int
    num_tensors: int
    size_bytes: int
    """Of the tensors."""


def write_checkpoint(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    *,
    max_shard_bytes: int,
) -> Written:
    """Stream tensors into safetensors files that transformers loads; the same in, the same bytes.

    Holds one tensor at a time. A tensor larger than ``max_shard_bytes`` gets a file of its own.

    Args:
        folder: Where the files go; must exist.
        infos: What each tensor will be, in the order of writing.
        read: Returns a tensor by name, of exactly that shape and dtype.
        max_shard_bytes: Largest sum of tensor bytes in a file.

    Raises:
        ArtifactError: A tensor is not what ``infos`` promised.
        OSError: The disk is full, say.
    """
    shards = list(_shards(infos, max_shard_bytes))
    file_names = _file_names(len(shards))
    for file_name, names in zip(file_names, shards, strict=True):
        _write_shard(folder / file_name, {name: infos[name] for name in names}, read)
    size_bytes = sum(info.size_bytes for info in infos.values())
    if len(shards) > 1:
        file_of = {n: file for file, names in zip(file_names, shards, strict=True) for n in names}
        index = {"metadata": {"total_size": size_bytes}, "weight_map": file_of}
        text = json.dumps(index, indent=2, sort_keys=True)
        (folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")
    return Written(len(shards), len(infos), size_bytes)


def _shards(infos: Mapping[str, TensorInfo], max_bytes: int) -> Iterator[list[str]]:
    shard: list[str] = []
    room = max_bytes
    for name, info in infos.items():
        if shard and info.size_bytes > room:
            yield shard
            shard, room = [], max_bytes
        shard.append(name)
        room -= info.size_bytes
    if shard:
        yield shard


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _write_shard(
    path: Path, infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor]
) -> None:
    with path.open("wb") as file:
        file.write(_header(infos))
        for name, info in infos.items():
            tensor = read(name)
            if (tuple(tensor.shape), tensor.dtype) != (info.shape, info.dtype):
                raise ArtifactError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, "
                    f"but {info.dtype} {info.shape} was announced."
                )
            file.write(bytes_of(tensor))


def _header(infos: Mapping[str, TensorInfo]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in infos.items():
        entries[name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.size_bytes],
        }
        offset += info.size_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _stored_tensors(folder: Path) -> dict[str, _StoredTensor]:
    """Return where in the files of ``folder`` each stored tensor lies."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return _header_of(folder / SINGLE_FILE)
    file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    missing = sorted({file for file in file_of.values() if not (folder / file).is_file()})
    if missing:
        raise ArtifactError(f"{folder} lacks {', '.join(missing)}, which its index names.")
    headers = {file: _header_of(folder / file) for file in sorted(set(file_of.values()))}
    if absent := sorted(name for name, file in file_of.items() if name not in headers[file]):
        raise ArtifactError(
            f"{folder / file_of[absent[0]]} lacks {absent[0]!r}, which the index says it holds "
            f"({len(absent)} such tensors)."
        )
    return {name: headers[file][name] for name, file in file_of.items()}


def _header_of(path: Path) -> dict[str, _StoredTensor]:
    """Read a file's header, after the library has found it sound and the file long enough."""
    try:
        with safe_open(path, framework="pt", device="cpu"), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read as safetensors: {error}.") from error
    header.pop("__metadata__", None)
    return {
        name: _StoredTensor(path, 8 + size + entry["data_offsets"][0], entry["dtype"],
                            tuple(entry["shape"]))
        for name, entry in header.items()
    }  # fmt: skip


def _unpacked_info(packed: Tensor) -> TensorInfo:
    """Read the JSON that bitsandbytes keeps in a uint8 tensor beside each 4-bit weight."""
    state = json.loads(bytes(packed.tolist()))
    return TensorInfo(tuple(state["shape"]), getattr(torch, state["dtype"]))


def _prefixes(name: str) -> Sequence[str]:
    """Return all dotted prefixes of ``name`` but itself."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
