"""Let all faults loose, as often as the table says, and print it filled in.

    python -m tests.chaos [--faults kill-worker,cut-network] [--times 2] [--seed 0]

Recovery is the longest time without a new step from the fault on; for flows the longest time from
the command to the next stage, for MLflow from its return until all was delivered.
"""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.record import Record, as_stated, say, versions
from tests.chaos.faults import BY_NAME, FAULTS
from tests.chaos.place import INTERVAL, NUM_STEPS, open_place
from tests.chaos.running import Row, let_loose, table


def main() -> int:
    """Return 0 if everything held that should."""
    options = _options()
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    record, rows = Record(options.out, "chaos", "faults and what held"), list[Row]()
    with open_place() as place:
        for name in options.faults:
            fault = BY_NAME[name]
            row = let_loose(fault, place, options.times or fault.times, options.seed, say)
            if row.skipped:
                say(f"{name} is skipped: {row.skipped}")
            rows.append(row)
            path = record.write(_plain(options, rows))
    sys.stdout.write(table(rows) + "\n")
    say(f"stored in {path}")
    return int(any(row.num_held < len(row.trials) for row in rows))


def _plain(options: argparse.Namespace, rows: list[Row]) -> dict[str, object]:
    return {
        "options": as_stated(vars(options)),
        "versions": versions(),
        "num_steps": NUM_STEPS,
        "snapshot_every_steps": INTERVAL,
        "faults": [asdict(row) | {"num_held": row.num_held} for row in rows],
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make chaos", description=(__doc__ or "").partition("\n")[0]
    )
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--faults", type=_names, default=names, help=", ".join(names))
    parser.add_argument("--times", type=int, help="of each; default: as the table says")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the results")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in BY_NAME]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no fault; known: {', '.join(BY_NAME)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
