"""What every system is given: rows, their order, the model, the adapter's start, the settings.

A workload is a folder, made once (`benchmarks.training.making`) and only read afterwards:

    workload.json    the settings below
    rows.jsonl       tokenised rows in the order in which they are to be trained: the longest ones
                     make the first step
    model/           an NF4 checkpoint that transformers opens
    adapter/         the adapter's start, in PEFT's format
    data/            the same rows as our own engine reads them

Nothing but the standard library is imported here, as every peer's environment reads it.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

IGNORED = -100
SETTINGS_FILE = "workload.json"
ROWS_FILE = "rows.jsonl"


class Row(NamedTuple):
    """One tokenised chat."""

    input_ids: list[int]
    supervised: list[int]
    """1 where the token must be predicted, else 0; as long as the tokens."""

    @property
    def labels(self) -> list[int]:
        """The tokens to predict, -100 elsewhere; aligned with the tokens, not shifted."""
        pairs = zip(self.input_ids, self.supervised, strict=True)
        return [token if is_supervised else IGNORED for token, is_supervised in pairs]


@dataclass(frozen=True)
class Settings:
    """What is trained and how; the same for every system."""

    data: str
    """Where the rows are from, in words."""
    num_rows: int
    """Rows of an epoch."""
    num_tokens: int
    num_supervised_tokens: int
    """Of an epoch, first tokens of rows not counted, as nothing predicts them."""
    pad_id: int
    """Of a token that occurs in no row."""
    longest: int
    """Tokens of the longest row."""
    num_body_parameters: int
    """Frozen weights that each token is multiplied by."""
    num_head_parameters: int
    """Of the output head."""
    compute_dtype: str = "float32"
    """Of the checkpoint, and of products where a system does not choose another."""
    rank: int = 16
    alpha: int = 32
    global_batch: int = 8
    """Rows of an optimizer step."""
    micro_batch: int = 8
    """Rows of a forward pass."""
    learning_rate: float = 2e-4
    """The same at every step."""
    max_grad_norm: float = 1.0
    seed: int = 0

    @property
    def pack_length(self) -> int:
        """Tokens of one pack, where a system packs: the longest row fits, in steps of 128."""
        return max(512, -(-self.longest // 128) * 128)

    @property
    def num_packs(self) -> int:
        """Packs of a forward pass: as many tokens as a micro-batch of rows has on average."""
        budget = self.micro_batch * self.num_tokens / self.num_rows
        return max(1, round(budget / self.pack_length))

    @property
    def num_accumulated(self) -> int:
        """Forward passes of an optimizer step."""
        return self.global_batch // self.micro_batch


@dataclass(frozen=True)
class Workload:
    """A workload's folder, opened."""

    folder: Path
    settings: Settings

    @property
    def model(self) -> Path:
        """Folder of the quantised checkpoint."""
        return self.folder / "model"

    @property
    def adapter(self) -> Path:
        """Folder of the adapter's start."""
        return self.folder / "adapter"

    def rows(self, at_most: int | None = None) -> list[Row]:
        """Read the first rows of the order, or all."""
        return list(self._rows(at_most))

    def steps(self, num_steps: int) -> list[list[Row]]:
        """Return the rows of the first optimizer steps."""
        size = self.settings.global_batch
        rows = self.rows(num_steps * size)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _rows(self, at_most: int | None) -> Iterator[Row]:
        with (self.folder / ROWS_FILE).open(encoding="utf-8") as file:
            for number, line in enumerate(file):
                if at_most is not None and number >= at_most:
                    return
                yield Row(**json.loads(line))


def open_workload(folder: Path, **changes: Any) -> Workload:
    """Open a workload; ``changes`` replace settings that its files do not depend on."""
    stored = Settings(**json.loads((folder / SETTINGS_FILE).read_text("utf-8")))
    return Workload(folder, replace(stored, **changes))


def write_workload(folder: Path, settings: Settings, rows: list[Row]) -> None:
    """Write what a workload is besides its model; the settings last."""
    lines = (json.dumps(row._asdict()) + "\n" for row in rows)
    with (folder / ROWS_FILE).open("w", encoding="utf-8") as file:
        file.writelines(lines)
    text = json.dumps(asdict(settings), indent=1) + "\n"
    (folder / SETTINGS_FILE).write_text(text, "utf-8")


def spread_evenly(number: int, num_chosen: int) -> list[int]:
    """Return the middles of ``num_chosen`` equal parts of ``number`` places."""
    return [(2 * part + 1) * number // (2 * num_chosen) for part in range(num_chosen)]
