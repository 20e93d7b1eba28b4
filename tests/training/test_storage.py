"""A store that is full, read-only or away for a moment: told as such, and nothing is lost."""

import errno
import re
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

from qlora_core.config import SnapshotConfig
from qlora_core.errors import (
    ArtifactError,
    ClusterError,
    CollectiveError,
    LaunchError,
    QLoraError,
    StoreAwayError,
    StoreError,
    hiccups_told,
)
from qlora_core.ports import TrainJob
from qlora_core.training import durable, start
from qlora_core.training.attempt import claim, next_launch, read_record
from qlora_core.training.comm import Alone
from qlora_core.training.desk import job_fingerprint
from qlora_core.training.incidents import INCIDENTS_FILE, history
from qlora_core.training.journal import NOTES_FILE, Journal, Tail
from qlora_core.training.killed import FOLDER as KILLED
from qlora_core.training.killed import killed_since_last_start
from qlora_core.training.snapshot import FOLDER, SnapshotWriter, newest_valid, snapshots_in
from qlora_core.training.start import require_store
from qlora_core.training.worker import run_worker
from tests.training.fakes import ThreadComm, run_on_threads
from tests.training.faulty_disk import FaultyDisk, numberless, reads
from tests.training.steps import step_metrics

CPU = torch.device("cpu")
EVERY_STEP = SnapshotConfig(every_steps=1, keep=2)
NO_FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")


CLEARING = {f"{name} scratch/snapshots/step_#-#.#" for name in ("open", "scandir", "rmdir")}
"""What it takes to remove an old snapshot; one that stays for once harms nobody."""


class Killed(BaseException):
    """Stands for SIGKILL."""


def train(job: TrainJob, kill_after: int | None = None) -> None:
    def on_step(metrics) -> None:
        if metrics.step == kill_after:
            raise Killed

    launch = next_launch(job.scratch)
    try:
        run_worker(job, Alone(), EVERY_STEP, launch, CPU, on_step)
    except Killed:
        assert kill_after is not None


def said_of_the_store(job: TrainJob) -> str:
    """Train; return what went wrong with the store, if something did."""
    try:
        train(job)
    except StoreError as error:
        return error.what
    return ""


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def resumable(make_job):
    """Return a job that was killed after two of three steps, as often as it is asked for."""
    killed = make_job("killed", max_steps=3)
    train(killed, kill_after=2)
    shutil.rmtree(killed.scratch / KILLED)  # to be made again

    def again(name: str) -> TrainJob:
        job = make_job(name, max_steps=3)
        shutil.copytree(killed.scratch, job.scratch, dirs_exist_ok=True)
        job.out.rmdir()
        return job

    return again


def test_wherever_the_store_fails_it_is_said_and_the_next_try_ends_with_the_same_bytes(
    resumable, tmp_path, monkeypatch
):
    whole = resumable("whole")
    with monkeypatch.context() as watched:
        disk = FaultyDisk((whole.scratch, whole.out)).install(watched)
        train(whole)
    operations = list(dict.fromkeys(disk.done))
    assert {o.split()[0] for o in operations} >= {"open", "stat", "mkdir", "replace", "fsync"}
    done_without = set()

    for number, operation in enumerate(operations):
        job = resumable(f"try{number}")
        with monkeypatch.context() as watched:
            disk = FaultyDisk((job.scratch, job.out)).install(watched)
            disk.fail_at(operation, errno.ESTALE if reads(operation) else errno.ENOSPC)
            said = said_of_the_store(job)
        if said:
            assert re.search("disk is full|lost track", said), f"{operation}: {said}"
            assert str(tmp_path) in said, operation
            if number % 8:
                continue  # a further try for each takes a minute
            train(job)
        else:
            done_without.add(operation)
        assert files(job.out) == files(whole.out), operation
        assert not list(job.scratch.glob("snapshots/damaged_*")), operation

    assert done_without <= {
        "mkdir scratch",  # is there already, as Python sees for itself
        "mkdir scratch/snapshots",
        *CLEARING,
    }


@NO_FULL
@pytest.mark.parametrize("name", ["out/curve.jsonl", "scratch/summary.json", "scratch/ATTEMPT"])
def test_the_kernels_own_word_of_a_full_disk_is_passed_on_with_the_file_it_is_about(name, make_job):
    job = make_job(max_steps=1)
    launch = next_launch(job.scratch)
    path = job.scratch.parent / name
    written = durable.hidden_name(path) if name.startswith("scratch") else path
    written.symlink_to("/dev/full")

    with pytest.raises(StoreError, match="the disk is full") as caught:
        run_worker(job, Alone(), EVERY_STEP, launch, CPU)

    assert f"cannot write {path}:" in caught.value.what
    assert "Free some space" in caught.value.fix


@pytest.mark.parametrize("code", [errno.EROFS, errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_a_rename_that_fails_leaves_what_was_there(code, tmp_path, monkeypatch):
    durable.replace_durably(tmp_path / "summary.json", b"old")
    hidden = durable.hidden_name(tmp_path / "summary.json")
    FaultyDisk((tmp_path,)).install(monkeypatch).fail_at(
        numberless(f"replace {tmp_path.name}/{hidden.name}"), code
    )
    with pytest.raises(StoreError, match=r"cannot write .*/summary\.json: "):
        durable.replace_durably(tmp_path / "summary.json", b"new")

    assert (tmp_path / "summary.json").read_bytes() == b"old"


def test_no_room_for_the_snapshots_folder_is_said(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    next_launch(scratch)
    attempt = claim(scratch, "0001", 0)
    FaultyDisk((scratch,)).install(monkeypatch).fail_at("mkdir scratch/snapshots", errno.ENOSPC)

    with pytest.raises(StoreError, match="snapshots: the disk is full"):
        SnapshotWriter(scratch, EVERY_STEP, attempt, "job")


STEP = "scratch/snapshots/step_#-#.#"
SNAPSHOT_FILES = ("adapter.safetensors", "optimizer.safetensors", "journal.jsonl", "state.json")


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES])
@pytest.mark.parametrize(
    "operation",
    [
        f"open {STEP}/MANIFEST.json r",
        *(
            f"{do.format(name)}"
            for do in (f"open {STEP}/{{}} rb", f"stat {STEP}/{{}}")
            for name in SNAPSHOT_FILES
        ),
    ],
)
def test_a_snapshot_that_cannot_be_read_just_now_is_not_taken_for_damaged(
    operation, code, resumable, monkeypatch
):
    job, notes = resumable("job"), []
    before = snapshots_in(job.scratch / FOLDER)
    with monkeypatch.context() as watched:
        disk = FaultyDisk((job.scratch,)).install(watched)
        disk.fail_at(operation, code)
        with pytest.raises(StoreError, match=r"cannot read .*step_") as caught:
            newest_valid(job.scratch, job_fingerprint(job), notes)

    assert operation in disk.done
    assert f"move {before[0]} away" in caught.value.fix
    assert snapshots_in(job.scratch / FOLDER) == before
    assert newest_valid(job.scratch, job_fingerprint(job), notes) == before[0]
    assert notes == []


def test_a_damaged_snapshot_that_cannot_be_set_aside_ends_the_search(resumable, monkeypatch):
    job, notes = resumable("job"), []
    before = snapshots_in(job.scratch / FOLDER)
    (before[0] / "state.json").unlink()
    FaultyDisk((job.scratch,)).install(monkeypatch).fail_at(f"rename {STEP}", errno.EROFS)

    with pytest.raises(StoreError, match="read-only"):
        newest_valid(job.scratch, job_fingerprint(job), notes)

    assert snapshots_in(job.scratch / FOLDER) == before
    assert notes == []


def test_a_snapshots_folder_that_cannot_be_listed_is_not_an_empty_one(resumable, monkeypatch):
    job = resumable("job")
    FaultyDisk((job.scratch,)).install(monkeypatch).fail_at(
        "listdir scratch/snapshots", errno.ESTALE
    )
    with pytest.raises(StoreError, match=r"cannot read .*/snapshots: "):
        newest_valid(job.scratch, "any job", [])


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize(
    ("read", "name"),
    [
        (read_record, "ATTEMPT"),
        (history, INCIDENTS_FILE),
    ],
)
def test_what_cannot_be_read_is_not_taken_for_missing(read, name, code, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    read(scratch)  # nothing there: nothing known
    (scratch / name).write_text("")
    mode = "rb" if name != INCIDENTS_FILE else "r"
    FaultyDisk((scratch,)).install(monkeypatch).fail_at(f"open scratch/{name} {mode}", code)

    with pytest.raises(StoreError, match=f"cannot read {scratch / name}"):
        read(scratch)


@pytest.fixture
def followed(tmp_path):
    """Return a journal of one step, which nobody has read yet."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    Journal(scratch / "journal.jsonl").append(step_metrics(1))
    return scratch / "journal.jsonl"


def break_reading(journal: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the next look at it."""
    disk = FaultyDisk((journal.parent,)).install(monkeypatch)
    disk.fail_at(f"open scratch/{journal.name} rb", code)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
def test_who_follows_a_journal_reads_later_what_the_disk_does_not_give_now(
    code, followed, monkeypatch
):
    tail = Tail(followed)
    break_reading(followed, code, monkeypatch)

    assert (list(tail.lines()), tail.patience.is_behind) == ([], True)
    assert (len(list(tail.lines())), tail.patience.is_behind) == (1, False)


def test_a_journal_that_cannot_be_read_for_long_is_told(followed, monkeypatch):
    tail = Tail(followed, patience_s=0.2)
    with monkeypatch.context() as broken:
        break_reading(followed, errno.EIO, broken)
        assert list(tail.lines()) == []
        time.sleep(0.2)
        break_reading(followed, errno.EIO, broken)
        with pytest.raises(StoreAwayError, match="has failed"):
            list(tail.lines())

    assert len(list(tail.lines())) == 1
    break_reading(followed, errno.EIO, monkeypatch)
    assert list(tail.lines()) == [], "patience begins anew after a look that worked"


def test_a_journal_that_may_not_be_read_is_told_at_once(followed, monkeypatch):
    break_reading(followed, errno.EACCES, monkeypatch)

    with pytest.raises(StoreError, match="permission denied"):
        list(Tail(followed).lines())


def test_an_input_that_is_missing_is_told_as_that_and_one_out_of_reach_as_the_stores(
    make_job, tmp_path, monkeypatch
):
    lost = make_job("lost").model_copy(update={"data": tmp_path / "nowhere"})
    with pytest.raises(ArtifactError, match="cannot be read"):
        train(lost)

    away = make_job("away")
    disk = FaultyDisk((away.base,)).install(monkeypatch)
    disk.fail_at(numberless(f"open {away.base.name}/model/config.json"), errno.ESTALE)
    with pytest.raises(StoreError, match=f"cannot read {away.base}: .*lost track"):
        train(away)


@pytest.mark.parametrize(
    ("behind", "told"),
    [
        (OSError(errno.ESTALE, "stale"), StoreError),
        (OSError(errno.ENOENT, "gone"), ArtifactError),
        (ValueError("no JSON"), ArtifactError),
        (RuntimeError("I/O error: Input/output error (os error 5)"), StoreError),
    ],
)
def test_what_is_behind_an_inputs_error_decides_whose_it_is(behind, told):
    def read() -> None:
        try:
            raise behind
        except Exception:
            raise ArtifactError("it cannot be read") from None

    with pytest.raises(told), hiccups_told("/store/base"):
        read()


def test_a_lost_peer_is_not_taken_for_a_lost_disk():
    with pytest.raises(CollectiveError), hiccups_told("/store/base"):
        raise CollectiveError("no answer") from TimeoutError(errno.ETIMEDOUT, "timed out")


def blinded(job: TrainJob, folder: Path) -> TrainJob:
    """Return the job as a node sees it that has the inputs, but not the store."""
    return job.model_copy(update={"scratch": folder / "store" / "scratch", "out": folder / "out"})


def test_a_node_without_the_store_is_named_by_all_workers_and_nothing_is_made_there(
    make_job, tmp_path
):
    job, told = make_job(), []
    launch = next_launch(job.scratch)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    here = blinded(job, elsewhere)

    def work(comm: ThreadComm) -> None:
        try:
            run_worker(here if comm.rank else job, comm, EVERY_STEP, launch, CPU)
        except QLoraError as error:
            told.append(error)

    run_on_threads(2, work)

    assert [type(error) for error in told] == [ClusterError, ClusterError]
    assert all(f"is not there on {socket.gethostname()}" in error.what for error in told)
    assert {str(here.scratch), str(job.scratch)} >= {e.what.partition(" is")[0] for e in told}
    assert all("every node must see the same store" in error.why for error in told)
    assert list(elsewhere.iterdir()) == []


def blind_joiner(job: TrainJob, folder: Path, mount) -> tuple[list[QLoraError], str]:
    """Start a second worker, without the store, in a launch that has trained; return what came."""
    launch, told = next_launch(job.scratch), []
    claim(job.scratch, launch, 3)
    folder.mkdir()
    here = blinded(job, folder)

    def work(comm: ThreadComm) -> None:
        try:
            require_store(here if comm.rank else job, comm, launch)
        except QLoraError as error:
            told.append(error)

    mount(here)
    run_on_threads(2, work)
    return told, (job.scratch / NOTES_FILE).read_text()


def test_a_node_that_joins_without_the_store_is_named_and_ray_left_to_try_again(
    make_job, tmp_path, monkeypatch
):
    monkeypatch.setattr(start, "_PAUSE_S", 0.001)
    job = make_job()

    errors, said = blind_joiner(job, tmp_path / "joiner", lambda _: None)

    assert [type(error) for error in errors] == [LaunchError] * 2, "no worker's word is final"
    assert all(f"is not there on {socket.gethostname()}" in error.what for error in errors)
    assert [incident.kind for incident in history(job.scratch)] == ["blind_node"]
    assert f"{job.scratch} is not there on {socket.gethostname()}" in said


def test_a_node_whose_mount_comes_a_little_later_only_delays_training(
    make_job, tmp_path, monkeypatch
):
    monkeypatch.setattr(start, "_PAUSE_S", 0.2)

    def mount_later(here: TrainJob) -> None:
        threading.Timer(0.3, lambda: here.scratch.mkdir(parents=True)).start()

    errors, said = blind_joiner(make_job(), tmp_path / "joiner", mount_later)

    assert errors == []
    assert "Waiting" in said


def test_a_count_of_kills_is_no_reason_to_make_the_store(tmp_path):
    with pytest.raises(StoreError):
        killed_since_last_start(tmp_path / "store" / "scratch", "0001")

    assert list(tmp_path.iterdir()) == []
