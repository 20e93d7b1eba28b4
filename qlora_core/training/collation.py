"""Rows become one micro-batch: padded on the right, or end to end.

Padded rows get no attention mask: in a causal model nothing real looks at what comes after it, and
attention is fastest without one. Packed rows may share what all of them begin with; see
`qlora_core.modeling.packing`.

Which positions are supervised is known here, on the host, and travels as their places: a mask on a
GPU would have to be counted there, and the host would wait for it in every pass.

Dims: B rows, T tokens of the longest (packed: B = 1, T = N, all tokens), K supervised positions.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlora_core.data.prepared import IGNORED, Rows
from qlora_core.modeling.packing import Layout
from qlora_core.training.batching import Indices

_MIN_PREFIX = 4  # a shorter one saves less than its concatenations cost


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its device."""

    input_ids_BT: Tensor
    kept_K: Tensor
    """Places, among all B * T, of the positions where something is supervised."""
    labels_K: Tensor
    """What they must predict."""
    positions_BT: Tensor | None = None
    layout: Layout | None = None
    """Where the rows lie, if they are packed."""


def collate(rows: Rows, chunk: Indices, device: torch.device) -> Batch:
    """Return the rows of ``chunk`` padded on the right to the longest of them."""
    length = int(rows.lengths[chunk].max())
    input_ids = np.zeros((len(chunk), length), np.int64)
    next_labels = np.full((len(chunk), length), IGNORED, np.int64)
    for place, row in enumerate(chunk):
        input_ids[place, : rows.lengths[row]] = rows.input_ids(row)
        next_labels[place, : rows.lengths[row] - 1] = rows.labels(row)[1:]
    return _batch(input_ids, next_labels, device)


def pack(rows: Rows, chunk: Indices, device: torch.device, *, shares_prefix: bool) -> Batch:
    """Return the rows of ``chunk`` end to end; what all begin with, once if ``shares_prefix``."""
    prefix = common_prefix(rows, chunk) if shares_prefix else 0
    first = int(chunk[0])
    input_ids = [rows.input_ids(first)[:prefix]]
    next_labels = [np.full(prefix, IGNORED, np.int32)]
    for row in chunk:
        input_ids.append(rows.input_ids(row)[prefix:])
        next_labels += [rows.labels(row)[prefix + 1 :], np.full(1, IGNORED, np.int32)]
    layout = Layout(prefix, tuple(int(rows.lengths[row]) - prefix for row in chunk))
    ids_1N, labels_1N, positions_1N = (
        np.asarray(values, np.int64)[None]
        for values in (np.concatenate(input_ids), np.concatenate(next_labels), layout.positions())
    )
    batch = _batch(ids_1N, labels_1N, device)
    return replace(batch, positions_BT=_put(positions_1N, device), layout=layout)


def _batch(ids_BT: NDArray[np.int64], labels_BT: NDArray[np.int64], device: torch.device) -> Batch:
    kept_K = np.flatnonzero(labels_BT != IGNORED)
    return Batch(
        _put(ids_BT, device), _put(kept_K, device), _put(labels_BT.reshape(-1)[kept_K], device)
    )


def _put(values: NDArray[np.int64], device: torch.device) -> Tensor:
    """Copy to a GPU behind the work that is queued there, without waiting for it."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else _pinned(tensor).to(device, non_blocking=True)


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def common_prefix(rows: Rows, chunk: Indices) -> int:
    """Return how many tokens all rows of ``chunk`` begin with, none of them predicting anything.

    The last token of a prefix predicts another one in every row, so no row's first supervised token
    may come right after it; and each row keeps at least one token of its own.
    """
    if len(chunk) < 2:
        return 0
    first = rows.input_ids(int(chunk[0]))
    length = len(first)
    for row in chunk:
        ids, supervised = rows.input_ids(row), np.flatnonzero(rows.labels(row)[1:] != IGNORED)
        length = min(length, len(ids) - 1, int(supervised[0]) if len(supervised) else len(ids))
        differs = np.flatnonzero(ids[:length] != first[:length])
        length = int(differs[0]) if len(differs) else length
    return length if length >= _MIN_PREFIX else 0
