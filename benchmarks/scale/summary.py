"""From the marks of all workers to one line: speed, efficiency, bytes.

Dims: W workers, P trainable parameters. A ring sends each worker's message of 4 P bytes around in
W parts, twice: once to add up, once to spread the sums. So each worker sends and receives
2 (W - 1) / W of it (Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", J. Parallel Distrib. Comput. 69).
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.scale.worker import Mark, Order
from qlora_core.data.prepared import read_split
from qlora_core.training.worker import plan_of


@dataclass(frozen=True)
class Measured:
    """One training's steps, the warm ones left out."""

    num_workers: int
    num_steps: int
    num_tokens: int
    wall_s: float
    """Of all steps."""
    cpu_s: float
    """Of all steps and workers."""
    waited_share: float
    """Of the wall time: spent in adding up and waiting for others, mean over workers."""
    message_bytes: int
    """That a worker hands over in a step."""
    loopback_bytes: float | None
    """That came in on the loopback device in a step, for each worker; none: nobody counts."""
    has_own_network: bool
    """Whether the loopback device served these workers alone."""

    @property
    def tokens_per_s(self) -> float:
        """Non-padding tokens of all workers for each second."""
        return self.num_tokens / self.wall_s

    @property
    def tokens_per_cpu_s(self) -> float:
        """The same for each second of a core: hardly changes when workers share cores."""
        return self.num_tokens / self.cpu_s


def ring_bytes(message_bytes: float, num_workers: int) -> float:
    """Return what each worker sends in a step, and receives, if the sum goes around a ring."""
    return 2 * (num_workers - 1) / num_workers * message_bytes


def summarised(
    order: Order, marks: Sequence[Sequence[Mark]], num_warm: int, *, has_own_network: bool
) -> Measured:
    """Return one training's line.

    Args:
        order: Of rank 0.
        marks: Of each worker, one for each step.
        num_warm: Steps that do not count, at least 1.
        has_own_network: Whether the loopback device served these workers alone.
    """
    counted = [worker[num_warm - 1 :] for worker in marks]  # from the end of the last warm one on
    first, last = counted[0][0], counted[0][-1]
    num_steps, wall_s = len(counted[0]) - 1, last.wall_s - first.wall_s
    waited = [sum(mark.waited_s for mark in worker[1:]) / wall_s for worker in counted]
    arrived = last.loopback_bytes - first.loopback_bytes
    return Measured(
        num_workers=order.num_workers,
        num_steps=num_steps,
        num_tokens=_num_tokens(order, num_warm),
        wall_s=wall_s,
        cpu_s=sum(worker[-1].cpu_s - worker[0].cpu_s for worker in counted),
        waited_share=statistics.mean(waited),
        message_bytes=last.message_bytes,
        loopback_bytes=arrived / num_steps / order.num_workers if last.loopback_bytes else None,
        has_own_network=has_own_network,
    )


def _num_tokens(order: Order, num_warm: int) -> int:
    from benchmarks.scale.worker import job_of

    rows = read_split(order.workload / "data", "train")
    plan = plan_of(job_of(order), len(rows))
    steps = range(num_warm + 1, plan.num_steps + 1)
    return sum(int(rows.lengths[plan.rows(step)].sum()) for step in steps)


def table(rounds: Sequence[Measured], num_cores: int) -> str:
    """Return the medians over rounds, one line for each number of workers."""
    numbers = sorted({each.num_workers for each in rounds})
    lines = ["| workers | tokens/s | efficiency | of the cores | tokens per CPU second | waiting |"
             " MB a step and worker: measured | ring |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    speeds = {n: _median(rounds, n, "tokens_per_s") for n in numbers}
    alone = speeds.get(1)
    for n in numbers:
        sample = next(each for each in rounds if each.num_workers == n)
        sent = [r.loopback_bytes for r in rounds if r.num_workers == n and r.loopback_bytes]
        measured = f"{statistics.median(sent) / 1e6:.1f}" if sent and n > 1 else "0"
        cells = [
            f"{n}",
            f"{speeds[n]:.1f}",
            f"{speeds[n] / n / alone:.0%}" if alone else "",
            f"{speeds[n] / min(n, num_cores) / alone:.0%}" if alone else "",
            f"{_median(rounds, n, 'tokens_per_cpu_s'):.1f}",
            f"{_median(rounds, n, 'waited_share'):.0%}",
            measured,
            f"{ring_bytes(sample.message_bytes, n) / 1e6:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _median(rounds: Sequence[Measured], num_workers: int, name: str) -> float:
    values = (float(getattr(r, name)) for r in rounds if r.num_workers == num_workers)
    return statistics.median(values)
