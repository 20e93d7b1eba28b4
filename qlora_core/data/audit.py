"""Count what is kept and what is dropped, so that no row vanishes in silence."""

import json
from collections import Counter
from pathlib import Path, PurePath
from types import TracebackType
from typing import Literal, Self

import numpy as np

from qlora_core.artifacts import SplitFacts
from qlora_core.data.prepared import Rows
from qlora_core.data.problems import Place

Reason = Literal[
    "empty",
    "too_long",
    "duplicate",
    "special_tokens",
    "in_heldout",
    "nothing_supervised",
    "over_max_rows",
]

_QUANTILES = {"min": 0.0, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
_BINS = 20
_SHOWN_CHARS = 200


class Drops:
    """Rows that are left out, counted by reason and listed in `dropped.jsonl`, one a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self._file = self._path.open("w", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, place: Place, reason: Reason, text: str) -> None:
        """Leave out the row at ``place``; its text is shortened in the list."""
        self.counts[reason] += 1
        # The name without its folder: a moved file must leave the same bytes.
        line = {
            "file": PurePath(place.file).name,
            place.unit: place.number,
            "reason": reason,
            "text": shortened(text),
        }
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def describe(self) -> str:
        """Say how many rows were dropped for which reason."""
        reasons = (f"{count} {reason}" for reason, count in sorted(self.counts.items()))
        return f"{self.counts.total()} rows dropped: {', '.join(reasons)}"


def shortened(text: str) -> str:
    """Return the first 200 characters of ``text``."""
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."


def summarise(rows: Rows) -> SplitFacts:
    """Return the counts of one side of the split."""
    lengths = rows.lengths
    quantiles = {
        name: int(np.quantile(lengths, q, method="inverted_cdf")) for name, q in _QUANTILES.items()
    }
    return SplitFacts(
        num_rows=len(rows),
        num_tokens=int(lengths.sum()),
        num_supervised_tokens=int(rows.num_supervised.sum()),
        length_quantiles=quantiles,
        length_histogram=_histogram(rows),
    )


def _histogram(rows: Rows) -> tuple[tuple[int, int], ...]:
    """Count rows in at most 20 bins of equal width; a bin holds lengths up to its edge."""
    width = -(-int(rows.lengths.max()) // _BINS)
    counts = np.bincount((rows.lengths - 1) // width)
    return tuple(((number + 1) * width, int(count)) for number, count in enumerate(counts))
