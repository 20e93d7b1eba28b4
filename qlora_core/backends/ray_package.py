"""`qlora_core` as one zip file, for a cluster that need not have it.

The same sources give the same bytes, and the name is their hash: so a cluster that has it already
is sent nothing, and a changed source never meets an old package.
"""

import hashlib
import io
import zipfile
from pathlib import Path

import qlora_core

_LONG_AGO = (1980, 1, 1, 0, 0, 0)


def package() -> tuple[str, bytes]:
    """Return (name, content) of a zip file with the package's Python sources in it."""
    root = Path(qlora_core.__file__).parent
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*.py")):
            entry = zipfile.ZipInfo(path.relative_to(root.parent).as_posix(), _LONG_AGO)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, path.read_bytes())
    content = buffer.getvalue()
    return f"_ray_pkg_{hashlib.sha256(content).hexdigest()[:32]}.zip", content
