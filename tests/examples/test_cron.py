"""The cron example's data and score, without a model.

Two oracles, neither sharing code with the generator: cronsim says when an expression runs, and
`read` below says what an English request asks for. `read` itself is held to pairs that a person
wrote; then it reads every generated row.
"""

import calendar
import json
import re
import subprocess
import sys
from datetime import datetime
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from cronsim import CronSim
from hypothesis import given, settings
from hypothesis import strategies as st

EXAMPLE = Path(__file__).parents[2] / "examples" / "cron"
sys.path.insert(0, str(EXAMPLE))  # a worked example is a folder of scripts, not a package

import generate  # noqa: E402
from generate import Row, draw_row, draw_split, meaning  # noqa: E402
from scorer import same_schedule, schedule  # noqa: E402

BY_HAND = [
    ("every weekday at half past nine in the morning", "30 9 * * 1-5"),
    ("at quarter to six in the evening on weekends", "45 17 * * 0,6"),
    ("every day at noon", "0 12 * * *"),
    ("daily at midnight", "0 0 * * *"),
    ("on Tuesdays at 17:45", "45 17 * * 2"),
    ("every Sunday at 9:30 am", "30 9 * * 0"),
    ("at 11pm every Monday and Friday", "0 23 * * 1,5"),
    ("Monday to Thursday at quarter past eight in the morning", "15 8 * * 1-4"),
    ("on the 15th of every month at 12:30 pm", "30 12 15 * *"),
    ("on 4 July at 00:05", "5 0 4 7 *"),
    ("every Wednesday in June at quarter to noon", "45 11 * 6 3"),
    ("every 15 minutes on weekdays", "*/15 * * * 1-5"),
    ("every half hour", "*/30 * * * *"),
    ("every 4 hours on Saturdays", "0 */4 * * 6"),
    ("hourly at half past on Fridays", "30 * * * 5"),
    ("every hour from 9:00 am to 5:00 pm on weekdays", "0 9-17 * * 1-5"),
]
SAME = [
    ("0 9 * * 1-5", "0 9 * * MON-FRI"),
    ("0 9 * * 1-5", "00 09 * * 1,2,3,4,5"),
    ("0 9 * * 7", "0 9 * * 0"),
    ("*/30 * * * *", "0,30 * * * *"),
    ("0 */12 * * *", "0 0,12 * * *"),
    ("0 9 1 1-12 *", "0 9 1 * *"),
    ("0 9 1-31 * 1", "0 9 * * *"),
    ("  0   9 * * *\n", "0 9 * * *"),
]
OTHER = [
    ("0 9 * * 1-5", "0 9 * * 1-6"),
    ("9 0 * * *", "0 9 * * *"),
    ("0 9 13 * 5", "0 9 */13 * 5"),
    ("* */2 * * *", "0 */2 * * *"),
]
JUNK = [
    "",
    " ",
    "nonsense",
    "@daily",
    "0 9 * *",
    "0 0 9 * * *",
    "60 9 * * *",
    "0 9 31 2 *",
    "0 9 * * 5L/2",
    "0 9 1-2/L * *",
    "0 9 * * 1##2",
    "² 9 * * *",
    "9" * 5000 + " 9 * * *",
    "`0 9 * * *`",
    "0 9 * * * Every day at nine.",
]


WORDS = "one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905
DAY = {name: (number + 1) % 7 for number, name in enumerate(calendar.day_name)}
MONTH = {name: number for number, name in enumerate(calendar.month_name) if name}
A_DAY, A_MONTH = (f"({'|'.join(names)})" for names in (DAY, MONTH))
A_CLOCK = (
    r"(?:(half|quarter) (past|to) )?"
    rf"(noon|midnight|\d+(?::\d\d)?|{'|'.join(WORDS)})"
    r"(?: o'clock)?(?: ?(am|pm)| in the (morning|afternoon|evening))?"
)


def read_clock(match: tuple[str, ...]) -> tuple[int, int]:
    shift, side, clock, half, part = match
    hour, _, minute = {"noon": "12", "midnight": "0"}.get(clock, clock).partition(":")
    number = WORDS.index(hour) + 1 if hour in WORDS else int(hour)
    if half or part:
        assert 1 <= number <= 12
        number = number % 12 + 12 * ((half or part) not in ("am", "morning"))
    elif not minute:
        assert clock in ("noon", "midnight"), "neither am, pm nor a part of the day"
    gap = {"half": 30, "quarter": 15, "": 0}[shift]
    total = number * 60 + int(minute or 0) + (-gap if side == "to" else gap)
    return total // 60 % 24, total % 60


def read_times(request: str) -> tuple[set[int], set[int]]:
    """Return the minutes and the hours that a request asks for."""
    every = set(range(24))
    if step := re.search(r"every (\d+) minutes|every (half) hour|every (quarter) of an", request):
        minutes = int(step[1]) if step[1] else {"half": 30, "quarter": 15}[step[2] or step[3]]
        return set(range(0, 60, minutes)), every
    if step := re.search(r"every (\d+) hours", request):
        return {0}, set(range(0, 24, int(step[1])))
    if span := re.search(rf"from {A_CLOCK} to {A_CLOCK}", request):
        (first, minute), (last, same) = (
            read_clock(span.groups("")[:5]),
            read_clock(span.groups("")[5:]),
        )
        assert minute == same
        return {minute}, set(range(first, last + 1))
    if re.search("hourly|every hour", request):
        past = re.search(r"at minute (\d+)|at (half|quarter) past", request)
        number = {None: "0"}.get(past) or past[1] or {"half": "30", "quarter": "15"}[past[2]]
        return {int(number)}, every
    hour, minute = read_clock(re.search(rf"\bat {A_CLOCK}", request).groups(""))
    return {minute}, {hour}


def read_weekdays(request: str) -> set[int]:
    names = [DAY[name] for name in re.findall(A_DAY, request)]
    if re.search("weekday|Monday to Friday", request):
        return {1, 2, 3, 4, 5}
    if "weekends" in request:
        return {0, 6}
    if re.search("but|except", request):
        return set(range(7)) - set(names)
    if re.search(rf"{A_DAY} (to|through) {A_DAY}", request):
        return set(range(names[0], names[1] + 1))
    return set(names) or set(range(7))


def read(request: str) -> tuple[set[int], ...]:
    """Return what a request lets through: minutes, hours, days, months and weekdays."""
    months = {MONTH[name] for name in re.findall(A_MONTH, request)}
    if span := re.search(f"from {A_MONTH} to {A_MONTH}", request):
        months = set(range(MONTH[span[1]], MONTH[span[2]] + 1))
    days = re.findall(rf"(\d+)(?:st|nd|rd|th)\b|on (\d+) {A_MONTH}", request)
    numbers = {int(nth or plain) for nth, plain, _ in days}
    return (
        *read_times(request),
        numbers or set(range(1, 32)),
        months or set(range(1, 13)),
        read_weekdays(request),
    )


@pytest.fixture(scope="module")
def split() -> tuple[list[Row], list[Row]]:
    return draw_split(seed=0, num_train=1500, num_heldout=200)


def first_runs(expression: str, count: int = 40) -> list[datetime]:
    return list(islice(CronSim(expression, datetime(2023, 12, 31, 23, 59)), count))


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path):
    for name, seed in {"a": "3", "b": "3", "c": "4"}.items():
        sizes = ["--train-rows", "50", "--heldout-rows", "20"]
        command = [sys.executable, str(EXAMPLE / "generate.py"), "--seed", seed, *sizes]
        subprocess.run([*command, "--out", str(tmp_path / name)], check=True)

    for name in ("train.jsonl", "heldout.jsonl"):
        wrote_a, wrote_b, wrote_c = ((tmp_path / f / name).read_bytes() for f in "abc")
        assert wrote_a == wrote_b != wrote_c
    rows = [json.loads(line) for line in wrote_a.splitlines()]
    assert len(rows) == 20
    assert all(set(row) == {"prompt", "completion"} for row in rows)


def test_a_schedule_is_in_one_file_only_whatever_its_spelling(split):
    train, heldout = split
    asked = {schedule(row.completion) for row in heldout}

    assert not asked & {schedule(row.completion) for row in train}
    assert len(asked) == len(heldout)


def test_no_request_is_asked_twice_so_none_has_two_answers(split):
    train, heldout = split
    prompts = [row.prompt for row in train + heldout]

    assert len(set(prompts)) == len(prompts) == 1700


def test_one_request_gets_one_schedule_under_every_seed():
    answers: dict[str, str] = {}
    for seed in range(8):
        rng = Random(seed)
        for row in (draw_row(rng) for _ in range(1500)):
            assert answers.setdefault(row.prompt, row.completion) == row.completion


def test_every_expression_runs_and_scores_full_marks_against_itself(split):
    for row in split[0] + split[1]:
        assert len(first_runs(row.completion, 1)) == 1
        assert same_schedule(row.completion, row.completion) == 1.0
        _, _, days, _, weekdays = row.completion.split()
        assert "*" in (days, weekdays), "cron would join the two by 'or'"


def test_the_generators_meaning_agrees_with_cronsims_clock(split):
    for row in split[1]:
        fields = meaning(row.completion)
        for run in first_runs(row.completion):
            values = (run.minute, run.hour, run.day, run.month, run.isoweekday() % 7)
            assert all(a in b for a, b in zip(values, fields, strict=True))


def test_held_out_does_not_depend_on_the_number_of_training_rows():
    assert draw_split(1, 10, 50)[1] == draw_split(1, 300, 50)[1]


def test_training_shows_many_phrasings_and_every_value_of_a_field(split):
    prompts = " | ".join(row.prompt for row in split[0])
    for words in (
        "half past",
        "quarter to",
        "noon",
        "midnight",
        " am",
        "pm",
        "weekday",
        "weekends",
        "every month",
        "hourly",
        "minutes",
        "hours",
        "through",
        "except",
        "in June",
    ):
        assert words in prompts
    fields = list(zip(*(meaning(row.completion) for row in split[0]), strict=True))
    for values, (low, high) in zip(fields, generate.FIELD_RANGES, strict=True):
        single = {min(value) for value in values if len(value) == 1}
        assert single >= set(range(low, min(high, 28) + 1))
    openings = {" ".join(row.prompt.split()[:2]) for row in split[0]}
    assert len(openings) > 60


@pytest.mark.parametrize(("request_", "expression"), BY_HAND)
def test_the_reader_understands_a_request_as_the_person_who_wrote_the_pair(request_, expression):
    assert read(request_) == meaning(expression)


def test_every_generated_request_asks_for_what_its_expression_does(split):
    for row in split[0] + split[1]:
        assert read(row.prompt) == meaning(row.completion), row


@pytest.mark.parametrize(("left", "right"), SAME)
def test_two_spellings_of_one_schedule_score_one(left, right):
    assert same_schedule(left, right) == same_schedule(right, left) == 1.0


@pytest.mark.parametrize(("left", "right"), OTHER)
def test_two_schedules_score_zero(left, right):
    assert same_schedule(left, right) == same_schedule(right, left) == 0.0


@pytest.mark.parametrize("prediction", JUNK)
def test_what_cron_would_refuse_scores_zero(prediction):
    assert same_schedule(prediction, "0 9 * * *") == 0.0


@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=40) | st.text("0123456789*/,-L#WMON ", max_size=30).map("0 9 {} 1 2".format)
)
def test_no_prediction_crashes_the_scorer(prediction):
    assert same_schedule(prediction, "0 9 * * *") in (0.0, 1.0)


def test_a_broken_reference_is_an_error_not_a_zero():
    with pytest.raises(ValueError, match="fix the data set"):
        same_schedule("0 9 * * *", "at nine")
