"""The file in which an evaluation's replies are kept as they come: one `Reply` a line.

The driver writes it, the launcher follows it; it lies in the stage's scratch folder, so whoever is
killed, what was asked once is not asked again. No fsync: a reply that a dead machine took along is
asked for anew.
"""

from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from qlora_core.errors import storing
from qlora_core.ports import Batch, Reply
from qlora_core.training.durable import replace_durably

REPLIES_FILE = "replies.jsonl"


class Replies:
    """The replies so far.

    Args:
        path: Read at first; a line that a killed driver left unfinished is dropped.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        known = {reply.batch: reply for reply in read_replies(path)}
        self._batches = set(known)
        replace_durably(path, "".join(_line(reply) for reply in known.values()).encode())

    def __contains__(self, batch: Batch) -> bool:
        """Say whether this very batch was replied to."""
        return batch in self._batches

    def keep(self, reply: Reply) -> None:
        """Add one.

        Raises:
            StoreError: There is no room, say.
        """
        with storing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(_line(reply))
        self._batches.add(reply.batch)

    @property
    def are_whole(self) -> bool:
        """Whether the file has them all: over a network, who appends at the same time overwrites.

        Raises:
            StoreError: It cannot be read.
        """
        with storing(self._path, "read"):
            return self._batches <= {reply.batch for reply in read_replies(self._path)}


def read_replies(path: Path) -> Iterator[Reply]:
    """Yield the whole replies of a file; none if there is no file."""
    if path.exists():
        for line in path.read_text("utf-8", errors="replace").splitlines():
            if reply := parsed(line):
                yield reply


def parsed(line: str) -> Reply | None:
    """Return the reply of a line; None for a part of one."""
    try:
        return Reply.model_validate_json(line)
    except ValidationError:
        return None


def _line(reply: Reply) -> str:
    """Return it in ASCII: models say U+2028 and the like, at which Python ends lines."""
    return reply.model_dump_json(ensure_ascii=True) + "\n"
