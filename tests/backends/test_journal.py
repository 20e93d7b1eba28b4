import math
import multiprocessing

import pytest

from qlora_core.backends.journal import EndRecord, Journal, MetricsRecord, TagsRecord


def point(step: int, value: float = 1.0) -> MetricsRecord:
    return MetricsRecord(values={"loss": value}, step=step)


def steps(journal: Journal) -> list[int]:
    return [entry.record.step for entry in journal.read().entries]


def test_records_come_back_in_order_with_the_numbers_they_were_given(tmp_path):
    journal = Journal(tmp_path)
    records = [point(1), TagsRecord(values={"a": "ü\n"}), EndRecord(status="FINISHED")]

    numbers = [journal.append(record) for record in records]

    entries = Journal(tmp_path).read().entries
    assert numbers == [1, 2, 3] == [entry.number for entry in entries]
    assert [entry.record for entry in entries] == records


def test_infinite_and_undefined_numbers_come_back(tmp_path):
    journal = Journal(tmp_path)

    journal.append(MetricsRecord(values={"a": math.inf, "b": -math.inf, "c": math.nan}, step=0))

    values = journal.read().entries[0].record.values
    assert values["a"] == math.inf
    assert values["b"] == -math.inf
    assert math.isnan(values["c"])


@pytest.mark.parametrize("torn", [b'{"time_ms', b"\xff\xfe", b'{"time_ms":1,"record":{}}'])
def test_a_torn_last_line_is_left_out_by_readers_and_cut_off_by_the_next_writer(tmp_path, torn):
    Journal(tmp_path).append(point(1))
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(torn)

    successor = Journal(tmp_path)
    seen_before = steps(successor)
    number = successor.append(point(2))

    assert seen_before == [1]
    assert number == 2
    assert steps(successor) == [1, 2]
    assert successor.read().num_damaged == 0


def test_a_damaged_line_in_the_middle_is_skipped_and_counted_and_keeps_its_number(tmp_path):
    journal = Journal(tmp_path)
    journal.append(point(1))
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(b"rubbish\n")
    journal.append(point(2))

    page = journal.read()

    assert [(entry.number, entry.record.step) for entry in page.entries] == [(1, 1), (3, 2)]
    assert page.num_damaged == 1


def test_reading_goes_on_where_the_last_page_ended(tmp_path):
    journal = Journal(tmp_path)
    journal.append(point(1))
    first = journal.read()
    journal.append(point(2))

    second = journal.read(first)

    assert [(entry.number, entry.record.step) for entry in second.entries] == [(2, 2)]


def _write_many(folder, first):
    journal = Journal(folder)
    for step in range(first, first + 100):
        journal.append(point(step))


def test_two_processes_may_write_to_one_journal(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_write_many, args=(tmp_path, 1000 * i)) for i in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()

    page = Journal(tmp_path).read()

    assert sorted(steps(Journal(tmp_path))) == [*range(100), *range(1000, 1100)]
    assert page.num_damaged == 0


def test_what_was_acknowledged_waits_no_longer(tmp_path):
    journal = Journal(tmp_path)
    for step in range(5):
        journal.append(point(step))

    journal.acknowledge(3)

    assert Journal(tmp_path).acknowledged() == 3
    assert Journal(tmp_path).num_waiting() == 2


def test_a_damaged_acknowledgement_means_that_everything_is_sent_again(tmp_path):
    journal = Journal(tmp_path)
    journal.append(point(1))
    journal.acknowledge(1)
    (tmp_path / "acknowledged.json").write_text('{"numb')

    assert journal.acknowledged() == 0


def test_only_one_may_send(tmp_path):
    journal, other = Journal(tmp_path), Journal(tmp_path)

    with journal.sending() as first, other.sending() as second:
        assert (first, second) == (True, False)
    with other.sending() as third:
        assert third


def test_a_file_is_copied_so_that_later_changes_do_not_matter(tmp_path):
    report = tmp_path / "report.txt"
    report.write_text("as it was")
    journal = Journal(tmp_path / "journal")

    place = journal.copy_in(report)
    report.write_text("changed")

    assert (journal.folder / place).read_text() == "as it was"
