"""From measurements of several rounds to what the table says. Pure arithmetic.

Rates are medians over rounds. Ratios are taken *within* a round, where both systems met the same
state of the machine, and the median is taken of the ratios. A machine with other work on it slows
wall time and leaves CPU time (nearly) alone; so both are given.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.training.gauge import Measurement
from benchmarks.training.workload import Settings

OURS, PLAIN, TRL = "ours", "plain", "trl-padded-float32"
"""Losses are compared with the plain loop's and with TRL's, where it computes in float32."""
_FLOPS = 4
"""Per frozen parameter and token: forward, and backward to the input."""
TIMES_PEER, TIMES_PLAIN, MATRIX_SHARE = 2.0, 2.7, 0.75
"""What ours is to reach."""

Round = Mapping[str, Measurement]
"""What each system measured in a round, as far as it ran."""
Rate = Callable[[Measurement, int], float]
"""Something per second, of a measurement on so many cores."""


@dataclass(frozen=True)
class Spread:
    """A value over rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratio:
    """How many times as fast ours is as another system."""

    against: str
    per: str
    """`CPU second` or `wall second`."""
    spread: Spread


@dataclass(frozen=True)
class Line:
    """One system in the table."""

    system: str
    tokens_per_cpu_s: Spread
    """Non-padding tokens per CPU second, times cores."""
    tokens_per_wall_s: Spread
    supervised_per_wall_s: Spread
    epoch_s: Spread
    peak_memory_bytes: Spread
    padding: float
    """Tokens processed for each real one."""
    matrix_share_cpu: float | None
    matrix_share_wall: float | None
    """Of the measured matrix rate; tokens that are real, and computed."""
    final_loss: float
    loss_difference: float | None
    """Largest difference to the plain loop at any step; none on other rows than its."""
    has_plain: bool
    """Whether there was a plain loop to compare with."""
    trl_loss_difference: float | None
    """The same to TRL in float32."""
    has_trl: bool


@dataclass(frozen=True)
class Target:
    """What ours is to reach, and what it did."""

    what: str
    found: float
    wanted: float
    unit: Literal["times", "share", "bytes"]
    is_reached: bool


@dataclass(frozen=True)
class Summary:
    """All lines, and what ours is against the others."""

    lines: tuple[Line, ...]
    ratios: tuple[Ratio, ...]
    targets: tuple[Target, ...]


def spread(values: Sequence[float]) -> Spread:
    """Return median, lowest and highest of ``values``."""
    return Spread(statistics.median(values), min(values), max(values))


def tokens_per_cpu_s(measured: Measurement, num_cores: int) -> float:
    """Return non-padding tokens per second if all cores worked all the time."""
    return num_cores * measured.num_tokens / measured.cpu_s


def tokens_per_wall_s(measured: Measurement, _num_cores: int = 1) -> float:
    """Return non-padding tokens per second."""
    return measured.num_tokens / measured.wall_s


def summarise(
    rounds: Sequence[Round],
    settings: Settings,
    num_cores: int,
    rates: Sequence[Mapping[str, float]],
) -> Summary:
    """Summarise ``rounds``.

    Args:
        rounds: What was measured.
        settings: Of the workload.
        num_cores: Cores of the machine that systems may use.
        rates: What `matrix_rate` found in each round.
    """
    systems = list(dict.fromkeys(system for each in rounds for system in each))
    known = {name: _all_of(rounds, name)[:1] for name in (PLAIN, TRL)}
    lines = tuple(
        _line(_all_of(rounds, system), known, settings, num_cores, rates) for system in systems
    )
    ratios = _ratios(rounds, lines, num_cores)
    return Summary(lines, ratios, tuple(_targets(lines, ratios)))


def work(measured: Measurement, settings: Settings) -> float:
    """Return the FLOP of frozen products that were needed: padding is no work."""
    num_body = min(measured.num_tokens, measured.num_processed)
    body = num_body * settings.num_body_parameters
    head = measured.num_supervised * settings.num_head_parameters
    return float(_FLOPS * (body + head))


def loss_difference(curve: Measurement, known: Measurement) -> float | None:
    """Return the largest difference of two curves; none if they saw other rows."""
    if curve.checksums != known.checksums:
        return None
    return max(abs(a - b) for a, b in zip(curve.losses, known.losses, strict=True))


def strongest(lines: Sequence[Line], rate: Callable[[Line], float]) -> str | None:
    """Return the fastest peer's name; the plain loop is none."""
    peers = [line for line in lines if line.system not in (OURS, PLAIN)]
    return max(peers, key=rate).system if peers else None


def _all_of(rounds: Sequence[Round], system: str) -> list[Measurement]:
    return [each[system] for each in rounds if system in each]


def _line(
    measured: Sequence[Measurement],
    known: Mapping[str, Sequence[Measurement]],
    settings: Settings,
    num_cores: int,
    rates: Sequence[Mapping[str, float]],
) -> Line:
    per_cpu_s = [tokens_per_cpu_s(m, num_cores) for m in measured]
    per_wall_s = [tokens_per_wall_s(m) for m in measured]
    cpu_share, wall_share = _matrix_shares(measured, settings, rates)
    return Line(
        system=measured[0].system,
        tokens_per_cpu_s=spread(per_cpu_s),
        tokens_per_wall_s=spread(per_wall_s),
        supervised_per_wall_s=spread([m.num_supervised / m.wall_s for m in measured]),
        epoch_s=spread([settings.num_tokens / rate for rate in per_wall_s]),
        peak_memory_bytes=spread([m.peak_memory_bytes for m in measured]),
        padding=measured[0].num_processed / measured[0].num_tokens,
        matrix_share_cpu=cpu_share,
        matrix_share_wall=wall_share,
        final_loss=measured[-1].losses[-1],
        loss_difference=_difference_to(known[PLAIN], measured[0]),
        has_plain=bool(known[PLAIN]),
        trl_loss_difference=_difference_to(known[TRL], measured[0]),
        has_trl=bool(known[TRL]),
    )


def _difference_to(known: Sequence[Measurement], curve: Measurement) -> float | None:
    return loss_difference(curve, known[0]) if known else None


def _matrix_shares(
    measured: Sequence[Measurement], settings: Settings, rates: Sequence[Mapping[str, float]]
) -> tuple[float | None, float | None]:
    """Return shares of the rate per CPU second of one core, and per wall second of all."""
    if not rates:
        return None, None
    per_cpu_s = statistics.median(work(m, settings) / m.cpu_s for m in measured)
    per_wall_s = statistics.median(work(m, settings) / m.wall_s for m in measured)
    one_core = statistics.median(rate["one_core_per_cpu_s"] for rate in rates)
    all_cores = statistics.median(rate["all_cores"] for rate in rates)
    return per_cpu_s / one_core, per_wall_s / all_cores


def _ratios(rounds: Sequence[Round], lines: Sequence[Line], num_cores: int) -> tuple[Ratio, ...]:
    kinds: list[tuple[str, Rate, Callable[[Line], float]]] = [
        ("CPU second", tokens_per_cpu_s, lambda line: line.tokens_per_cpu_s.median),
        ("wall second", tokens_per_wall_s, lambda line: line.tokens_per_wall_s.median),
    ]
    found = []
    for per, rate, of_line in kinds:
        for other in (strongest(lines, of_line), PLAIN):
            both = [each for each in rounds if OURS in each and other in each]
            if other is not None and both:
                ratios = [rate(e[OURS], num_cores) / rate(e[other], num_cores) for e in both]
                found.append(Ratio(other, per, spread(ratios)))
    return tuple(found)


def _targets(lines: Sequence[Line], ratios: Sequence[Ratio]) -> Iterator[Target]:
    """Hold ours against what it is to reach; of others than ours nothing is wanted."""
    ours = next((line for line in lines if line.system == OURS), None)
    if ours is None:
        return
    for ratio in ratios:
        wanted = TIMES_PLAIN if ratio.against == PLAIN else TIMES_PEER
        found = ratio.spread.median
        what = f"ours / {ratio.against}, tokens per {ratio.per}"
        yield Target(what, found, wanted, "times", found >= wanted)
    shares = {"CPU second": ours.matrix_share_cpu, "wall second": ours.matrix_share_wall}
    for per, share in shares.items():
        if share is not None:
            what = f"share of the matrix rate, per {per}"
            yield Target(what, share, MATRIX_SHARE, "share", share >= MATRIX_SHARE)
    peaks = {
        line.system: line.peak_memory_bytes.median
        for line in lines
        if line.system not in (OURS, PLAIN)
    }
    if peaks:
        least = min(peaks, key=lambda system: peaks[system])
        found, wanted = ours.peak_memory_bytes.median, peaks[least]
        what = f"peak memory against {least}"
        yield Target(what, found, wanted, "bytes", found <= wanted)
