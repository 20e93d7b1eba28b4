import numpy as np
import pytest

from qlora_core.data.prepared import (
    Prompt,
    TokenRow,
    read_prompts,
    read_split,
    write_prompts,
    write_split,
)
from qlora_core.errors import ArtifactError

ROWS = [TokenRow([1, 2, 3], [-100, 2, 3]), TokenRow([4], [4]), TokenRow([5, 6], [5, -100])]


def test_rows_read_back_as_written_in_any_order(tmp_path):
    write_split(tmp_path, "train", ROWS)

    rows = read_split(tmp_path, "train")

    assert len(rows) == 3
    for i in (2, 0, 1, -1):
        assert rows.input_ids(i).tolist() == ROWS[i].input_ids
        assert rows.labels(i).tolist() == ROWS[i].labels
    with pytest.raises(IndexError):
        rows.input_ids(3)


def test_supervised_tokens_count_only_where_something_predicts_them(tmp_path):
    write_split(tmp_path, "train", ROWS)

    rows = read_split(tmp_path, "train")

    assert rows.lengths.tolist() == [3, 1, 2]
    assert rows.num_supervised.tolist() == [2, 0, 0]


def test_many_row_groups_keep_their_order(tmp_path):
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, 9, size=n % 7 + 1).astype(np.int32) for n in range(10_000)]
    write_split(tmp_path, "heldout", [TokenRow(row, row) for row in ids])

    rows = read_split(tmp_path, "heldout")

    assert all(np.array_equal(rows.input_ids(i), row) for i, row in enumerate(ids))
    assert rows.num_supervised.tolist() == [len(row) - 1 for row in ids]


def test_no_rows_and_no_prompts_read_back_as_none(tmp_path):
    write_split(tmp_path, "train", [])
    write_prompts(tmp_path, [])

    assert len(read_split(tmp_path, "train")) == 0
    assert read_split(tmp_path, "train").num_supervised.tolist() == []
    assert read_prompts(tmp_path) == []


def test_prompts_read_back_with_all_references(tmp_path):
    prompts = [Prompt("Zwei?", (1, 2), ("vier", "四")), Prompt("", (3,), ("",))]
    write_prompts(tmp_path, prompts)

    assert read_prompts(tmp_path) == prompts


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"train\.parquet"):
        read_split(tmp_path, "train")
    (tmp_path / "eval.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(ArtifactError, match=r"eval\.parquet"):
        read_prompts(tmp_path)
