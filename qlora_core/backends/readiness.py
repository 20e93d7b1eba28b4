"""What is wrong with the nodes of a cluster, told in sentences, all of it at once.

A cluster is mended node by node and image by image; an error for each problem would cost a start
each. Pure: what nodes report is held against what is wanted; `ray_preflight` asks them.

Memory is what each GPU or machine has *in all*: what is less than that will never do. What is free
counts only where Ray has given nothing of the node away: elsewhere it is used by workers that Ray
waits for before it starts ours. And what is used now by others than Ray's workers may be free in a
minute, so that is no error to end a run with, but `NoRoomError`, which is waited for.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_core.artifacts import Frozen
from qlora_core.backends.host_room import HostNeed
from qlora_core.backends.node_probe import PRESENT, SAME_VERSION, Installation, NodeReport
from qlora_core.errors import (
    ClusterError,
    LaunchError,
    LaunchLostError,
    NoRoomError,
    QLoraError,
    ResourceError,
)

_BFLOAT16_SINCE = (8, 0)  # Ampere; older GPUs compute it in float32, several times slower
_SHOWN = 5  # paths of a node: a folder that is not there has hundreds


class Wanted(Frozen):
    """What a node has to be, for the workers that may run on it."""

    installed: Installation
    """At the launcher's."""
    num_workers: int
    """That may run on this node at once."""
    gpus_per_worker: float
    num_gpus: int
    """That Ray counts on this node."""
    compute_dtype: str
    need_bytes: int | None
    """Of a worker's smallest pass; none: not known."""
    smaller: str = ""
    """What to change for a smaller pass."""
    host: HostNeed | None = None
    """Beside a GPU that does not hold the base."""
    is_booked: bool = False
    """Ray's workers use some of what workers book there, so what is free now says nothing."""


@dataclass(frozen=True)
class Node:
    """A node, its answer, and what was wanted of it."""

    name: str
    """Address and the beginning of Ray's id: several nodes of one machine share an address."""
    report: NodeReport | None
    """None: it gave none."""
    silence: str
    """Why it gave none."""
    wanted: Wanted
    meeting: Path
    """Where the launcher looked for the node's file."""
    is_heard: bool
    """Whether the launcher found the node's file there."""
    is_at_fault: bool = False
    """It was asked and has failed at that; otherwise a silent one is slow, or lost."""


def readiness_error(nodes: list[Node], address: str) -> QLoraError | None:
    """Return one error with every problem of every node; None if there is none.

    Args:
        nodes: All that were asked.
        address: Of the cluster.
    """
    in_all, now = (
        _with_hosts_for_all(nodes, is_free=False),
        _with_hosts_for_all(nodes, is_free=True),
    )
    silent = [f"node {node.name}: {node.silence}" for node in nodes if node.report is None]
    lasting = [f"node {node.name}: {sentence}" for node in in_all for sentence in _lasting(node)]
    passing = [
        f"node {each.name}: {sentence}"
        for node, each in zip(in_all, now, strict=True)
        if not _is_too_small(node)
        for sentence in _passing(each)
    ]
    if lasting:
        told = [*lasting, *silent, *passing]
        return ClusterError.of(told, f"the cluster at {address} is not ready for this run")
    if passing:
        return NoRoomError(
            f"The cluster at {address} has no room now: {'; '.join([*passing, *silent])}",
            why="Others than Ray's workers use that memory.",
            fix="Wait for them or end them, or leave those nodes out; then run again.",
        )
    if silent:
        is_lost = not any(node.is_at_fault for node in nodes)
        return (LaunchLostError if is_lost else LaunchError)(
            f"The cluster at {address} did not answer whole: {'; '.join(silent)}",
            why="Nothing was started. A node may be starting, overloaded, or cut off.",
            fix="Look at those nodes (`ray status`), or take them out of the cluster.",
        )
    return None


def _with_hosts_for_all(nodes: list[Node], *, is_free: bool) -> list[Node]:
    """Return the nodes, each wanting of its host what the GPUs of all of them make it want."""
    gpus_bytes = [
        _for_worker(node.report, node.wanted, is_free=is_free and not node.wanted.is_booked)[0] or 0
        for node in nodes
        if node.report is not None and node.wanted.num_workers
    ]
    found = []
    for node in nodes:
        host = node.wanted.host and node.wanted.host.for_all(gpus_bytes)
        found.append(replace(node, wanted=node.wanted.model_copy(update={"host": host})))
    return found


def memory_error(report: NodeReport, wanted: Wanted) -> QLoraError | None:
    """Return what this machine's memory lacks for workers on a Ray of our own; None if nothing.

    Args:
        report: Of this machine.
        wanted: Of it.
    """
    if too_little := list(_lacks(report, wanted, is_free=False)):
        problems = [f"{sentence}. {wanted.smaller}".rstrip() for sentence in too_little]
        return ResourceError.of(problems, "this machine is too small for this run")
    if taken := list(_lacks(report, wanted, is_free=True)):
        return NoRoomError(
            f"This machine has no room now: {'; '.join(taken)}.",
            why="Other processes use that memory.",
            fix=f"Wait for them or end them, then run again. {wanted.smaller}".rstrip(),
        )
    return None


def _lasting(node: Node) -> Iterator[str]:
    """Yield what stays as it is until a person mends it."""
    if node.report is None:
        return
    yield from _of_paths(node, node.report)
    yield from _of_versions(node.report, node.wanted.installed)
    if node.report.trouble:
        yield f"torch cannot be used there ({node.report.trouble}); mend that environment"
        return
    if node.wanted.num_workers and node.wanted.gpus_per_worker:
        yield from _of_gpus(node.report, node.wanted)
    for sentence in _lacks(node.report, node.wanted, is_free=False):
        yield f"{sentence}; leave the node out. {node.wanted.smaller}".rstrip()


def _is_too_small(node: Node) -> bool:
    return node.report is not None and any(_lacks(node.report, node.wanted, is_free=False))


def _passing(node: Node) -> Iterator[str]:
    """Yield what is in the way now, and need not be for long."""
    if node.report is None or node.report.trouble or node.wanted.is_booked:
        return
    for sentence in _lacks(node.report, node.wanted, is_free=True):
        yield f"{sentence}; free some, or leave the node out. {node.wanted.smaller}".rstrip()


def _of_paths(node: Node, report: NodeReport) -> Iterator[str]:
    shared = "mount the launcher's store at the same path there, for reading and writing"
    for found in report.paths[:_SHOWN]:
        yield f"{found.path}: found {found.found}, wanted {found.wanted}; {shared}"
    if len(report.paths) > _SHOWN:
        yield f"and {len(report.paths) - _SHOWN} more files there"
    if not report.paths and not node.is_heard:
        yield (
            f"{node.meeting}: what the node wrote did not arrive at the launcher's, so that is "
            f"another disk; {shared}"
        )


def _of_versions(report: NodeReport, wanted: Installation) -> Iterator[str]:
    found = report.installed
    for name in ("python", *SAME_VERSION):
        ours, theirs = wanted.versions[name], found.versions.get(name)
        if _short(theirs) != _short(ours):
            yield (
                f"{name} is {theirs or 'not installed'}, the launcher's is {ours}; install "
                f"{name} {_short(ours)} there, or use the launcher's image"
            )
    for name in PRESENT:
        if found.versions.get(name) is None:
            yield f"{name} is not installed; install {name} {wanted.versions[name]} there"
    if found.code != wanted.code:
        yield (
            f"it imports another qlora_core (source {found.code[:12]}) than the launcher "
            f"(source {wanted.code[:12]}); take that one off its PYTHONPATH"
        )


def _of_gpus(report: NodeReport, wanted: Wanted) -> Iterator[str]:
    if len(report.gpus) < wanted.num_gpus:
        yield (
            f"Ray counts {wanted.num_gpus} GPUs, torch sees {len(report.gpus)}; install a CUDA "
            f"build of torch and a driver that fits it, or start Ray there with "
            f"--num-gpus={len(report.gpus)}"
        )
    if wanted.compute_dtype == "bfloat16":
        for gpu in report.gpus:
            if gpu.capability < _BFLOAT16_SINCE:
                major, minor = gpu.capability
                yield (
                    f"its {gpu.name} has CUDA capability {major}.{minor}, and bfloat16 wants 8.0; "
                    "set quantization.compute_dtype=float16, or leave the node out"
                )


def _lacks(report: NodeReport, wanted: Wanted, *, is_free: bool) -> Iterator[str]:
    """Yield what is too little for a worker, of what is free or of all there is."""
    if not wanted.num_workers or wanted.need_bytes is None:
        return
    found, whose = _for_worker(report, wanted, is_free=is_free)
    if found is not None and wanted.need_bytes > found:
        counted = "free" if is_free else "in all"
        yield (
            f"a worker finds {found / 1e9:.2f} GB of {whose} {counted}{_unsaid(report)}, and the "
            f"smallest pass needs {wanted.need_bytes / 1e9:.2f} GB"
        )
    host_bytes = report.free_bytes if is_free else report.total_bytes
    if wanted.host is not None and host_bytes is not None:
        room = (found or 0, host_bytes, wanted.num_workers)
        if lacking := wanted.host.lacking(*room, is_free=is_free):
            yield lacking


def _for_worker(report: NodeReport, wanted: Wanted, *, is_free: bool) -> tuple[int | None, str]:
    """Return how much there is for the worker that gets the least, and of what."""
    if wanted.gpus_per_worker:
        sharing = max(1, int(1 / wanted.gpus_per_worker))
        needed = -(-wanted.num_workers // sharing)  # a worker trains on the first of its GPUs
        sizes = [gpu.free_bytes if is_free else gpu.total_bytes for gpu in report.gpus]
        return min(sorted(sizes, reverse=True)[:needed], default=0) // sharing, "GPU memory"
    host_bytes = report.free_bytes if is_free else report.total_bytes
    return host_bytes and host_bytes // wanted.num_workers, "memory"


def _unsaid(report: NodeReport) -> str:
    """Return why GPUs do not say what is free."""
    troubles = {gpu.trouble for gpu in report.gpus if gpu.trouble}
    return f" ({'; '.join(sorted(troubles))})" if troubles else ""


def _short(version: str | None) -> str:
    """Return X.Y, as in the keys of the store: patches and builds give the same bytes."""
    return ".".join((version or "").split("+")[0].split(".")[:2])
