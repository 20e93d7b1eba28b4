"""Names for values and files: SHA-256 of canonical JSON, of one file, and of a file tree.

Two recipes that mean the same must get the same name on every machine and in every Python, so
nothing here uses `hash()`, pickle, or the order in which a dict or a folder happens to list
itself. Floats are written by `repr`, which is the shortest text that reads back as the same bits.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

DIGEST_CHARS = 64
_BLOCK_BYTES = 1 << 20


def canonical_json(value: object) -> str:
    """Return ``value`` as JSON with sorted keys, no spaces and no NaN.

    Raises:
        ValueError: ``value`` holds NaN or infinity, which JSON cannot say.
        TypeError: ``value`` holds something that is not plain data.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def fingerprint(value: object) -> str:
    """Return the SHA-256 of ``value``'s canonical JSON, 64 hexadecimal characters."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal characters."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            sha.update(block)
    return sha.hexdigest()


def files_below(folder: Path) -> list[str]:
    """Return the relative names (posix) of all files below ``folder``, sorted."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def tree_digest(entries: Iterable[tuple[str, str]]) -> str:
    """Return one digest of a tree from its (relative name, file digest) pairs, in any order."""
    return fingerprint(sorted(entries))
