"""What a model is asked: held-out rows for the loss, prompts to answer. A pure choice of the data.

Every worker makes the same choice from the same files; the digest proves it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_core.config import EvaluationConfig
from qlora_core.data.prepared import Prompt, Rows, read_prompts, read_split
from qlora_core.errors import DataError
from qlora_core.fingerprint import canonical_json


@dataclass(frozen=True)
class Questions:
    """Rows for the loss, prompts for answers."""

    rows: Rows
    indices: tuple[int, ...]
    """Of the rows that are measured."""
    prompts: tuple[Prompt, ...]

    def digest(self) -> str:
        """Return what names the questions: tokens, prompts and references."""
        sha = hashlib.sha256()
        for i in self.indices:
            sha.update(int(self.rows.lengths[i]).to_bytes(8, "little"))
            sha.update(self.rows.input_ids(i).tobytes() + self.rows.labels(i).tobytes())
        asked = [[p.text, list(p.ids), list(p.references)] for p in self.prompts]
        sha.update(canonical_json(asked).encode())
        return sha.hexdigest()


def read_questions(evaluation: EvaluationConfig, folder: Path) -> Questions:
    """Choose what is asked of the PreparedDataset in ``folder``.

    Raises:
        DataError: There is no held-out row to measure.
        ArtifactError: The files cannot be read.
    """
    rows = read_split(folder, "heldout")
    prompts: Sequence[Prompt] = read_prompts(folder) if evaluation.generate else ()
    chosen = tuple(i for i in spread(len(rows), evaluation.max_rows) if rows.num_supervised[i])
    if not chosen:
        raise DataError(
            f"None of the {len(rows)} held-out rows has a token to predict.",
            fix="Raise dataset.heldout.fraction, or give dataset.heldout.source.",
        )
    return Questions(
        rows, chosen, tuple(prompts[i] for i in spread(len(prompts), evaluation.max_rows))
    )


def spread(count: int, limit: int | None) -> list[int]:
    """Return at most ``limit`` of ``count`` numbers, evenly spaced, as files may be sorted."""
    kept = min(count, limit or count)
    return [i * count // kept for i in range(kept)]
