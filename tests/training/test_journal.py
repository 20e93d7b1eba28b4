from qlora_core.ports import StepMetrics
from qlora_core.training.journal import Journal, StepTail, Tail, read_journal


def step(number: int) -> StepMetrics:
    return StepMetrics(
        step=number,
        num_steps=9,
        epoch=0.1,
        loss=1 / 3,
        learning_rate=1e-3,
        grad_norm=2.0,
        num_tokens=5,
        num_supervised_tokens=4,
        num_computed_tokens=6,
        seconds=0.1,
        tokens_per_s=50.0,
        supervised_tokens_per_s=40.0,
        memory_bytes=1,
    )


def test_a_step_reads_back_as_it_was_written(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.append(step(1))
    journal.close()

    assert read_journal(tmp_path / "j") == [step(1)]


def test_a_follower_tells_every_step_once_though_the_journal_starts_anew(tmp_path):
    tail, told = StepTail(tmp_path / "j"), []
    told += [s.step for s in tail.steps()]
    first = Journal(tmp_path / "j")
    for number in (1, 2, 3):
        first.append(step(number))
    told += [s.step for s in tail.steps()]

    second = Journal(tmp_path / "j", [step(1), step(2)])
    told += [s.step for s in tail.steps()]
    for number in (3, 4):
        second.append(step(number))
    told += [s.step for s in tail.steps()]

    assert told == [1, 2, 3, 4]


def test_half_a_line_waits_for_its_end(tmp_path):
    tail, path = Tail(tmp_path / "f"), tmp_path / "f"
    path.write_text("one\ntw")
    first = list(tail.lines())
    with path.open("a") as file:
        file.write("o\n")

    assert first == ["one"]
    assert list(tail.lines()) == ["two"]
