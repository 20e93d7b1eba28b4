"""A 4-bit base in the memory of a GPU's host, for one worker who computes alone.

What several workers trained in parts fits, perhaps, on none of their GPUs. To be asked it needs no
partners: all blocks stay with the host, and each comes to the GPU when it computes, through the
same hooks that put a divided base together (`modeling.sharding`); here one worker keeps all parts.
A forward pass that nobody announced begins and ends itself, so generation and likelihood run as
they are, and one that failed halfway leaves nothing behind. The numbers are those of the whole
base.

It is slow: every forward pass moves all of the base over the bus, and an answer takes a pass for
each of its tokens. So it is done where a base does not fit, or is asked for, and it is said. All
that is decided here is decided before a weight is loaded.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from qlora_core.errors import ResourceError
from qlora_core.modeling.memory import USABLE, MemoryEstimate
from qlora_core.modeling.parts import load_in_parts
from qlora_core.modeling.sharding import KeepsAll, ShardedBase


@dataclass(frozen=True)
class BaseNeeds:
    """What one worker who computes alone needs, by where its base lies."""

    whole: MemoryEstimate
    """Of a GPU that holds the base."""
    hosted: MemoryEstimate | None
    """Of a GPU whose host holds it; none: ``obstacle``."""
    host_bytes: int = 0
    """Of that host."""
    obstacle: str = ""
    """Why no host can."""

    @property
    def enough_gpu_bytes(self) -> int:
        """A GPU on which so much is free holds the base whole."""
        return math.ceil(self.whole.total / USABLE)


@dataclass(frozen=True)
class BasePlace:
    """Where the base lies."""

    is_hosted: bool = False
    """In the memory of the GPU's host."""
    notes: tuple[str, ...] = ()


def choose_place(
    needs: BaseNeeds, gpu_free_bytes: int, host_free_bytes: int, *, wants_host: bool
) -> BasePlace:
    """Return where a base shall lie: whole on the GPU if it fits, with the host if it must.

    Args:
        needs: What either takes.
        gpu_free_bytes: For this worker.
        host_free_bytes: In the host's memory.
        wants_host: The recipe wants it there in any case.

    Raises:
        ResourceError: Neither has room.
    """
    fits = needs.whole.total <= int(USABLE * gpu_free_bytes)
    if needs.hosted is None:
        _require_gpu(needs, gpu_free_bytes)
        notes = (f"cluster.offload_base is left out: {needs.obstacle}.",) if wants_host else ()
        return BasePlace(notes=notes)
    if fits and not wants_host:
        return BasePlace()
    _require_host(needs, host_free_bytes)
    note = hosted_note(needs, wants_host=wants_host)
    return BasePlace(is_hosted=True, notes=(note,))


def hosted_note(needs: BaseNeeds, *, wants_host: bool) -> str:
    """Say where the base lies and what that costs, in the same words on all workers alike."""
    not_fitting = f"whole it takes a GPU with {_gb(needs.enough_gpu_bytes)} free"
    why = "cluster.offload_base asks for it" if wants_host else not_fitting
    return (
        f"the 4-bit base lies in the host's memory ({_gb(needs.host_bytes)}), as {why}: every "
        "forward pass brings it to the GPU block by block; the same result, but slow"
    )


def load_hosted(
    folder: Path, device: torch.device, notes: list[str]
) -> tuple[PreTrainedModel, ShardedBase]:
    """Return a quantised base, frozen and in eval mode, whose blocks lie in the host's memory.

    Args:
        folder: Files of a QuantizedBase artefact; the checkpoint lies in its `model/`.
        device: Where it computes.
        notes: Where it is said if the base had to be loaded whole.

    Raises:
        ModelError: It has no blocks with 4-bit layers.
        ArtifactError: The checkpoint cannot be read or is incomplete.
        ResourceError: It has to be loaded whole, and does not fit.
    """
    try:
        return load_in_parts(folder, device, KeepsAll(), notes, is_offloaded=True)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            "The GPU ran out of memory while the base was loaded.",
            why=" ".join(notes) or str(error).partition("\n")[0],
            fix="Take a GPU on which more is free.",
        ) from error


def _require_gpu(needs: BaseNeeds, free_bytes: int) -> None:
    """Find before loading that a base that no host can hold does not fit; what is tight is tried.

    Raises:
        ResourceError: Its weights alone are too large.
    """
    whole = needs.whole
    if whole.weights + whole.constants + whole.unquantized > free_bytes:
        raise ResourceError(
            f"The GPU has {_gb(free_bytes)} free, and this model needs {_gb(whole.total)}.",
            why=f"The base cannot lie in the host's memory: {needs.obstacle}.",
            fix=f"Take a GPU with {_gb(needs.enough_gpu_bytes)} free.",
        )


def _require_host(needs: BaseNeeds, free_bytes: int) -> None:
    """Find before loading that the host cannot hold the base either.

    Raises:
        ResourceError: It cannot.
    """
    if needs.host_bytes > free_bytes:
        raise ResourceError(
            f"There are {_gb(free_bytes)} of the host's memory free, and the 4-bit base takes "
            f"{_gb(needs.host_bytes)} there.",
            why="It lies there where cluster.offload_base asks for it, or where the GPU has less "
            f"than {_gb(needs.enough_gpu_bytes)} free.",
            fix="Free memory on that machine, let fewer workers run there, or take a larger GPU.",
        )


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB"
