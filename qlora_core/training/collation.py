"""Rows become one micro-batch: padded on the right, or end to end.

Padded rows get no attention mask: in a causal model nothing real looks at what comes after it, and
attention is fastest without one. Packed rows may share what all of them begin with; see
`qlora_core.modeling.packing`.

Dims: B rows, T tokens of the longest (packed: B = 1, T = N, all tokens).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qlora_core.data.prepared import IGNORED, Rows
from qlora_core.modeling.packing import Layout
from qlora_core.training.batching import Indices

_MIN_PREFIX = 4  # a shorter one saves less than its concatenations cost


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its device."""

    input_ids_BT: Tensor
    next_labels_BT: Tensor
    """What each position must predict; IGNORED where nothing is supervised."""
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
    return Batch(torch.from_numpy(input_ids).to(device), torch.from_numpy(next_labels).to(device))


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
        torch.from_numpy(np.asarray(values, np.int64)[None]).to(device)
        for values in (np.concatenate(input_ids), np.concatenate(next_labels), layout.positions())
    )
    return Batch(ids_1N, labels_1N, positions_1N, layout)


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
