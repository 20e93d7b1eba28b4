"""Which rows are held out: decided by what a row says, never by where it stands.

A row is held out if a hash of its group falls below the fraction. So the same rows are held out
whatever the order of the file, rows added later move no other row, and rows that share what is
hashed (a prompt with several answers, say) stay together: no answer leaks through a neighbour.
"""

import hashlib
import math
from collections.abc import Collection
from typing import Literal

from qlora_core.data.formats import Content
from qlora_core.errors import DataError
from qlora_core.fingerprint import canonical_json

By = Literal["prompt", "completion", "row"]


def group_of(content: Content, by: By) -> bytes:
    """Return the hash of what ``content`` shares with the rows it must stay together with.

    The prompt of a chat is what comes before its *first* answer, so a chat and its continuation
    stay together. Plain text has no parts: always the whole row is hashed.
    """
    if isinstance(content, str) or by == "row":
        return row_hash(content)
    answers = [at for at, turn in enumerate(content) if turn.role == "assistant"]
    if by == "completion":
        return _hash([content[at].content.strip() for at in answers])
    return _hash(content[: answers[0]])


def row_hash(content: Content) -> bytes:
    """Return the hash of all that a row says, 32 bytes."""
    return _hash(content)


def draw(group: bytes) -> float:
    """Return the number in [0, 1) that a group draws; it is held out if below the fraction."""
    digest = hashlib.sha256(b"heldout" + group).digest()
    return int.from_bytes(digest[:6], "big") / float(1 << 48)


def check_sides(drawn: Collection[float], fraction: float, by: By) -> None:
    """Make sure that both sides of the split got rows.

    Args:
        drawn: What the group of each row drew.
        fraction: Share of rows to hold out.
        by: What the groups share.

    Raises:
        DataError: One side is empty; the message names a fraction that would do.
    """
    lowest, highest = min(drawn), max(drawn)
    if lowest < fraction <= highest:
        return
    side = "training" if highest < fraction else "held-out"
    does = math.floor(highest * 1000) if highest < fraction else math.floor(lowest * 1000) + 1
    would_do = lowest < does / 1000 <= highest
    raise DataError(
        f"No {side} rows: dataset.heldout.fraction={fraction} of {len(drawn)} rows, "
        f"{len(set(drawn))} different by {by}, leaves none.",
        fix=(f"Try dataset.heldout.fraction={does / 1000}, or name" if would_do else "Name")
        + " a file of held-out rows in dataset.heldout.source"
        + (", or" if by == "row" else ", split by: row, or")
        + " give more rows.",
    )


def _hash(value: object) -> bytes:
    return hashlib.sha256(canonical_json(value).encode()).digest()
