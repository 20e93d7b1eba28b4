"""Write requests in plain English with the cron expression each one asks for.

    python examples/cron/generate.py --out DIR --seed 0 --train-rows 1500 --heldout-rows 200

A row is *when in the day* x *on which days*, each drawn with one of its phrasings, so a
held-out expression is a new combination of parts the training rows show separately. The two
files share no schedule, compared by meaning (`meaning`), not by text: `0 9 * * 0,6` in
held-out keeps every phrasing of nine o'clock at weekends out of training.

A request has one right schedule, by these reading rules:
- `17:45` is a 24-hour time; a 12-hour time always says am, pm or the part of the day.
- Minutes are counted from the full hour, hours from midnight: "every 4 hours" is `0 */4`.
- "midnight" comes only with every day: on a named day nobody knows which end is meant.
- Day of month and day of week are never both given: cron would join them by "or".
- A span is closed: "hourly from 9:00 am to 5:00 pm" names its first and last run.
- A date comes back every year.
In an expression Sunday is 0 and lists ascend. SmolLM2 has a token for each digit and none for
numbers, so minutes and days of the month are copied from the request, digit by digit; what has
to be learnt is the order of the fields, the hours after noon and the numbers of names.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# fmt: off
HOUR_WORDS = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
              "ten", "eleven")
PAST_WORDS = {15: "quarter", 30: "half"}
DAYS = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September",
          "October", "November", "December")
# fmt: on
MINUTE_STEPS = (2, 5, 10, 15, 20, 30)  # divisors of 60: no short gap at the hour
HOUR_STEPS = (2, 3, 4, 6, 8, 12)
LAST_SAFE_DAY = 28  # every month has one
LEADS = ("run ", "run it ", "please run this ")
LEAD_SHARE = 0.1
WORD_SHARE = 0.5
FIELD_RANGES = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 6))

Meaning = tuple[frozenset[int], ...]


@dataclass(frozen=True)
class Part:
    """One half of a request: some words, and the cron fields that they fix."""

    words: str
    fields: str
    repeats: bool = False
    """A time of day that already says "every", so "every Monday" would be one too many."""


@dataclass(frozen=True)
class Row:
    """A request and the expression that answers it."""

    prompt: str
    completion: str


def meaning(expression: str) -> Meaning:
    """Return the values each of the five fields lets through; equal means same schedule.

    Exact for the expressions written here, which never restrict both kinds of day; the
    scorer reads what a model may write.
    """
    fields = zip(expression.split(), FIELD_RANGES, strict=True)
    return tuple(frozenset(_values(text, low, high)) for text, (low, high) in fields)


def _values(field: str, low: int, high: int) -> list[int]:
    found: list[int] = []
    for term in field.split(","):
        span, _, step = term.partition("/")
        first, _, last = span.partition("-")
        start, end = (low, high) if span == "*" else (int(first), int(last or first))
        found.extend(range(start, end + 1, int(step or 1)))
    return found


def pick(rng: random.Random, weighted: Sequence[tuple[float, T]]) -> T:
    """Draw one of the values, with the weight that stands before it."""
    return rng.choices([value for _, value in weighted], [weight for weight, _ in weighted])[0]


# --- clock times ------------------------------------------------------------------------


def part_of_day(hour: int) -> str:
    """Return the part of the day that tells which of its two meanings an hour has."""
    if hour < 12:
        return "in the morning"
    return "in the afternoon" if hour < 18 else "in the evening"


def digital(hour: int, minute: int) -> list[str]:
    """Return the ways to write a time in digits: 24-hour, 12-hour, 12-hour without a space.

    From 0:00 to 0:59 only the first: "12:30 am" is read both ways, as "12 pm" is.
    """
    ways = [f"{hour:02d}:{minute:02d}"]
    if (hour, minute) == (12, 0):
        return [*ways, "noon", "noon"]
    if hour:
        half = "am" if hour < 12 else "pm"
        short = f"{(hour - 1) % 12 + 1}"
        exact = f"{short}:{minute:02d}"
        ways += [f"{exact} {half}", f"{exact}{half}"]
        ways += [f"{short} {half}", f"{short}{half}"] * (minute == 0)
    return ways


def spoken(hour: int, minute: int) -> list[str]:
    """Return the ways to say a time in words; none where people would not."""
    if (hour, minute) in ((0, 0), (12, 0)):
        return ["noon" if hour else "midnight"]
    to = minute > 30
    named, gap = (hour + 1, 60 - minute) if to else (hour, minute)
    if named % 12 == 0 or gap not in (0, *PAST_WORDS):
        return []  # "twelve in the morning" could be either
    clock = f"{HOUR_WORDS[named % 12]} {part_of_day(named)}"
    return [f"{PAST_WORDS[gap]} {'to' if to else 'past'} {clock}" if gap else clock]


def clock_words(rng: random.Random, hour: int, minute: int) -> str:
    """Say a time of day, about half the time in words where there are any."""
    words = spoken(hour, minute)
    return rng.choice(words if words and rng.random() < WORD_SHARE else digital(hour, minute))


def draw_hour(rng: random.Random) -> int:
    """Draw an hour, twice as often one of those that 12-hour and 24-hour clocks call otherwise."""
    return pick(rng, [(1, rng.randrange(13)), (2, rng.randrange(13, 24))])


def draw_minute(rng: random.Random) -> int:
    """Draw a minute as people choose them: mostly round ones."""
    return pick(rng, [(3, 0), (2, 30), (1, 15), (1, 45), (3, rng.randrange(60))])


def at_one_time(rng: random.Random) -> Part:
    """Draw a clock time; most rows have one."""
    hour, minute = pick(rng, [(15, (draw_hour(rng), draw_minute(rng))), (1, (12, 0)), (1, (0, 0))])
    return Part(f"at {clock_words(rng, hour, minute)}", f"{minute} {hour}")


def every_few_minutes(rng: random.Random) -> Part:
    """Draw a step in minutes."""
    step = rng.choice(MINUTE_STEPS)
    named = {15: ["every quarter of an hour"], 30: ["every half hour"]}.get(step, [])
    words = rng.choice([f"every {step} minutes"] * 2 + named)
    return Part(words, f"*/{step} *", repeats=True)


def every_few_hours(rng: random.Random) -> Part:
    """Draw a step in hours."""
    step = rng.choice(HOUR_STEPS)
    return Part(f"every {step} hours", f"0 */{step}", repeats=True)


def every_hour(rng: random.Random) -> Part:
    """Draw the minute of every hour."""
    minute = draw_minute(rng)
    words = rng.choice(["hourly", "every hour"])
    if minute == 0:
        return Part(words + rng.choice(["", " on the hour"]), "0 *", True)
    past = f"{PAST_WORDS[minute]} past" if minute in PAST_WORDS else f"minute {minute}"
    return Part(f"{words} at {past}", f"{minute} *", True)


def hourly_between(rng: random.Random) -> Part:
    """Draw every hour of a span that begins in the morning and ends later in the day."""
    first, last = rng.randint(5, 11), rng.randint(13, 23)
    style = rng.randrange(3)  # one style for both ends, as one would write it
    span = f"from {digital(first, 0)[style]} to {digital(last, 0)[style]}"
    return Part(f"{rng.choice(['hourly', 'every hour'])} {span}", f"0 {first}-{last}", True)


# --- days -------------------------------------------------------------------------------


def ordinal(number: int) -> str:
    """Return 1st, 2nd, 3rd, 4th and so on; 11th to 13th are the odd ones."""
    ending = "th" if 10 < number < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def weekdays_of(rng: random.Random, ways: Sequence[str], numbers: str) -> Part:
    """Say weekdays in one of the ways, and now and then the only month they are meant for."""
    month = rng.randrange(12)
    limit, field = pick(rng, [(7, ("", "*")), (1, (f" in {MONTHS[month]}", f"{month + 1}"))])
    return Part(rng.choice(ways) + limit, f"* {field} {numbers}")


def any_day(rng: random.Random) -> Part:
    """Draw no restriction but the months."""
    return weekdays_of(rng, ["every day", "daily"], "*")


def working_days(rng: random.Random) -> Part:
    """Draw Monday to Friday."""
    return weekdays_of(rng, ["every weekday", "on weekdays", "Monday to Friday"], "1-5")


def weekend(rng: random.Random) -> Part:
    """Draw Saturday and Sunday."""
    return weekdays_of(rng, ["on weekends", "at weekends"], "0,6")


def some_weekdays(rng: random.Random) -> Part:
    """Draw one weekday or two."""
    count = pick(rng, [(5, 1), (3, 2)])
    days = rng.choice(list(combinations(range(7), count)))
    every = "every " + " and ".join(DAYS[day] for day in days)
    on = "on " + " and ".join(f"{DAYS[day]}s" for day in days)
    return weekdays_of(rng, [every, on], ",".join(map(str, days)))


def weekday_range(rng: random.Random) -> Part:
    """Draw three to six weekdays in a row, counted from Sunday."""
    first, last = rng.choice([(a, b) for a, b in combinations(range(7), 2) if 2 <= b - a <= 5])
    joins = [f"{DAYS[first]} {join} {DAYS[last]}" for join in ("to", "through")]
    return weekdays_of(rng, joins, f"{first}-{last}")


def all_but_one(rng: random.Random) -> Part:
    """Draw the six days that are one range without Saturday or Sunday."""
    left_out, numbers = rng.choice([("Sunday", "1-6"), ("Saturday", "0-5")])
    return weekdays_of(rng, [f"every day {but} {left_out}" for but in ("but", "except")], numbers)


def day_of_month(rng: random.Random) -> Part:
    """Draw a day of every month."""
    day = rng.randint(1, LAST_SAFE_DAY)
    nth = ordinal(day)
    return Part(rng.choice([f"on the {nth} of every month", f"monthly on the {nth}"]), f"{day} * *")


def two_days_of_month(rng: random.Random) -> Part:
    """Draw two days of every month."""
    first, second = sorted(rng.sample(range(1, LAST_SAFE_DAY + 1), 2))
    words = f"on the {ordinal(first)} and {ordinal(second)} of every month"
    return Part(words, f"{first},{second} * *")


def date(rng: random.Random) -> Part:
    """Draw a day of the year."""
    day, month = rng.randint(1, LAST_SAFE_DAY), rng.randrange(12)
    ways = [f"on {day} {MONTHS[month]}", f"on {MONTHS[month]} {ordinal(day)}"]
    return Part(rng.choice(ways), f"{day} {month + 1} *")


# --- rows -------------------------------------------------------------------------------

TIMES: Sequence[tuple[float, Callable[[random.Random], Part]]] = (
    (72, at_one_time),
    (8, every_few_minutes),
    (6, every_few_hours),
    (7, every_hour),
    (7, hourly_between),
)
DATES: Sequence[tuple[float, Callable[[random.Random], Part]]] = (
    (14, any_day),
    (13, working_days),
    (8, weekend),
    (33, some_weekdays),
    (6, weekday_range),
    (4, all_but_one),
    (10, day_of_month),
    (4, two_days_of_month),
    (8, date),
)


def reads_one_way(time: Part, days: Part) -> bool:
    """Tell whether the two halves, side by side, say one schedule."""
    return "midnight" not in time.words or days.fields == "* * *"


def draw_row(rng: random.Random) -> Row:
    """Draw a time and days that fit, and put them in one of the two orders."""
    time, days = pick(rng, TIMES)(rng), pick(rng, DATES)(rng)
    while not reads_one_way(time, days):
        time, days = pick(rng, TIMES)(rng), pick(rng, DATES)(rng)
    lead = rng.choice(LEADS) if rng.random() < LEAD_SHARE else ""
    return Row(lead + in_one_phrase(rng, time, days), f"{time.fields} {days.fields}")


def in_one_phrase(rng: random.Random, time: Part, days: Part) -> str:
    """Join the halves: "hourly, every Monday", but "every Monday at noon" either way round."""
    if time.repeats and days.fields == "* * *":
        return time.words
    if time.repeats:
        comma = "," if days.words.startswith(("every", "each", "daily")) else ""
        return f"{time.words}{comma} {days.words}"
    return " ".join(rng.sample([time.words, days.words], 2))


def draw_split(seed: int, num_train: int, num_heldout: int) -> tuple[list[Row], list[Row]]:
    """Return training and held-out rows that share no schedule and no prompt.

    Both come from one stream of draws. Held-out is filled first, one row per schedule; so it
    is a fair sample, and the same whatever the number of training rows.
    """
    rng = random.Random(seed)
    heldout: dict[Meaning, Row] = {}
    while len(heldout) < num_heldout:
        row = draw_row(rng)
        heldout.setdefault(meaning(row.completion), row)
    train: dict[str, Row] = {}
    while len(train) < num_train:
        row = draw_row(rng)
        if meaning(row.completion) not in heldout:
            train.setdefault(row.prompt, row)
    return list(train.values()), list(heldout.values())


def write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    """Write one JSON object per line, the same bytes on every system."""
    lines = [json.dumps(asdict(row)) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> None:
    """Write `train.jsonl` and `heldout.jsonl`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-rows", type=int, default=1500)
    parser.add_argument("--heldout-rows", type=int, default=200)
    args = parser.parse_args()
    train, heldout = draw_split(args.seed, args.train_rows, args.heldout_rows)
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(args.out / "train.jsonl", train)
    write_jsonl(args.out / "heldout.jsonl", heldout)


if __name__ == "__main__":
    main()
