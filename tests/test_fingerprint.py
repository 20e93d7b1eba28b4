import hashlib
import subprocess
import sys

import pytest

from qlora_core.fingerprint import canonical_json, file_digest, files_below, fingerprint


def test_equal_values_have_equal_fingerprints_whatever_the_order_of_keys():
    assert fingerprint({"a": 1, "b": [1.0, "ü"]}) == fingerprint({"b": [1.0, "ü"], "a": 1})


def test_different_values_have_different_fingerprints():
    values = [
        {"a": 1},
        {"a": 1.0},
        {"a": "1"},
        {"a": [1]},
        {"a": None},
        {},
        [],
        "",
        1e-4,
        1.0001e-4,
    ]

    assert len({fingerprint(value) for value in values}) == len(values)


def test_a_fingerprint_is_the_same_in_another_process_with_another_hash_seed():
    program = (
        "from qlora_core.fingerprint import fingerprint;"
        "print(fingerprint({'x': {'b': 1e-4, 'a': ['ü', None, True]}}))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            cwd=str(__import__("pathlib").Path(__file__).parents[1]),
        ).stdout
        for seed in ("0", "1")
    }

    assert seen == {fingerprint({"x": {"a": ["ü", None, True], "b": 1e-4}}) + "\n"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_say_is_refused(value):
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": value})


def test_a_file_digest_is_plain_sha256(tmp_path):
    data = bytes(range(256)) * 8192
    (tmp_path / "f").write_bytes(data)

    assert file_digest(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_files_below_are_sorted_relative_and_without_folders(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "c" / "x").touch()
    (tmp_path / "a").touch()

    assert files_below(tmp_path) == ["a", "b/c/x"]
