import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from qlora_core.artifacts import Metric
from qlora_core.backends.mlflow_client import Place, connect
from qlora_core.backends.mlflow_registry import MlflowRegistry, merged_model_name
from qlora_core.errors import LaunchError, UserError
from qlora_core.ports import Candidate
from tests.backends.mlflow_place import fresh_place

TOKENS = torch.tensor([[1, 5, 9, 33, 7, 2]])


@pytest.fixture
def place(tmp_path) -> Place:
    return fresh_place(tmp_path / "mlflow")


def registry(place: Place, **more) -> MlflowRegistry:
    return MlflowRegistry(place.tracking_uri, "cron", place.artifact_location, **more)


def folder_of(path: Path, **files: str) -> Path:
    for name, text in files.items():
        file = path / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return path


def candidate(adapter: Path, merged: Path | None = None, **changes) -> Candidate:
    fields = {
        "name": "cron",
        "adapter": adapter,
        "merged": merged,
        "base": "org/base@abc123",
        "tags": {"qlora.base_key": "k1"},
        "dataset_digest": "d" * 64,
        "metrics": {
            "loss": Metric(value=0.2, standard_error=0.01, num_rows=9, higher_is_better=False),
            "exact_match": Metric(value=0.9, num_rows=9),
        },
    }
    return Candidate(**(fields | changes))


def aliases(place: Place, name: str) -> dict[str, str]:
    found = connect(place.tracking_uri).get_registered_model(name).aliases
    return {alias: str(version) for alias, version in found.items()}


def test_what_was_published_comes_back_as_champion_with_its_metrics(tmp_path, place):
    published = candidate(folder_of(tmp_path / "a", weights="1"))

    nobody = registry(place).champion("cron")
    version, merged_version = registry(place).register(published)
    still_nobody = registry(place).champion("cron")
    registry(place).promote("cron", version)
    champion = registry(place).champion("cron")

    assert nobody is None
    assert still_nobody is None
    assert merged_version is None
    assert champion.version == version
    assert champion.dataset_digest == "d" * 64
    assert champion.metrics == published.metrics


def test_aliases_of_adapter_and_merged_model_move_together(tmp_path, place):
    first = candidate(
        folder_of(tmp_path / "a1", weights="1"), folder_of(tmp_path / "m1", weights="1")
    )
    only_adapter = candidate(folder_of(tmp_path / "a2", weights="2"))
    third = candidate(
        folder_of(tmp_path / "a3", weights="3"), folder_of(tmp_path / "m3", weights="3")
    )

    versions = [registry(place).register(each) for each in (first, only_adapter, third)]
    registry(place).promote("cron", "3")

    assert versions == [("1", "1"), ("2", None), ("3", "2")]
    assert aliases(place, "cron") == {"challenger": "3", "champion": "3"}
    assert aliases(place, merged_model_name("cron")) == {"challenger": "2", "champion": "2"}


def test_the_same_files_are_the_same_version_and_its_numbers_are_renewed(tmp_path, place):
    adapter = folder_of(tmp_path / "a", weights="1", sub__config="{}")
    again = folder_of(tmp_path / "b", weights="1", sub__config="{}", **{"manifest.json": "x"})
    better = {"loss": Metric(value=0.1, num_rows=9)}

    first = registry(place).register(candidate(adapter))
    second = registry(place).register(candidate(again, metrics=better))
    registry(place).promote("cron", second[0])

    assert first == second == ("1", None)
    assert registry(place).champion("cron").metrics == better


def test_other_files_or_another_base_are_another_version(tmp_path, place):
    adapter = folder_of(tmp_path / "a", weights="1")
    renamed = folder_of(tmp_path / "b", weight="1")

    registry(place).register(candidate(adapter))

    assert registry(place).register(candidate(renamed)) == ("2", None)
    assert registry(place).register(candidate(adapter, base="org/other@1")) == ("3", None)


def test_a_deleted_version_is_no_longer_held(tmp_path, place):
    version, _ = registry(place).register(candidate(folder_of(tmp_path / "a", weights="1")))

    before = registry(place).holds("cron", version)
    connect(place.tracking_uri).delete_model_version("cron", version)

    assert before
    assert not registry(place).holds("cron", version)
    assert not registry(place).holds("nobody", "1")


def test_local_files_are_linked_and_not_copied(tmp_path, place):
    adapter = folder_of(tmp_path / "a", weights="1", sub__deep="2")

    registry(place).register(candidate(adapter))

    links = sorted((tmp_path / "mlflow" / "mlartifacts").rglob("*"))
    links = [path for path in links if path.is_file()]
    assert {path.name for path in links} == {"weights", "deep"}
    assert all(path.stat().st_nlink == 2 for path in links)


def test_files_on_another_disk_are_copied(tmp_path, place):
    other_disk = Path("/dev/shm")
    if not other_disk.is_dir() or other_disk.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    adapter = folder_of(other_disk / f"qlora-test-{tmp_path.name}", weights="1", sub__deep="2")
    try:
        registry(place).register(candidate(adapter))
    finally:
        shutil.rmtree(adapter)

    copies = (tmp_path / "mlflow" / "mlartifacts").rglob("*")
    assert {path.name: path.read_text() for path in copies if path.is_file()} == {
        "weights": "1",
        "deep": "2",
    }


def test_the_model_is_tied_to_its_run_with_base_and_metrics(tmp_path, place):
    client = connect(place.tracking_uri)
    experiment = client.create_experiment("cron", artifact_location=place.artifact_location)
    run_id = client.create_run(experiment).info.run_id

    registry(place, run_id=lambda: run_id).register(
        candidate(folder_of(tmp_path / "a", weights="1"))
    )

    model = client.search_logged_models([experiment])[0]
    version = client.get_model_version("cron", "1")
    assert model.model_type == "peft-lora"
    assert model.source_run_id == version.run_id == run_id
    assert model.params["base"] == version.tags["qlora.base"] == "org/base@abc123"
    assert version.tags["qlora.base_key"] == "k1"
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "cron", "version": 1}]
    assert {metric.key for metric in model.metrics} == {"registered/loss", "registered/exact_match"}


def test_a_downloaded_champion_answers_like_the_trained_adapter(
    tmp_path, place, tiny_llama, monkeypatch
):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.tracking_uri)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
    tuned.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)

    version, _ = registry(place).register(candidate(tmp_path / "adapter"))
    registry(place).promote("cron", version)
    download = mlflow.artifacts.download_artifacts("models:/cron@champion")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), download)

    with torch.no_grad():
        wanted, got = tuned.eval()(TOKENS).logits, loaded.eval()(TOKENS).logits
        plain = base.eval()(TOKENS).logits
    assert torch.equal(wanted, got)
    assert (wanted - plain).abs().max() > 1e-3


def test_a_name_that_mlflow_refuses_is_the_users_to_mend(tmp_path, place):
    wrong = candidate(folder_of(tmp_path / "a", weights="1"), name="org/cron")

    with pytest.raises(UserError, match="org/cron"):
        registry(place).register(wrong)


def test_an_absent_server_is_worth_another_try(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    with pytest.raises(LaunchError, match=r"does not answer: Connection refused\.\n") as caught:
        MlflowRegistry("http://me:secret@127.0.0.1:9", "cron").champion("cron")

    assert caught.value.is_transient
    assert "workspace.tracking_uri" in caught.value.fix
    assert "secret" not in str(caught.value)
