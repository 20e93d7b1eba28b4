"""The files of a PreparedDataset: written once by preparation, read by training and evaluation.

`train.parquet` and `heldout.parquet` hold one tokenised row a line: `input_ids`, and `labels` of
the same length that repeat the supervised tokens and are -100 elsewhere. Labels are *aligned*, not
shifted: `labels[t]` is what the model must predict after seeing `input_ids[:t]`, so `labels[0]` is
predicted from nothing and never counts. `eval.parquet` holds the distinct held-out prompts with all
their references.

The same rows give the same bytes: no timestamps, fixed row groups, fixed compression.
Dims: L tokens of a row, N rows, T tokens of all rows together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qlora_core.errors import ArtifactError

IGNORED = -100
"""Label of a token that is not supervised; torch's cross-entropy skips it."""

_TOKENS = pa.list_(pa.field("item", pa.int32(), nullable=False))
_ROWS = pa.schema([pa.field(name, _TOKENS, nullable=False) for name in ("input_ids", "labels")])
_PROMPTS = pa.schema(
    [
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("prompt_ids", _TOKENS, nullable=False),
        pa.field("references", pa.list_(pa.field("item", pa.string(), nullable=False))),
    ]
)
_ROWS_PER_GROUP = 4096


class TokenRow(NamedTuple):
    """One tokenised row, both of length L."""

    input_ids: Sequence[int] | NDArray[np.int32]
    labels: Sequence[int] | NDArray[np.int32]


@dataclass(frozen=True)
class Prompt:
    """Something to answer, and every answer that counts as right."""

    text: str
    """The last user turn, or the raw prompt: for people, and for scorers."""
    ids: tuple[int, ...]
    """The whole rendered conversation up to the answer, generation prompt included."""
    references: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Rows:
    """Tokenised rows, flat in memory, so any row is a slice.

    Args:
        flat_ids: (T,) tokens of all rows, one after the other.
        flat_labels: (T,) their labels.
        offsets: (N + 1,) where each row starts in them.
    """

    flat_ids: NDArray[np.int32]
    flat_labels: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def input_ids(self, i: int) -> NDArray[np.int32]:
        """Return the (L,) tokens of row ``i``: a view, not a copy."""
        return self.flat_ids[self._slice(i)]

    def labels(self, i: int) -> NDArray[np.int32]:
        """Return the (L,) labels of row ``i``: a view, not a copy."""
        return self.flat_labels[self._slice(i)]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) tokens of each row."""
        return self.offsets[1:] - self.offsets[:-1]

    @cached_property
    def num_supervised(self) -> NDArray[np.int64]:
        """(N,) supervised tokens of each row that are predicted, so from its second token on."""
        is_supervised = self.flat_labels != IGNORED
        sums = np.concatenate([[0], np.cumsum(is_supervised, dtype=np.int64)])
        total: NDArray[np.int64] = sums[self.offsets[1:]] - sums[self.offsets[:-1]]
        starts = self.offsets[:-1][self.lengths > 0]
        total[self.lengths > 0] -= is_supervised[starts]
        return total

    def _slice(self, i: int) -> slice:
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        i %= len(self)
        return slice(int(self.offsets[i]), int(self.offsets[i + 1]))


def read_split(folder: Path, split: Literal["train", "heldout"]) -> Rows:
    """Read one side of the split from the folder of a PreparedDataset.

    Raises:
        ArtifactError: The file is missing or is not what preparation writes.
    """
    table = _read(folder / f"{split}.parquet", _ROWS)
    lengths, flat_ids = _flat(table.column("input_ids"))
    label_lengths, flat_labels = _flat(table.column("labels"))
    if not np.array_equal(lengths, label_lengths):
        raise ArtifactError(f"{folder / split}.parquet: labels are not aligned with input_ids.")
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Rows(flat_ids, flat_labels, offsets)


def read_prompts(folder: Path) -> list[Prompt]:
    """Read the distinct held-out prompts; none for plain text.

    Raises:
        ArtifactError: The file is missing or is not what preparation writes.
    """
    rows = _read(folder / "eval.parquet", _PROMPTS).to_pylist()
    return [Prompt(r["prompt"], tuple(r["prompt_ids"]), tuple(r["references"])) for r in rows]


def write_split(folder: Path, split: Literal["train", "heldout"], rows: Iterable[TokenRow]) -> None:
    """Write one side of the split, a row group at a time."""
    _write(folder / f"{split}.parquet", _ROWS, rows)


def write_prompts(folder: Path, prompts: Iterable[Prompt]) -> None:
    """Write the held-out prompts."""
    records = ((p.text, p.ids, p.references) for p in prompts)
    _write(folder / "eval.parquet", _PROMPTS, records)


def _write(path: Path, schema: pa.Schema, records: Iterable[tuple[object, ...]]) -> None:
    rest = iter(records)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(islice(rest, _ROWS_PER_GROUP)):
            columns = zip(zip(*group, strict=True), schema, strict=True)
            arrays = [_array(column, field.type) for column, field in columns]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _array(column: Sequence[object], kind: pa.DataType) -> pa.Array:
    """Return a column; numpy rows are laid end to end, five times as fast as one by one."""
    if not all(isinstance(row, np.ndarray) for row in column):
        return pa.array(column, type=kind)
    rows = cast("Sequence[NDArray[np.int32]]", column)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(rows), type=kind)


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        table = pq.read_table(path, columns=schema.names)
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(
            f"{path} cannot be read: {error}",
            why="It is not a file of a prepared dataset, or it is damaged.",
            fix="Run the recipe again: the store makes the dataset anew.",
        ) from None
    if table.schema.names != schema.names:
        raise ArtifactError(f"{path} has columns {table.schema.names}, not {schema.names}.")
    return table


def _flat(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return (N,) lengths and (T,) values; chunks are joined here, as 2**31 values need several."""
    lengths = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    none = np.empty(0, np.int32)
    return (
        np.concatenate([none, *lengths]).astype(np.int64),
        np.concatenate([none, *values]).astype(np.int32, copy=False),
    )
