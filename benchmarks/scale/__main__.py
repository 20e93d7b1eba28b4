"""How training gets faster with more workers, at a fixed work for each; and how far it would go.

    python -m benchmarks.scale [--workers 1,2,4] [--rounds 3] [--steps 4]

Workers have one thread each. More of them than cores share cores: then the efficiency shows the
machine and not the program, and what says more is tokens per CPU second. The second table is
arithmetic, and is printed as such.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.record import Record, as_stated, found_gsm8k, in_turn, num_cores, say, versions
from benchmarks.scale import projection
from benchmarks.scale.crew import has_own_network, measure
from benchmarks.scale.summary import Measured, table
from benchmarks.training.making import Wish, found_workload
from benchmarks.training.workload import open_workload

_NUM_ROWS = 500


def main() -> int:
    """Measure, project, print both, store both."""
    options = _options()
    workload = found_workload(Wish(found_gsm8k(options.gsm8k), _NUM_ROWS, options.rows))
    if not has_own_network():
        say("No network of their own for the workers (root): bytes counted may be others', too.")
    record, rounds = Record(options.out, "scale", "workers at a fixed work each"), list[Measured]()
    guessed = list(projection.all_projected(projection.Assumed()))
    for number in range(1, options.rounds + 1):
        for name in in_turn([str(n) for n in options.workers], number):
            say(f"round {number}: {name} worker(s)")
            rounds.append(
                measure(
                    workload,
                    int(name),
                    rows_per_worker=options.rows,
                    num_steps=options.steps,
                    num_warm=options.warm,
                )
            )
        path = record.write(_plain(options, workload, rounds, guessed))
    print(f"Measured here, {num_cores()} cores, one thread for each worker:\n")
    print(table(rounds, num_cores()))
    if max(options.workers) > num_cores():
        print(f"\nMore than {num_cores()} workers share cores here: see tokens per CPU second.")
    print("\nArithmetic, not measured (benchmarks/scale/projection.py):\n")
    print(projection.table(guessed))
    say(f"stored in {path}")
    return 0


def _plain(
    options: argparse.Namespace,
    workload: Path,
    rounds: list[Measured],
    guessed: list[projection.Projected],
) -> dict[str, object]:
    return {
        "options": as_stated(vars(options)),
        "workload": asdict(open_workload(workload).settings),
        "versions": versions(),
        "measured": [asdict(each) for each in rounds],
        "assumed": asdict(projection.Assumed()) | {"links": projection.LINKS},
        "projected": [asdict(each) | {"efficiency": each.efficiency} for each in guessed],
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench-scale", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--workers", type=_numbers, default=[1, 2, 4])
    parser.add_argument("--rows", type=int, default=4, help="of each worker in each step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="measured ones of each training")
    parser.add_argument("--warm", type=int, default=1, help="steps before those")
    parser.add_argument(
        "--gsm8k", type=Path, help="GSM8K's train.jsonl; default: of QLORAFLOW_DATA, else made up"
    )
    parser.add_argument("--out", type=Path, help="folder for the results")
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
