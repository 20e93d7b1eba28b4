"""What one node of a cluster can do for a run, found out on that node. Plain Python, no Ray.

A node whose store is another disk has every path that the launcher has, if an old copy lies there;
so existing is no proof. The launcher writes a fresh word into a fresh folder, and the node has to
read that word and to leave one of its own there. The folder is made by the launcher alone: a node
that made it would find its own disk in order. And it has a new name each time, because NFS clients
remember for seconds that a name was not there.

Large files are told from others by name and size, and by the manifest that lists their SHA-256
sums, which is small: nothing here reads gigabytes.
"""

import os
import platform
from importlib import metadata
from pathlib import Path

import qlora_core
from qlora_core.artifacts import Frozen
from qlora_core.fingerprint import file_digest, files_below, tree_digest
from qlora_core.store import MANIFEST

SAME_VERSION = ("ray", "torch", "transformers", "peft", "bitsandbytes")
"""Packages whose X.Y must be the launcher's: they decide the bytes of results."""
PRESENT = ("accelerate", "numpy", "psutil", "pyarrow", "safetensors")
"""Packages that a worker imports, in any version that our own package allows."""
NONCE_FILE = "nonce"


class Listing(Frozen):
    """What the launcher finds in a folder that workers read."""

    path: Path
    sizes: dict[str, int]
    """Bytes, by relative name."""
    seal: str
    """SHA-256 of the folder's manifest; empty if it has none."""


class Question(Frozen):
    """What a node is asked."""

    meeting: Path
    """A folder of the launcher's, with `NONCE_FILE` in it."""
    nonce: str
    folders: tuple[Listing, ...]
    needs_gpu: bool


class Difference(Frozen):
    """A path that is not on this node what it is at the launcher's."""

    path: Path
    found: str
    wanted: str


class Gpu(Frozen):
    """A GPU as torch sees it."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    """Zero also where the GPU does not say: see ``trouble``."""
    trouble: str = ""
    """Why it does not say what is free: a full one has no room for the answer, either."""


class Installation(Frozen):
    """What a process imports."""

    versions: dict[str, str | None]
    """Of Python and of packages; none: not installed."""
    code: str
    """Digest of the source of `qlora_core`."""


class NodeReport(Frozen):
    """What a node answers."""

    paths: tuple[Difference, ...]
    installed: Installation
    gpus: tuple[Gpu, ...] = ()
    free_bytes: int | None = None
    """Memory for new processes; none: torch cannot be imported."""
    total_bytes: int | None = None
    """Memory that the machine, or the container, has in all."""
    trouble: str = ""
    """Why torch cannot be used."""


def list_folder(path: Path) -> Listing:
    """Return what a node has to find at ``path``."""
    sizes = {name: (path / name).stat().st_size for name in files_below(path)}
    return Listing(path=path, sizes=sizes, seal=_seal(path))


def probe(question: Question, name: str) -> NodeReport:
    """Look around on this node, and leave the nonce in a file ``name`` for the launcher.

    Args:
        question: What has to be there.
        name: Of this node; no other node's.
    """
    paths = [*_meet(question, name)]
    for folder in question.folders:
        paths += _differences(folder)
    report = NodeReport(paths=tuple(paths), installed=own_installation())
    try:
        from qlora_core.modeling.machine import free_bytes, total_bytes

        gpus = gpus_here() if question.needs_gpu else ()
        memory = {"free_bytes": free_bytes(), "total_bytes": total_bytes()}
        return report.model_copy(update={"gpus": gpus} | memory)
    except Exception as error:  # a broken installation fails with anything
        return report.model_copy(update={"trouble": f"{type(error).__name__}: {error}"})


def probe_plain(question: str, name: str) -> str:
    """Run `probe` on JSON, for JSON: what travels between nodes."""
    return probe(Question.model_validate_json(question), name).model_dump_json()


def own_installation() -> Installation:
    """Return what this process imports."""
    return Installation(versions=own_versions(), code=own_code())


def own_versions() -> dict[str, str | None]:
    """Return the versions in this environment."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in (*SAME_VERSION, *PRESENT):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def own_code() -> str:
    """Return the digest of `qlora_core`'s source in this process."""
    package = Path(qlora_core.__file__).parent
    names = (path.relative_to(package).as_posix() for path in package.rglob("*.py"))
    return tree_digest((name, file_digest(package / name)) for name in names)


def _meet(question: Question, name: str) -> list[Difference]:
    """Read the launcher's word and leave it in a file of our own; return what is in the way."""
    theirs, ours = question.meeting / NONCE_FILE, question.meeting / name
    wanted = "the word that the launcher wrote there a moment ago"
    try:
        word = theirs.read_text("utf-8")
    except OSError as error:
        return [Difference(path=theirs, found=_said(error), wanted=wanted)]
    if word != question.nonce:
        return [Difference(path=theirs, found="another word", wanted=wanted)]
    try:
        with ours.open("x", encoding="utf-8") as file:
            file.write(word)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return [Difference(path=ours, found=_said(error), wanted="a file that this node writes")]
    return []


def _differences(folder: Listing) -> list[Difference]:
    found = []
    for name, size in folder.sizes.items():
        path = folder.path / name
        try:
            there = path.stat().st_size
        except OSError as error:
            found.append(Difference(path=path, found=_said(error), wanted=f"{size} bytes"))
            continue
        if there != size:
            found.append(Difference(path=path, found=f"{there} bytes", wanted=f"{size} bytes"))
    if not found and (seal := _seal(folder.path)) != folder.seal:
        wanted, path = f"SHA-256 {folder.seal[:12]}", folder.path / MANIFEST
        found.append(Difference(path=path, found=f"SHA-256 {seal[:12]}", wanted=wanted))
    return found


def _seal(folder: Path) -> str:
    manifest = folder / MANIFEST
    return file_digest(manifest) if manifest.is_file() else ""


def _said(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def gpus_here() -> tuple[Gpu, ...]:
    """Return the GPUs that torch sees from this process, each with what it has and what is free."""
    import torch

    return tuple(_gpu(number) for number in range(torch.cuda.device_count()))


def _gpu(number: int) -> Gpu:
    import torch

    found, trouble = torch.cuda.get_device_properties(number), ""
    try:
        free_bytes, _ = torch.cuda.mem_get_info(number)  # takes some hundred MB of it by itself
    except RuntimeError as error:  # that GPU is full, or another process has it for itself
        free_bytes, trouble = 0, str(error).partition("\n")[0]
    return Gpu(
        name=found.name,
        capability=(found.major, found.minor),
        total_bytes=found.total_memory,
        free_bytes=free_bytes,
        trouble=trouble,
    )
