"""Run our engine and its peers in turn, on the same work, and compare.

    python -m benchmarks.training [--systems ours,plain,hf-grouped] [--rounds 3] [--steps 4]

Systems take turns (A B C, B C A, ...), each in a process and an environment of its own, so whatever
else the machine does meets all of them, and no place in the turn is always the same system's. What
is measured is stored after each round: an interrupted run leaves the rounds that it has.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.record import (
    ROOT,
    Record,
    as_stated,
    found_gsm8k,
    in_turn,
    num_cores,
    say,
)
from benchmarks.training.environments import FAMILIES, Environments
from benchmarks.training.gauge import MARK, Measurement
from benchmarks.training.making import Wish, found_workload
from benchmarks.training.summary import OURS, Summary, summarise
from benchmarks.training.table import table
from benchmarks.training.workload import Settings, open_workload


@dataclass(frozen=True)
class System:
    """How a system is started."""

    family: str
    module: str
    """Of `benchmarks.training.systems`."""


SYSTEMS = {
    OURS: System("ours", "ours"),
    "plain": System("huggingface", "plain"),
    "hf-padded": System("huggingface", "huggingface"),
    "hf-grouped": System("huggingface", "huggingface"),
    "hf-flattened": System("huggingface", "huggingface"),
    "trl-padded": System("huggingface", "trl_sft"),
    "trl-packed": System("huggingface", "trl_sft"),
    "trl-padded-float32": System("huggingface", "trl_sft"),
    "trl-packed-float32": System("huggingface", "trl_sft"),
    "llama-factory-padded": System("llama-factory", "llama_factory"),
    "llama-factory-neat": System("llama-factory", "llama_factory"),
    "unsloth": System("unsloth", "unsloth_sft"),
    "axolotl": System("axolotl", "axolotl_sft"),
}


@dataclass
class Bench:
    """One run of the benchmark."""

    options: argparse.Namespace
    workload: Path
    environments: Environments
    num_cores: int
    rounds: list[dict[str, Measurement]] = field(default_factory=list)
    rates: list[dict[str, float]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def run(self, on_round: Callable[["Bench"], None]) -> None:
        """Measure all rounds; a system that fails once is left out from then on.

        Args:
            on_round: Called after each of them.
        """
        pythons = {system: self._python(system) for system in self.options.systems}
        for number in range(1, self.options.rounds + 1):
            self.rates.append(self._matrix_rate())
            found: dict[str, Measurement] = {}
            self.rounds.append(found)
            for system in in_turn(list(pythons), number):
                python = pythons[system]
                if python is not None and system not in self.left_out:
                    say(f"round {number} of {self.options.rounds}: {system}")
                    self._measure(system, python, found)
            on_round(self)

    def _python(self, system: str) -> Path | None:
        family = SYSTEMS[system].family
        python = self.environments.python(family)
        if python is None:
            self.left_out[system] = self.environments.why_not(family)
        return python

    def _measure(self, system: str, python: Path, found: dict[str, Measurement]) -> None:
        options = self.options
        command: list[str | Path] = [
            python, "-m", f"benchmarks.training.systems.{SYSTEMS[system].module}", system,
            "--workload", self.workload,
            "--steps", str(options.steps), "--warmup", str(options.warmup),
            "--global-batch", str(options.global_batch),
            "--micro-batch", str(options.micro_batch),
        ]  # fmt: skip
        log = self.workload / "logs" / f"{system}.txt"
        log.parent.mkdir(exist_ok=True)
        with log.open("w", encoding="utf-8") as said:
            try:
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, stderr=said, text=True, cwd=ROOT, check=False,
                    env=_environment(system, is_shared=options.shared_machine),
                    timeout=options.timeout,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                self.left_out[system] = f"took more than {options.timeout} s"
                return
        marked = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        if done.returncode or not marked:
            self.left_out[system] = f"failed: {_last_line(log)} (all of it: {log})"
            say(f"{system} {self.left_out[system]}")
            return
        found[system] = Measurement(**json.loads(marked[-1].removeprefix(MARK)))
        rate = self.num_cores * found[system].num_tokens / found[system].cpu_s
        say(f"  {rate:.0f} tok/s@cpu, {found[system].wall_s:.0f} s")

    def _matrix_rate(self) -> dict[str, float]:
        output = subprocess.run(
            [sys.executable, "-m", "benchmarks.training.matrix_rate"],
            stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True,
            env=_environment("", is_shared=self.options.shared_machine),
        ).stdout  # fmt: skip
        rates: dict[str, float] = json.loads(output)
        return rates


def main() -> int:
    """Run the benchmark; print the table and store the results."""
    options = _options()
    has_cuda = _has_cuda()
    if options.systems is None:
        options.systems = [
            name for name, system in SYSTEMS.items()
            if has_cuda or not FAMILIES[system.family].needs_cuda
        ]  # fmt: skip
    wish = Wish(
        found_gsm8k(options.gsm8k), options.rows, options.global_batch,
        "bfloat16" if has_cuda else "float32",
    )  # fmt: skip
    workload = found_workload(wish)
    environments = Environments(dict(options.python), say, has_cuda)
    bench = Bench(options, workload, environments, num_cores())
    settings = open_workload(
        workload, global_batch=options.global_batch, micro_batch=options.micro_batch
    ).settings
    record = Record(options.out, "training", "training, ours against peers")

    def keep(bench: Bench) -> None:
        if any(bench.rounds):
            say(f"stored in {record.write(_measured(bench, settings, _summary(bench, settings)))}")

    bench.run(keep)
    if not any(bench.rounds):
        say(f"Nothing was measured: {bench.left_out}")
        return 1
    print(table(_summary(bench, settings), bench.left_out))
    return 0


def _environment(system: str, *, is_shared: bool) -> dict[str, str]:
    """Return a process's environment: peers get their defaults, ours what its launcher sets."""
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
        "DISABLE_VERSION_CHECK": "1",
        "PYTHONPATH": str(ROOT),
    }
    if is_shared:
        quiet["OMP_WAIT_POLICY"] = "passive"
    if system == OURS:
        from qlora_core.backends.ray_resources import WORKER_PROCESS

        quiet |= WORKER_PROCESS
    return {**os.environ, **quiet}


def _summary(bench: Bench, settings: Settings) -> Summary:
    return summarise(bench.rounds, settings, bench.num_cores, bench.rates)


def _measured(bench: Bench, settings: Settings, summary: Summary) -> dict[str, Any]:
    return {
        "options": as_stated(vars(bench.options)),
        "workload": asdict(settings),
        "matrix_rates": bench.rates,
        "left_out": bench.left_out,
        "summary": asdict(summary),
        "rounds": [{name: asdict(m) for name, m in each.items()} for each in bench.rounds],
    }


def _has_cuda() -> bool:
    ask = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    done = subprocess.run(ask, capture_output=True, text=True, check=True)
    return done.stdout.strip() == "True"


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "it said nothing"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--systems", type=_names, help=f"some of {','.join(SYSTEMS)}; default: all that can run")
    add("--rounds", type=_positive, default=3)
    add("--steps", type=_positive, default=4, help="optimizer steps measured in each round")
    add("--warmup", type=_positive, default=1, help="optimizer steps before the clocks start")
    add("--global-batch", type=_positive, default=8, help="rows of an optimizer step")
    add("--micro-batch", type=_positive, default=8, help="rows of a forward pass")
    add("--rows", type=_positive, default=2000, help="rows of an epoch")
    add("--gsm8k", type=Path, help="GSM8K's train.jsonl; default: of QLORAFLOW_DATA, else made up")
    add("--python", type=_python, action="append", default=[], metavar="FAMILY=PATH",
        help=f"use this Python for a family: {', '.join(FAMILIES)}")  # fmt: skip
    add("--shared-machine", action="store_true",
        help="in all systems, threads that wait sleep: for machines with other work")  # fmt: skip
    add("--timeout", type=_positive, default=1800, help="seconds a system may take")
    add("--out", type=Path, help="folder for the results; default: benchmarks/results")
    options = parser.parse_args()
    if options.global_batch % options.micro_batch:
        parser.error("--global-batch must be a multiple of --micro-batch")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := _unknown(names, SYSTEMS):
        raise argparse.ArgumentTypeError(f"{unknown} is none of {', '.join(SYSTEMS)}")
    return names


def _python(text: str) -> tuple[str, Path]:
    family, _, path = text.partition("=")
    if _unknown([family], FAMILIES) or not Path(path).exists():
        raise argparse.ArgumentTypeError(f"{text!r} is not like {next(iter(FAMILIES))}=/a/python")
    return family, Path(path).absolute()


def _unknown(names: list[str], known: Iterable[str]) -> str:
    return ", ".join(sorted(set(names) - set(known)))


if __name__ == "__main__":
    sys.exit(main())
