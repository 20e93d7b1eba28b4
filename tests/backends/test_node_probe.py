import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import qlora_core
from qlora_core.backends.node_probe import (
    NONCE_FILE,
    Installation,
    Listing,
    NodeReport,
    Question,
    gpus_here,
    list_folder,
    own_code,
    own_versions,
    probe,
    probe_plain,
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A sealed folder of the store, as far as its names and sizes go."""
    folder = tmp_path / "store" / "base"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights.safetensors").write_bytes(b"w" * 1000)
    (folder / "manifest.json").write_text('{"digest": "abc"}')
    return folder


def question(tmp_path: Path, *folders: Listing, nonce: str = "word") -> Question:
    meeting = tmp_path / "store" / "meeting"
    meeting.mkdir(parents=True, exist_ok=True)
    (meeting / NONCE_FILE).write_text("word")
    return Question(meeting=meeting, nonce=nonce, folders=folders, needs_gpu=False)


def test_a_node_with_the_same_store_finds_nothing_wrong_and_leaves_its_word(tmp_path, base):
    asked = question(tmp_path, list_folder(base))

    report = probe(asked, "node-1")

    assert report.paths == ()
    assert report.trouble == ""
    assert (asked.meeting / "node-1").read_text() == "word"
    assert 0 < report.free_bytes < report.total_bytes
    assert report.installed == Installation(versions=own_versions(), code=own_code())


def test_a_store_that_is_another_disk_is_found_and_no_folder_is_made_there(tmp_path, base):
    asked = question(tmp_path, list_folder(base))
    shutil.rmtree(tmp_path / "store")

    report = probe(asked, "node-1")

    assert report.paths[0].path == asked.meeting / NONCE_FILE
    assert report.paths[0].found == "no such file or directory"
    missing = {found.path for found in report.paths[1:]}
    assert missing == {base / "manifest.json", base / "model" / "weights.safetensors"}
    assert not asked.meeting.exists()


def test_another_word_at_the_same_path_is_another_disk(tmp_path):
    report = probe(question(tmp_path, nonce="other"), "node-1")

    assert [found.found for found in report.paths] == ["another word"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    asked = question(tmp_path)
    (asked.meeting / "node-1").mkdir()

    report = probe(asked, "node-1")

    assert [(found.path, found.found) for found in report.paths] == [
        (asked.meeting / "node-1", "file exists")
    ]


def test_a_file_of_another_size_is_named_with_both_sizes(tmp_path, base):
    listed = list_folder(base)
    weights = base / "model" / "weights.safetensors"
    weights.write_bytes(b"w" * 999)

    (found,) = probe(question(tmp_path, listed), "node-1").paths

    assert (found.path, found.found, found.wanted) == (weights, "999 bytes", "1000 bytes")


def test_another_artefact_with_files_of_the_same_sizes_is_told_by_its_manifest(tmp_path, base):
    listed = list_folder(base)
    (base / "manifest.json").write_text('{"digest": "xyz"}')

    (found,) = probe(question(tmp_path, listed), "node-1").paths

    assert found.path == base / "manifest.json"
    assert found.wanted == f"SHA-256 {listed.seal[:12]}"


def test_question_and_report_travel_as_text(tmp_path, base):
    text = probe_plain(question(tmp_path, list_folder(base)).model_dump_json(), "node-1")

    assert NodeReport.model_validate_json(text).paths == ()


def test_a_gpu_that_is_full_is_reported_beside_the_others_with_what_it_has(monkeypatch):
    def free_and_total(number: int) -> tuple[int, int]:
        if number == 0:
            raise RuntimeError("CUDA error: out of memory\nFor debugging consider ...")
        return 5, 80

    sizes = SimpleNamespace(name="H100", major=9, minor=0, total_memory=80)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: sizes)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free_and_total)

    full, other = gpus_here()

    assert (full.total_bytes, full.free_bytes, full.trouble) == (80, 0, "CUDA error: out of memory")
    assert (other.total_bytes, other.free_bytes, other.trouble) == (80, 5, "")


def test_the_code_is_named_by_its_content_wherever_it_lies(tmp_path, monkeypatch):
    copy = tmp_path / "qlora_core"
    shutil.copytree(Path(qlora_core.__file__).parent, copy)
    here = own_code()
    monkeypatch.setattr(qlora_core, "__file__", str(copy / "__init__.py"))
    assert own_code() == here

    (copy / "errors.py").write_text("# an older version")

    assert own_code() != here
