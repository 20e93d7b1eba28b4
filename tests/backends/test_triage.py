"""Each fault has its remedy, and none is tried for ever."""

from contextlib import contextmanager

import pytest

from qlora_core.backends.triage import LostDriverError, Triage
from qlora_core.errors import (
    CollectiveError,
    ConfigError,
    DataError,
    HeadLostError,
    KilledError,
    LaunchLostError,
    ModelError,
    NoRoomError,
    NotFiniteError,
    ResourceError,
    StoreAwayError,
    StoreError,
    TrainingError,
    WorkersLostError,
)
from qlora_core.training.attempt import claim, next_launch
from qlora_core.training.incidents import history
from qlora_core.training.snapshot import FOLDER


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


LAUNCH_LOST = LaunchLostError("A worker was lost while Ray started the others.")
LOSSES = [KilledError("for memory"), LostDriverError("no last words"), LAUNCH_LOST]


@pytest.mark.parametrize("error", LOSSES)
def test_lost_processes_are_replaced_as_often_as_failures_are_allowed(error, tmp_path):
    triage = Triage(tmp_path, max_failures=2)
    go_on(tmp_path, 5)

    for launch in ("0001", "0002"):
        triage.remedy(error, 5, launch)
    with pytest.raises(type(error)):
        triage.remedy(error, 5, "0003")

    assert len(set(kinds(tmp_path))) == 1
    assert len(kinds(tmp_path)) == 2


def go_on(folder, step):
    """Have workers start after ``step``, from a snapshot."""
    claim(folder, next_launch(folder), step)


def test_what_was_lost_with_a_launch_is_told_in_its_words(tmp_path):
    go_on(tmp_path, 5)

    incident, _ = Triage(tmp_path, 5).remedy(LAUNCH_LOST, 7, "0002")

    assert incident.sentence().startswith("Lost launch after step 7: A worker was lost while Ray")


def test_workers_that_never_met_are_started_once_more_and_not_as_often_as_may_be(tmp_path):
    triage = Triage(tmp_path, max_failures=5)

    triage.remedy(LAUNCH_LOST, None, "0001")
    with pytest.raises(LaunchLostError):
        triage.remedy(LAUNCH_LOST, None, "0002")


def test_no_failures_are_none_before_workers_have_met_too(tmp_path):
    with pytest.raises(LaunchLostError):
        Triage(tmp_path, max_failures=0).remedy(LAUNCH_LOST, None, "0001")


@pytest.mark.parametrize("error", LOSSES)
def test_losses_count_anew_where_training_got_on_in_between(error, tmp_path):
    triage = Triage(tmp_path, max_failures=1)

    for step in (10, 20, 30):
        go_on(tmp_path, step)
        triage.remedy(error, step + 5, f"00{step}")
    with pytest.raises(type(error)):
        triage.remedy(error, 99, "0031")  # steps that are in no snapshot

    assert len(kinds(tmp_path)) == 3


def test_a_disk_that_is_full_for_a_moment_now_and_then_is_waited_for_each_time(tmp_path):
    triage, error = Triage(tmp_path, 5, pauses_s=(1.0, 2.0)), StoreAwayError("the disk is full")

    pauses = []
    for step in (0, 0, 100, 200, 200):
        go_on(tmp_path, step)
        pauses.append(triage.remedy(error, step, "0001")[1])
    with pytest.raises(StoreAwayError):
        triage.remedy(error, 201, "0001")

    assert pauses == [1.0, 2.0, 1.0, 1.0, 2.0]


def save(folder, step):
    """Have the workers that train leave a snapshot."""
    (folder / FOLDER / f"step_{step:08d}-0001.1").mkdir(parents=True)


def test_a_snapshot_is_progress_before_anybody_has_gone_on_from_it(tmp_path):
    triage, error = Triage(tmp_path, 5, pauses_s=(1.0, 2.0)), StoreAwayError("the disk is full")
    lost = WorkersLostError("lost six times")
    go_on(tmp_path, 0)

    pauses = [triage.remedy(error, 0, "0001")[1] for _ in range(2)]
    save(tmp_path, 4000)
    pauses += [triage.remedy(error, 4000, "0001")[1]]
    triage.look()
    incident, _ = triage.remedy(lost, 4001, "0001")

    assert pauses == [1.0, 2.0, 1.0]
    assert incident.kind == "ray_gave_up"


@contextmanager
def unreadable(folder):
    """Let reading anything below ``folder`` fail, as a network file system does for a moment."""
    aside = folder.with_name("aside")
    folder.rename(aside)
    folder.symlink_to(folder)  # ELOOP for whoever looks
    try:
        yield
    finally:
        folder.unlink()
        aside.rename(folder)


def test_a_store_that_cannot_be_read_does_not_say_that_nothing_was_gained(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    triage, error = Triage(scratch, 5, pauses_s=(1.0, 2.0)), StoreAwayError("it is out of reach")

    pauses = []
    for step in (100, 500, 900, 1300):
        triage.look()
        save(scratch, step)
        with unreadable(scratch):
            pauses.append(triage.remedy(error, step, "0001")[1])

    assert pauses == [1.0, 2.0, 2.0, 2.0]


def test_where_the_store_could_not_be_read_at_first_what_is_in_it_is_no_progress(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    save(scratch, 4000)
    with unreadable(scratch):
        triage = Triage(scratch, max_failures=5)

    with pytest.raises(WorkersLostError):
        triage.remedy(WorkersLostError("lost six times"), 4001, "0001")


def test_where_ray_has_given_up_it_is_asked_again_if_training_got_on_in_between(tmp_path):
    go_on(tmp_path, 50)  # of an earlier call
    triage, error = Triage(tmp_path, max_failures=5), WorkersLostError("lost six times")
    go_on(tmp_path, 3000)

    incident, _ = triage.remedy(error, 3100, "0002")
    with pytest.raises(WorkersLostError):
        triage.remedy(error, 3200, "0003")

    assert (incident.kind, incident.step) == ("ray_gave_up", 3100)
    assert kinds(tmp_path) == ["ray_gave_up"]


def test_where_ray_has_given_up_and_nothing_was_gained_the_run_ends(tmp_path):
    go_on(tmp_path, 50)
    triage = Triage(tmp_path, max_failures=5)
    go_on(tmp_path, 50)

    with pytest.raises(WorkersLostError):
        triage.remedy(WorkersLostError("lost six times"), 60, "0002")


@pytest.mark.parametrize(
    ("error", "kind"),
    [(NoRoomError("no places"), "no_room"), (HeadLostError("nobody answers"), "lost_head")],
)
def test_a_cluster_that_is_busy_or_away_is_asked_a_few_times_more_after_each_step_it_got_to(
    error, kind, tmp_path
):
    triage = Triage(tmp_path, max_failures=0)

    pauses = [triage.remedy(error, 5, "0001")[1] for _ in range(3)]
    with pytest.raises(type(error)):
        triage.remedy(error, 5, "0001")
    triage.remedy(error, 60, "0002")

    assert all(pauses)
    assert kinds(tmp_path) == [kind] * 4
