import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_core.data import reading
from qlora_core.data.problems import Problems
from qlora_core.data.reading import read_records
from qlora_core.errors import DataError
from qlora_core.sources import Source, find_source

ROWS = [{"q": "Zwei?", "a": "vier"}, {"q": 'a\nb, "c"', "a": "日本"}]


def read(path):
    """All rows with their line numbers; raises what is wrong with them."""
    problems = Problems()
    records = list(read_records(find_source(str(path)), "train", problems))
    problems.raise_if_any()
    return [(record.place.number, record.columns) for record in records]


def write(folder, name, data):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def jsonl(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


CSV = 'q,a\nZwei?,vier\n"a\nb, ""c""",日本\n'


@pytest.mark.parametrize(
    ("name", "data", "lines"),
    [
        ("d.jsonl", jsonl(ROWS), [1, 2]),
        ("d.jsonl", b"\xef\xbb\xbf" + jsonl(ROWS).encode(), [1, 2]),
        ("d.jsonl", "\n" + jsonl(ROWS).replace("\n", "\r\n\r\n") + "\n\n", [2, 4]),
        ("d.json", json.dumps(ROWS), [1, 1]),
        ("d.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode(), [2, 6]),
        ("d.json", json.dumps({"x": {"data": [1]}, "data": ROWS, "y": 1}, indent=0), [8, 12]),
        ("d.csv", CSV, [2, 3]),
        ("d.csv", b"\xef\xbb\xbf" + CSV.replace("日本\n", "日本").encode(), [2, 3]),
    ],
)
def test_rows_come_with_the_line_they_start_at(tmp_path, name, data, lines):
    path = write(tmp_path, name, data)

    assert read(path) == list(zip(lines, ROWS, strict=True))


def test_parquet_rows_are_numbered(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet")

    assert read(tmp_path / "d.parquet") == list(enumerate(ROWS, 1))


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("d.jsonl", b"", "d.jsonl is empty"),
        ("d.csv", b"", "d.csv is empty"),
        ("d.jsonl", b'{"a": 1}\n{"a": \n', r"d.jsonl:2: is not JSON: Expecting value at column"),
        ("d.jsonl", b'{"a": 1}\n\n[1, 2]\n', r"d.jsonl:3: is a JSON list, but a row is an object"),
        ("d.jsonl", b'{"a": "x\0"}\n', r"d.jsonl:1: holds NUL bytes"),
        ("d.jsonl", '{"a": 1}'.encode("utf-16"), r"d.jsonl:1: holds NUL bytes"),
        ("d.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"d.jsonl:2: is not UTF-8 at byte 8"),
        ("d.jsonl", b'{"a": ' + b"[" * 100_000, r"d.jsonl:1: is nested too deeply"),
        ("d.jsonl", b'{"a": ' + b"1" * 5000 + b"}", r"d.jsonl:1: is not JSON: Exceeds the limit"),
        ("d.json", b'[{"a": 1},\n {"a": }]', r"d.json:2: is not JSON: Expecting value \(column 8"),
        ("d.json", b'[{"a": 1}\n {"a": 2}]', r"d.json:2: is not JSON: ',' or '\]' is expected"),
        ("d.json", b'[{"a": 1},\n 3]', r"d.json:2: is a JSON int"),
        ("d.json", b'[{"a": 1},\n', r"d.json:2: is not JSON"),
        ("d.json", b'{"a": 1}\n{"a": 2}', r"without a list of rows under 'data'[\s\S]*\.jsonl"),
        ("d.json", b'"text"', r"d.json:1: .*list of objects is expected"),
        ("d.json", b'[\n"\xff"]', r"d.json:2: is not UTF-8"),
        ("d.csv", b"q,a\n1,2\n1,2,3\n1\n", r"d.csv:3: has 3 fields.*has 2\n.*d.csv:4: has 1"),
        ("d.csv", b"q,a\n1,\xff\n", r"d.csv:2: is not UTF-8 at byte 3"),
        ("d.csv", b'q,a\n1,2\n"3,4\n5,6\n', r"d.csv:3: the row that starts here is not CSV"),
        ("d.csv", b"q,q\n1,2\n", r"d.csv:1: the header names \['q'\] twice"),
        ("d.csv", b"q,\n1,2\n", r"d.csv:1: the header has a column without a name"),
        ("d.parquet", b"PAR1 nothing", r"d.parquet cannot be read as Parquet after row 0"),
        ("d.txt", b"text", r"d.txt is not a file of rows[\s\S]*\.jsonl"),
    ],
)
def test_whatever_is_malformed_is_named_with_file_and_line(tmp_path, name, data, said):
    path = write(tmp_path, name, data)

    with pytest.raises(DataError, match=said):
        read(path)


def test_many_bad_lines_are_listed_at_once_and_counted(tmp_path):
    lines = "".join(f'{{"a": {" " * n}}}\n' for n in range(30))  # wrong at another column each
    path = write(tmp_path, "d.jsonl", lines + '{"a": 1}\n')

    with pytest.raises(DataError) as caught:
        read(path)

    assert caught.value.what.startswith("30 rows cannot be used")
    assert str(caught.value).count("is not JSON") == 20
    assert "10 more" in str(caught.value)


def test_rows_with_the_same_problem_share_a_line(tmp_path):
    path = write(tmp_path, "d.jsonl", ('{"a": 1}\n' * 30).encode("utf-16-le") + b"\n3\n")

    with pytest.raises(DataError) as caught:
        read(path)

    lines = str(caught.value).splitlines()
    assert lines[0].startswith("32 rows cannot be used")
    assert "d.jsonl:1: holds NUL bytes" in lines[1]
    assert lines[1].endswith("(also 2, 3, 28 more)")
    assert "d.jsonl:32: is a JSON int" in lines[2]
    assert len(lines) == 4


def test_a_huge_line_is_refused_before_it_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 1 << 20)
    path = write(tmp_path, "d.jsonl", b'{"a": 1}\n' + b" " * (1 << 20) + b" \n")

    with pytest.raises(DataError, match=r"d.jsonl:2: this line is longer than 1 MiB"):
        read(path)


def test_a_folder_is_no_file_of_rows(tmp_path):
    with pytest.raises(DataError, match="not a file of rows"):
        read(tmp_path)


def test_a_hub_dataset_that_cannot_be_reached_says_what_to_check():
    source = Source(uri="org/name", kind="hub", hub_id="org/name", digest="0" * 64)

    with pytest.raises(DataError, match=r"org/name[\s\S]*dataset.revision"):
        list(read_records(source, "train", Problems()))
