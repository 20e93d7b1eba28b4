"""What starts beside the imports, and what does not."""

import pytest

from flows import ahead
from flows.ahead import started_ahead
from flows.records import open_record
from qlora_core.artifacts import Artifact, Facts
from qlora_core.backends.ray_process import WaitingDriver
from qlora_core.config import ClusterConfig
from qlora_core.errors import LaunchError
from tests.flows.scenes import tiny_recipe


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe(tmp_path / "store", tmp_path / "model", tmp_path / "rows.jsonl")


@pytest.fixture
def rays(monkeypatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(WaitingDriver, "start", lambda _, cluster: told.append("start"))
    monkeypatch.setattr(WaitingDriver, "end", lambda _: told.append("end"))
    monkeypatch.setattr(ahead, "ensure_server", lambda _: "a server")
    return told


def test_ray_and_a_server_start_for_a_recipe_that_was_never_trained(recipe, rays):
    with started_ahead(recipe) as found:
        assert rays == ["start"]
        assert found.connect() == "a server"

    assert rays == ["start", "end"]


def test_ray_is_let_sleep_where_this_very_recipe_was_trained(recipe, rays, tmp_path):
    record = open_record(tmp_path / "store", recipe, "flow-1")
    made = Artifact(stage="train_adapter", key="k", digest="d", path=tmp_path, facts=Facts())
    record.add("adapter", made, cached=False)
    record.close("completed")
    other = recipe.model_copy(update={"seed": recipe.seed + 1})

    with started_ahead(recipe):
        assert rays == []
    with started_ahead(other):
        assert "start" in rays


def test_a_machine_too_small_for_the_workers_starts_none(recipe, rays):
    huge = recipe.model_copy(update={"cluster": ClusterConfig(cpus_per_worker=100_000)})

    with started_ahead(huge):
        assert rays == []


def test_why_there_is_no_server_is_told_to_whoever_asks_for_it(recipe, rays, monkeypatch):
    def fails(_):
        raise LaunchError("no free port")

    monkeypatch.setattr(ahead, "ensure_server", fails)

    with started_ahead(recipe) as found, pytest.raises(LaunchError, match="no free port"):
        found.connect()
