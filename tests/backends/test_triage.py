"""Each fault has its remedy, and none is tried for ever."""

import pytest

from qlora_core.backends.triage import LostDriverError, Triage
from qlora_core.errors import (
    CollectiveError,
    ConfigError,
    DataError,
    KilledError,
    ModelError,
    NoRoomError,
    NotFiniteError,
    ResourceError,
    StoreAwayError,
    StoreError,
    TrainingError,
)
from qlora_core.training.incidents import history


def kinds(folder):
    return [incident.kind for incident in history(folder)]


@pytest.mark.parametrize(
    "error",
    [
        ConfigError,
        DataError,
        ModelError,
        StoreError,
        ResourceError,
        TrainingError,
        CollectiveError,
    ],
)
def test_what_has_no_remedy_ends_the_run_as_it_is(error, tmp_path):
    with pytest.raises(error, match="the rows"):
        Triage(tmp_path, max_failures=5).remedy(error("the rows"), 3, "0001")

    assert kinds(tmp_path) == []


def test_a_loss_that_is_not_finite_is_tried_once_more_after_the_same_step(tmp_path):
    triage, error = Triage(tmp_path, 5), NotFiniteError("The loss is nan.", fix="Lower the rate.")

    incident, pause_s = triage.remedy(error, 3, "0001")
    later, _ = triage.remedy(error, 9, "0002")
    with pytest.raises(NotFiniteError) as caught:
        triage.remedy(error, 3, "0003")

    assert (incident.kind, incident.step, pause_s) == ("not_finite", 3, 0.0)
    assert later.step == 9
    assert "came back after going on from the last snapshot" in caught.value.why
    assert caught.value.fix == "Lower the rate."


def test_a_loss_that_is_never_finite_is_not_tried_for_ever(tmp_path):
    error = NotFiniteError("The loss is nan.")
    for step in (1, 2, 3):
        Triage(tmp_path, 5).remedy(error, step, "0001")

    with pytest.raises(NotFiniteError, match="again and again"):
        Triage(tmp_path, 5).remedy(error, 4, "0001")


def test_a_full_store_gets_a_few_tries_with_longer_and_longer_pauses(tmp_path):
    triage, error = Triage(tmp_path, 5, pauses_s=(1.0, 2.0)), StoreAwayError("the disk is full")

    pauses = [triage.remedy(error, None, "0001")[1] for _ in range(2)]
    with pytest.raises(StoreAwayError, match="the disk is full"):
        triage.remedy(error, None, "0001")

    assert pauses == [1.0, 2.0]


def test_a_store_too_full_for_the_history_is_no_other_error(tmp_path):
    missing = tmp_path / "gone"

    incident, _ = Triage(missing, 5).remedy(StoreAwayError("the disk is full"), None, "0001")

    assert "trying again" in incident.sentence()


@pytest.mark.parametrize("error", [KilledError("for memory"), LostDriverError("no last words")])
def test_lost_processes_are_replaced_as_often_as_failures_are_allowed(error, tmp_path):
    triage = Triage(tmp_path, max_failures=2)

    for _ in range(2):
        triage.remedy(error, 5, "0001")
    with pytest.raises(type(error)):
        triage.remedy(error, 5, "0001")

    assert len(set(kinds(tmp_path))) == 1
    assert len(kinds(tmp_path)) == 2


def test_a_cluster_without_room_is_asked_a_few_times_more_after_each_step_it_got_to(tmp_path):
    triage, error = Triage(tmp_path, max_failures=0), NoRoomError("no places")

    pauses = [triage.remedy(error, 5, "0001")[1] for _ in range(3)]
    with pytest.raises(NoRoomError):
        triage.remedy(error, 5, "0001")
    triage.remedy(error, 60, "0002")

    assert all(pauses)
    assert kinds(tmp_path) == ["no_room"] * 4
