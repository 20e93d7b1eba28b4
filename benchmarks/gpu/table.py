"""Results as text, targets beside what was measured."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu.cases import Case
from benchmarks.gpu.summary import OURS, Line, Result

_GB, _TFLOP = 1e9, 1e12
FASTEST_PEER = "trl"
TARGET_RATE, TARGET_RATIO, TARGET_BYTES = 10_000, 1.5, 6_000_000_000
TARGET_SHAPE, TARGET_LENGTH, SMALL_SHAPE, SMALL_LENGTH = "8b", 2048, "7b", 512


def table(results: Sequence[Result], lines: Sequence[Line], probed: dict[str, Any]) -> str:
    """Return the lines, the differences to the reference, the targets, and what is left out."""
    rows = [list(_COLUMNS), *([cell(line) for cell in _COLUMNS.values()] for line in lines)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(_COLUMNS))]
    text = [f"{probed['device']}, large products at {probed['matrix_rate'] / _TFLOP:.3g} TFLOP/s"]
    text += ["", *(_aligned(row, widths) for row in rows), ""]
    for result in results:
        text += _said(result)
    text += [note for result in results for note in _targets(result.case, lines)]
    return "\n".join(text)


def _aligned(row: list[str], widths: list[int]) -> str:
    pairs = list(zip(row, widths, strict=True))
    left = [cell.ljust(width) for cell, width in pairs[:2]]
    return "  ".join([*left, *(cell.rjust(width) for cell, width in pairs[2:])]).rstrip()


def _said(result: Result) -> list[str]:
    name, found = result.case.name, result.agreement
    text = [f"{name}: {system} left out: {why}" for system, why in result.left_out.items()]
    if found is not None:
        text.append(
            f"{name}: ours against transformers and PEFT: loss {found['loss']:.1e}, gradient "
            f"{found['gradient']:.1e} apart; from float32, ours {found['our_loss_error']:.1e} and "
            f"{found['our_gradient_error']:.1e}, theirs {found['their_loss_error']:.1e} and "
            f"{found['their_gradient_error']:.1e}"
        )
    if result.agreement_failed:
        text.append(f"{name}: no comparison with the reference: {result.agreement_failed}")
    told = [*(m for each in result.rounds for m in each.values()), found or {"notes": []}]
    notes = dict.fromkeys(note for each in told for note in each["notes"])
    return text + [f"{name}: {note}" for note in notes]


def _targets(case: Case, lines: Sequence[Line]) -> list[str]:
    by_system = {line.system: line for line in lines if line.case == case.name}
    ours, peer = by_system.get(OURS), by_system.get(FASTEST_PEER)
    text: list[str] = []
    if ours is None:
        return text
    if case.shape == TARGET_SHAPE and case.row_length == TARGET_LENGTH:
        rate = ours.tokens_per_s
        text.append(f"{case.name}: {rate:.0f} tok/s; target on one H100: {TARGET_RATE}")
        if peer is not None and peer.ours_is_faster is not None and peer.is_fused:
            ratio = f"{peer.ours_is_faster:.2f} times as fast as {FASTEST_PEER}"
            told = "with fused kernels, on full packs"
            text.append(f"{case.name}: {ratio} {told}; target: {TARGET_RATIO}")
    if case.saves_memory and case.shape == SMALL_SHAPE and case.row_length == SMALL_LENGTH:
        peak = f"{ours.peak_bytes / _GB:.2f} GB at most"
        text.append(f"{case.name}: {peak}; target: {TARGET_BYTES / _GB:.0f} GB")
    return text


def _ranged(line: Line) -> str:
    return f"{line.tokens_per_s:.0f} ({line.lowest:.0f}-{line.highest:.0f})"


def _planned(line: Line) -> str:
    return "-" if line.planned_bytes is None else f"{line.planned_bytes / _GB:.2f}"


def _ratio(line: Line) -> str:
    return "-" if line.ours_is_faster is None else f"{line.ours_is_faster:.2f}"


_COLUMNS: dict[str, Callable[[Line], str]] = {
    "case": lambda line: line.case,
    "system": lambda line: line.system,
    "tok/s": _ranged,
    "matrix rate": lambda line: f"{line.matrix_share:.0%}",
    "planned GB": _planned,
    "peak GB": lambda line: f"{line.peak_bytes / _GB:.2f}",
    "rows a pass": lambda line: str(line.micro_batch),
    "recomputes": lambda line: "yes" if line.recomputes else "no",
    "last loss": lambda line: f"{line.last_loss:.4f}",
    "ours / it": _ratio,
}
