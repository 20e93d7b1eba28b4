"""What is stored with every benchmark, and what must not be."""

import json
import tempfile
from pathlib import Path

import pytest

from benchmarks.record import ROOT, Record, data_folder, found_gsm8k, in_turn, without_places


def test_no_place_in_a_turn_is_always_the_same_systems():
    turns = [in_turn(["a", "b", "c"], number) for number in (1, 2, 3, 4)]

    assert turns == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
    assert in_turn([], 1) == []


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (f"failed: x (all of it: {ROOT}/benchmarks/.work/1/log.txt)",
         "failed: x (all of it: benchmarks/.work/1/log.txt)"),
        (f"cwd {ROOT}", "cwd ."),
        (f"no {Path.home()}/.cache/hub/x", "no ~/.cache/hub/x"),
        (f"[Errno 2] '{tempfile.gettempdir()}/a1/out.bin'", "[Errno 2] '$TMP/a1/out.bin'"),
        ('File "/opt/somewhere/lib/torch/x.py", line 3', 'File "x.py", line 3'),
        ("1 tok/s and 5 MB/s, and/or https://a.example/b/c", None),
        ("a failure at 3 / 4 steps", None),
    ],
)  # fmt: skip
def test_stored_text_does_not_say_where_things_lie(said, kept):
    found = without_places({"left_out": [said], "number": 3})

    assert found == {"left_out": [said if kept is None else kept], "number": 3}


def test_a_record_is_one_file_that_grows(tmp_path):
    record = Record(tmp_path, "training", "a try")

    first = record.write({"rounds": [1]})
    second = record.write({"rounds": [1, 2], "left_out": {"x": f"see {ROOT}/a.txt"}})

    assert first == second
    assert list(tmp_path.iterdir()) == [first]
    stored = json.loads(first.read_text())
    assert stored["rounds"] == [1, 2]
    assert stored["left_out"] == {"x": "see a.txt"}
    assert stored["what"] == "a try"


def test_real_data_is_where_the_environment_says(tmp_path, monkeypatch):
    rows = tmp_path / "gsm8k" / "train.jsonl"
    rows.parent.mkdir()
    rows.touch()
    monkeypatch.setenv("QLORAFLOW_DATA", str(tmp_path))

    assert data_folder() == tmp_path
    assert found_gsm8k(None) == rows
    assert found_gsm8k(tmp_path / "mine.jsonl") == tmp_path / "mine.jsonl"


def test_without_real_rows_a_person_is_told_that_they_are_made_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QLORAFLOW_DATA", str(tmp_path))

    assert found_gsm8k(None) is None
    assert "made-up chats" in capsys.readouterr().err
