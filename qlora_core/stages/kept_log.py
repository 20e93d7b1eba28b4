"""Keep what driver and workers said with the tracked run.

Their log lies in the scratch folder, which is gone once the artefact is sealed, and with it the
reason for anything odd that did not end the run. Of a long one its beginning (what was found and
chosen) and its end (what happened) are kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_core.ports import Context
from qlora_core.training.journal import LOG_FILE

_HALF_BYTES = 500_000
"""Of the beginning, and of the end."""


@contextmanager
def log_kept(ctx: Context, name: str) -> Iterator[None]:
    """Track the log when the block ends, however it ends, as `logs/<name>.log`.

    Args:
        ctx: Whose scratch folder and tracker.
        name: Of what is done in the block.
    """
    try:
        yield
    finally:
        with suppress(OSError):  # what the block ended with matters more; most have no log
            ctx.tracker.log_text(f"logs/{name}.log", shortened(ctx.scratch / LOG_FILE))


def shortened(path: Path, half_bytes: int = _HALF_BYTES) -> str:
    """Return a file's text, without its middle if it is longer than twice ``half_bytes``.

    Raises:
        OSError: It cannot be read.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        if size_bytes <= 2 * half_bytes:
            return file.read().decode("utf-8", "replace")
        beginning = file.read(half_bytes)
        file.seek(-half_bytes, 2)
        end = file.read()
    left_out = f"\n[... {size_bytes - len(beginning) - len(end)} bytes left out ...]\n"
    return beginning.decode("utf-8", "replace") + left_out + end.decode("utf-8", "replace")
