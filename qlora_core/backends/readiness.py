"""What is wrong with the nodes of a cluster, told in sentences, all of it at once.

A cluster is mended node by node and image by image; an error for each problem would cost a start
each. Pure: what nodes report is held against what is wanted; `ray_preflight` asks them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_core.artifacts import Frozen
from qlora_core.backends.host_room import HostNeed
from qlora_core.backends.node_probe import PRESENT, SAME_VERSION, NodeReport
from qlora_core.errors import ClusterError, LaunchError, QLoraError

_BFLOAT16_SINCE = (8, 0)  # Ampere; older GPUs compute it in float32, several times slower
_SHOWN = 5  # paths of a node: a folder that is not there has hundreds


class Wanted(Frozen):
    """What a node has to be, for the workers that may run on it."""

    versions: dict[str, str | None]
    """The launcher's."""
    code: str
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


def readiness_error(nodes: list[Node], address: str) -> QLoraError | None:
    """Return one error with every problem of every node; None if there is none.

    Args:
        nodes: All that were asked.
        address: Of the cluster.
    """
    nodes = _with_hosts_for_all(nodes)
    problems = [f"node {node.name}: {sentence}" for node in nodes for sentence in _problems(node)]
    if not problems:
        return None
    if all(node.report is None for node in nodes if list(_problems(node))):
        return LaunchError(
            f"The cluster at {address} did not answer whole: {'; '.join(problems)}",
            why="Nothing was started. A node may be starting, overloaded, or cut off.",
            fix="Look at those nodes (`ray status`), or take them out of the cluster.",
        )
    return ClusterError.of(problems, f"the cluster at {address} is not ready for this run")


def _with_hosts_for_all(nodes: list[Node]) -> list[Node]:
    """Return the nodes, each wanting of its host what the GPUs of all of them make it want."""
    gpus_bytes = [
        _free_for_worker(node.report, node.wanted)[0] or 0
        for node in nodes
        if node.report is not None and node.wanted.num_workers
    ]
    found = []
    for node in nodes:
        host = node.wanted.host and node.wanted.host.for_all(gpus_bytes)
        found.append(replace(node, wanted=node.wanted.model_copy(update={"host": host})))
    return found


def _problems(node: Node) -> Iterator[str]:
    if node.report is None:
        yield node.silence
        return
    yield from _of_paths(node, node.report)
    yield from _of_versions(node.report, node.wanted)
    if node.report.trouble:
        yield f"torch cannot be used there ({node.report.trouble}); mend that environment"
        return
    if node.wanted.num_workers and node.wanted.gpus_per_worker:
        yield from _of_gpus(node.report, node.wanted)
    yield from _of_memory(node.report, node.wanted)


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


def _of_versions(report: NodeReport, wanted: Wanted) -> Iterator[str]:
    for name in ("python", *SAME_VERSION):
        ours, theirs = wanted.versions[name], report.versions.get(name)
        if _short(theirs) != _short(ours):
            yield (
                f"{name} is {theirs or 'not installed'}, the launcher's is {ours}; install "
                f"{name} {_short(ours)} there, or use the launcher's image"
            )
    for name in PRESENT:
        if report.versions.get(name) is None:
            yield f"{name} is not installed; install {name} {wanted.versions[name]} there"
    if report.code != wanted.code:
        yield (
            f"it imports another qlora_core (source {report.code[:12]}) than the launcher "
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


def _of_memory(report: NodeReport, wanted: Wanted) -> Iterator[str]:
    if not wanted.num_workers or wanted.need_bytes is None:
        return
    free, whose = _free_for_worker(report, wanted)
    if free is not None and wanted.need_bytes > free:
        yield (
            f"a worker finds {free / 1e9:.2f} GB of {whose} free, and the smallest pass needs "
            f"{wanted.need_bytes / 1e9:.2f} GB; free some, or leave the node out. {wanted.smaller}"
        ).rstrip()
    if wanted.host is not None and report.free_bytes is not None:
        lacking = wanted.host.lacking(free or 0, report.free_bytes, wanted.num_workers)
        yield from [lacking] if lacking else []


def _free_for_worker(report: NodeReport, wanted: Wanted) -> tuple[int | None, str]:
    if wanted.gpus_per_worker:
        sharing = max(1, int(1 / wanted.gpus_per_worker))
        needed = -(-wanted.num_workers // sharing)  # a worker trains on the first of its GPUs
        freest_first = sorted((gpu.free_bytes for gpu in report.gpus), reverse=True)
        return min(freest_first[:needed], default=0) // sharing, "GPU memory"
    if report.free_bytes is None:
        return None, ""
    return report.free_bytes // wanted.num_workers, "memory"


def _short(version: str | None) -> str:
    """Return X.Y, as in the keys of the store: patches and builds give the same bytes."""
    return ".".join((version or "").split("+")[0].split(".")[:2])
