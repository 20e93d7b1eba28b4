"""Random tokens as prepared rows, all of one length and all of them supervised."""

import numpy as np

from qlora_core.data.prepared import Rows


def random_rows(num_rows: int, length: int, vocabulary: int, seed: int) -> Rows:
    """Return ``num_rows`` full rows; what packing makes of a real dataset."""
    random = np.random.default_rng(seed)
    flat = random.integers(1, vocabulary, num_rows * length, dtype=np.int32)
    return Rows(flat, flat.copy(), np.arange(num_rows + 1, dtype=np.int64) * length)
