"""Score a predicted cron expression by what it means, not by how it is written.

Two expressions are the same schedule when they run at the same minutes for ever:
`0 9 * * 1-5` is `0 9 * * MON-FRI`, `*/30 * * * *` is `0,30 * * * *`. cronsim does the reading.
It is small, typed, has no dependencies, follows Debian's cron (its source of truth) and
keeps the parsed sets of values public, so two schedules are compared exactly instead of by
sampling their next few runs; croniter reads many dialects (seconds, years, hashed "H"
fields) and would call right what crontab refuses.
Surprising: cron joins day of month and day of week by "or", unless one of them begins with
`*`; so the two fields are compared together. A sixth field (seconds) is no crontab line.
Source: crontab(5) of Debian's cron; cronsim's README.
"""

from datetime import datetime

from cronsim import CronSim, CronSimError

EPOCH = datetime(2024, 1, 1)  # cronsim wants a start; no run is ever computed from it
MAX_CHARS = 200  # a babbling model must not cost more than a right one
EVERY_DAY = (frozenset(range(1, 32)), frozenset(range(7)), True)


def same_schedule(prediction: str, reference: str) -> float:
    """Return 1.0 if both expressions run at the same times, else 0.0.

    Args:
        prediction: What the model wrote, any string; one that cron would refuse scores 0.0.
        reference: A valid five-field expression.

    Raises:
        ValueError: The reference is not one: the data set is wrong, not the model.
    """
    wanted = schedule(reference)
    if wanted is None:
        raise ValueError(f"{reference!r} is no cron expression; fix the data set's row.")
    return float(schedule(prediction) == wanted)


def schedule(expression: str) -> tuple[object, ...] | None:
    """Return a value that is equal for equal schedules; None if it cannot be parsed."""
    if len(expression) > MAX_CHARS or len(expression.split()) != 5:
        return None
    try:
        cron = CronSim(expression, EPOCH)
    except (
        CronSimError,
        ValueError,
        AssertionError,
    ):  # ValueError, AssertionError: "1-2/L", "5L/2"
        return None
    return (frozenset(cron.minutes), frozenset(cron.hours), frozenset(cron.months), days(cron))


def days(cron: CronSim) -> tuple[frozenset[object], frozenset[object], bool]:
    """Return days of month, days of week and whether both must match, in one normal form."""
    numbers: frozenset[object] = frozenset(cron.days)
    names: frozenset[object] = frozenset(
        (day[0] % 7, day[1]) if isinstance(day, tuple) else day % 7 for day in cron.weekdays
    )
    every_number, every_name = numbers >= EVERY_DAY[0], names >= EVERY_DAY[1]
    if not cron.day_and and (every_number or every_name):
        return EVERY_DAY  # "or" with a full field: `0 9 1-31 * 1` runs every day
    return (numbers, names, cron.day_and or every_number or every_name)
