"""Train models of real shapes with random weights on one GPU, and compare.

    python -m benchmarks.gpu [--shapes 1b,8b] [--systems ours,plain,trl] [--rounds 3]

Nothing is fetched: no model, no tokenizer, no data. Systems take turns (A B C, B C A, ...), each in
a process of its own, and what is measured is stored after each round. This process needs Python
alone; what the others lack is said, with what to do about it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import SHAPES, Case
from benchmarks.gpu.needs import pip_line
from benchmarks.gpu.processes import Processes
from benchmarks.gpu.record import keep, record_of
from benchmarks.gpu.run import SYSTEMS
from benchmarks.gpu.summary import OURS, Result, summarise
from benchmarks.gpu.table import table
from benchmarks.record import in_turn, say

ROW_LENGTH = 2048
SMALL_SHAPE, SMALL_LENGTH = "7b", 512
"""The case that must fit a small GPU: one row at a time."""


@dataclass
class Bench:
    """One run of the benchmark."""

    options: argparse.Namespace
    processes: Processes
    results: list[Result] = field(default_factory=list)

    def run(self, on_round: Callable[[list[Result]], None]) -> None:
        """Measure every case; what fails is left out of the later rounds, and said.

        Args:
            on_round: Called after each of them with all that was found so far.
        """
        for case in cases(self.options):
            result = Result(case)
            self.results.append(result)
            if self.options.agreement and not case.saves_memory:
                say(f"{case.name}: loss and gradients against transformers and PEFT")
                result.agreement, result.agreement_failed = self.processes.agreement(case)
            for number in range(1, self.options.rounds + 1):
                self._round(result, number)
                on_round(self.results)

    def _round(self, result: Result, number: int) -> None:
        systems = [OURS] if result.case.saves_memory else self.options.systems
        found: dict[str, dict[str, Any]] = {}
        result.rounds.append(found)
        for system in in_turn(systems, number):
            if system in result.left_out:
                continue
            say(f"{result.case.name}, round {number} of {self.options.rounds}: {system}")
            begin = result.fitting.get(system, result.case)
            measured, case, why = self.processes.system(system, begin)
            if measured is None:
                result.left_out[system] = why
                say(f"  {why}")
                continue
            result.fitting[system], found[system] = case, measured
            say(f"  {measured['num_tokens'] / measured['seconds']:.0f} tok/s")


def cases(options: argparse.Namespace) -> list[Case]:
    """Return what is measured."""
    common = {
        "device": options.device,
        "dtype": options.dtype,
        "num_warmup": options.warmup,
        "num_steps": options.steps,
    }
    found = [
        Case(
            shape=shape,
            row_length=options.row_length,
            global_batch=options.global_batch,
            micro_batch=options.micro_batch,
            **common,
        )
        for shape in options.shapes
    ]
    if options.small:
        found.append(
            Case(
                shape=options.small,
                row_length=min(SMALL_LENGTH, options.row_length),
                global_batch=1,
                micro_batch=1,
                saves_memory=True,
                **common,
            )
        )
    return found


def main() -> int:
    """Run the benchmark; print the table and store the results."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        paths = [_unpacked(options.wheels, Path(folder))] if options.wheels else []
        processes = Processes(paths, options.timeout)
        probed = processes.probe(cases(options)[0])
        if why := _why_not(probed, options):
            say(why)
            return 2
        if "trl" in options.systems and probed["missing_of_trl"]:
            say(f"trl will be left out; for it: {pip_line(probed['missing_of_trl'])}")
        bench, record = Bench(options, processes), record_of(options.out)

        def store(results: list[Result]) -> None:
            lines = summarise(results, probed["matrix_rate"])
            say(f"stored in {keep(record, vars(options), probed, results, lines)}")

        bench.run(store)
    lines = summarise(bench.results, probed["matrix_rate"])
    print(table(bench.results, lines, probed))
    return 0 if any(any(result.rounds) for result in bench.results) else 1


def _why_not(probed: dict[str, Any], options: argparse.Namespace) -> str:
    """Return what keeps this Python from measuring, and what to do; nothing if it can."""
    if "failed" in probed:
        return f"This Python cannot be asked what it has: {probed['failed']}"
    if probed["missing"]:
        lines = [f"{name} is missing or broken: {why}" for name, why in probed["missing"].items()]
        return "\n".join(
            [
                *lines,
                f"Install all of it, with `make env`, say, or: {pip_line(probed['missing'])}",
                "Without a network: fetch wheels for this Python elsewhere (pip download --no-deps "
                "-d FOLDER ...) and give --wheels FOLDER; they go to a temporary folder.",
            ]
        )
    if not probed["has_cuda"] and options.device.startswith("cuda"):
        return "torch sees no GPU. To try the script itself: --shapes tiny --device cpu."
    return ""


def _unpacked(wheels: Path, folder: Path) -> Path:
    """Install all wheels of a folder into another one."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise SystemExit(f"--wheels {wheels}: there is no .whl file.")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*install, "--no-compile", "--target", folder, *found], check=True)
    return folder


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--shapes", type=_some_of(SHAPES), help=f"some of {','.join(SHAPES)}; default: 1b,8b")
    add("--small", choices=[*SHAPES, ""], help="shape of the case for a small GPU; '': none")
    add("--systems", type=_some_of(SYSTEMS), default=list(SYSTEMS), help=",".join(SYSTEMS))
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=4, help="optimizer steps measured in each round")
    add("--warmup", type=int, default=2, help="optimizer steps before the clock starts")
    add("--global-batch", type=int, default=8, help="rows of an optimizer step")
    add("--micro-batch", type=int, default=4, help="rows of a pass; halved until they fit")
    add("--row-length", type=int, help=f"tokens of a row; default: {ROW_LENGTH}, on a CPU 64")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--dtype", choices=["bfloat16", "float16", "float32"],
        help="default: bfloat16, on a CPU float32")  # fmt: skip
    add("--no-agreement", dest="agreement", action="store_false",
        help="leave out the comparison of loss and gradients")  # fmt: skip
    add("--wheels", type=Path, metavar="FOLDER", help="install these wheels for this run")
    add("--timeout", type=int, default=1200, help="seconds a process may take")
    add("--out", type=Path, help="folder for the results; default: benchmarks/results")
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    options.shapes = options.shapes or (["tiny"] if on_cpu else ["1b", "8b"])
    options.small = ("tiny" if on_cpu else SMALL_SHAPE) if options.small is None else options.small
    options.dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    options.row_length = options.row_length or (64 if on_cpu else ROW_LENGTH)
    if options.global_batch % options.micro_batch or options.micro_batch & (
        options.micro_batch - 1
    ):
        parser.error("--micro-batch must be a power of two that divides --global-batch")
    if options.warmup < 1:
        parser.error("--warmup must be at least 1: the first step compiles kernels")
    return options


def _some_of(known: Any) -> Any:
    def names(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",")]
        if unknown := sorted(set(found) - set(known)):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(known)}")
        return found

    return names


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
