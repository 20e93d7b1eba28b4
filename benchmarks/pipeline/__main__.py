"""Measure everything of a run that is not training: is it fast, and does it add little?

    python -m benchmarks.pipeline [--parts start,prepare,stream,orchestrate] [--rounds 3]

Each part is one question; see benchmarks/README.md.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.pipeline import orchestration, preparation, starting, streaming
from benchmarks.record import WORK, as_stated, found_gsm8k, say, store, versions
from benchmarks.training.environments import FAMILIES, Environments
from benchmarks.training.making import Wish, found_workload
from benchmarks.training.summary import Spread

PARTS = ("start", "prepare", "stream", "orchestrate")
_STARTS, _STEPS, _WORKLOAD_ROWS = 9, 6, 200


def main() -> int:
    """Run the parts that were asked for; print what was found and store it."""
    options = _options()
    work = WORK / "pipeline"
    work.mkdir(parents=True, exist_ok=True)
    gsm8k = found_gsm8k(options.gsm8k)
    found: dict[str, Any] = {}
    lines: list[str] = []
    if "start" in options.parts:
        say("starting")
        started = starting.measure(_STARTS)
        found["start"] = asdict(started)
        lines += start_lines(started)
    if "prepare" in options.parts:
        environments = Environments(dict(options.python), say, has_cuda=False)
        prepared = preparation.measure(
            gsm8k, work, environments, options.rounds, options.max_length
        )
        found["prepare"] = asdict(prepared)
        lines += preparation_lines(prepared)
    if "stream" in options.parts:
        streamed = streaming.measure(work)
        found["stream"] = asdict(streamed)
        lines += streaming_lines(streamed)
    if "orchestrate" in options.parts:
        workload = found_workload(Wish(gsm8k, _WORKLOAD_ROWS))
        run = orchestration.measure(work, options.rounds, workload, _STEPS)
        found["orchestrate"] = asdict(run)
        lines += orchestration_lines(run)
    print("\n".join(lines))
    measured = {"options": as_stated(vars(options)), "versions": versions(), **found}
    stored = store(options.out, "pipeline", "the pipeline around training", measured)
    say(f"stored in {stored}")
    return 0


def start_lines(found: starting.Starting) -> Iterator[str]:
    """Say how long the command line takes to start."""
    yield "\nStarting: wall seconds (CPU seconds), median (lowest-highest)"
    for name, wall in found.wall_s.items():
        limit = starting.LIMITS_S.get(name)
        told = f"; at most {limit}" if limit else ""
        yield f"  {name:24} {_told(wall, 2)} ({found.cpu_s[name].median:.2f}){told}"


def preparation_lines(found: preparation.Preparation) -> Iterator[str]:
    """Compare how many rows are prepared in a second."""
    yield f"\nPreparing {found.rows}: rows/s of the whole stage | of tokenising; CPU seconds"
    for line in found.lines:
        rates, cpu = line.rows_per_s, line.cpu_s
        yield (
            f"  {line.system:26} {_told(rates['stage'], 0):>20} | {_told(rates['tokenise'], 0):>20}"
            f"; {cpu['stage'].median:.1f} | {cpu['tokenise'].median:.1f}"
            f"; {line.num_tokens} tokens"
        )
    for name, parts in found.ratios.items():
        yield (
            f"  ours is {_told(parts['stage'], 2)} times as fast as {name} "
            f"({_told(parts['tokenise'], 2)} in tokenising)"
        )
    for name, why in found.left_out.items():
        yield f"  {name}: {why}"


def streaming_lines(found: streaming.Streaming) -> Iterator[str]:
    """Compare peaks of memory with what is allowed."""
    yield (
        f"\nStreaming {found.model_bytes / 1e9:.2f} GB in {found.num_shards} files: peak MB above "
        "the process before the first weight"
    )
    for peak in found.peaks:
        allowed = f"at most {peak.allowed_bytes / 1e6:.0f}"
        yield f"  {peak.stage:12} {peak.part:8} {peak.peak_bytes / 1e6:7.0f}  ({allowed})"


def orchestration_lines(found: orchestration.Orchestration) -> Iterator[str]:
    """Say what is added to a run and to a step."""
    yield f"\nOrchestration: seconds added to a run (wall; at most {orchestration.LIMIT_S:.0f})"
    for name, told in (("cold", "first on a machine"), ("warm", "servers are there")):
        wall, cpu = found.added_wall_s[name], found.added_cpu_s[name]
        yield f"  {told:18} {_told(wall, 1)}; CPU {_told(cpu, 1)}"
    yield (
        f"  of a training step of {found.step_s.median:.1f} s the desk takes "
        f"{1000 * found.desk_s.median:.1f} ms, a snapshot {found.snapshot_s:.2f} s every "
        f"{found.snapshot_every_s:.0f} s: {found.wall_share:.2%} of wall, {found.cpu_share:.2%} of "
        f"CPU time (under {orchestration.LIMIT_SHARE:.0%})"
    )


def _told(value: Spread, digits: int) -> str:
    return f"{value.median:.{digits}f} ({value.low:.{digits}f}-{value.high:.{digits}f})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipeline", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--parts", type=_parts, default=list(PARTS), help=f"some of {','.join(PARTS)}")
    add("--rounds", type=int, default=3, help="turns of each system, and runs of the recipe")
    add("--max-length", type=int, default=2048, help="tokens of a row, and of a pack")
    add("--gsm8k", type=Path, help="GSM8K's train.jsonl; default: of QLORAFLOW_DATA, else made up")
    add("--python", type=_python, action="append", default=[], metavar="FAMILY=PATH",
        help=f"use this Python for a family: {', '.join(FAMILIES)}")  # fmt: skip
    add("--out", type=Path, help="folder for the results; default: benchmarks/results")
    return parser.parse_args()


def _parts(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := sorted(set(names) - set(PARTS)):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(PARTS)}")
    return names


def _python(text: str) -> tuple[str, Path]:
    family, _, path = text.partition("=")
    if family not in FAMILIES or not Path(path).exists():
        raise argparse.ArgumentTypeError(f"{text!r} is not like {next(iter(FAMILIES))}=/a/python")
    return family, Path(path).absolute()


if __name__ == "__main__":
    sys.exit(main())
