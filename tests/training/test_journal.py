from qlora_core.training.journal import Journal, StepTail, Tail, read_journal
from tests.training.steps import step_metrics


def test_a_step_reads_back_as_it_was_written(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.append(step_metrics(1))
    journal.close()

    assert read_journal(tmp_path / "j") == [step_metrics(1)]


def test_a_follower_tells_every_step_once_though_the_journal_starts_anew(tmp_path):
    tail, told = StepTail(tmp_path / "j"), []
    told += [s.step for s in tail.steps()]
    first = Journal(tmp_path / "j")
    for number in (1, 2, 3):
        first.append(step_metrics(number))
    told += [s.step for s in tail.steps()]

    second = Journal(tmp_path / "j", [step_metrics(1), step_metrics(2)])
    told += [s.step for s in tail.steps()]
    for number in (3, 4):
        second.append(step_metrics(number))
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
