"""What goes wrong is told apart, counted and kept."""

import threading
from pathlib import Path

import pytest
import torch

from qlora_core.artifacts import Incident
from qlora_core.config import SnapshotConfig
from qlora_core.errors import ResourceError
from qlora_core.training import killed
from qlora_core.training.attempt import claim, next_launch
from qlora_core.training.comm import Alone
from qlora_core.training.desk import SUMMARY_FILE
from qlora_core.training.incidents import INCIDENTS_FILE, count, history, note
from qlora_core.training.journal import NOTES_FILE
from qlora_core.training.killed import killed_since_last_start
from qlora_core.training.lookout import Lookout
from qlora_core.training.objective import LossFunction
from qlora_core.training.snapshot import FOLDER, load, snapshots_in
from qlora_core.training.start import agree_on_halvings
from qlora_core.training.worker import run_worker
from tests.training.fakes import run_on_threads

RARELY = SnapshotConfig(every_s=1e9, keep=10)
CPU = torch.device("cpu")
LOST = Incident(kind="lost_driver", what="It is gone.", remedy="Another one.", step=3)


def facts(job):
    from qlora_core.artifacts import AdapterCheckpoint

    return AdapterCheckpoint.model_validate_json((job.scratch / SUMMARY_FILE).read_bytes())


def test_the_history_outlasts_a_line_that_was_cut_off(tmp_path):
    note(tmp_path, LOST)
    with (tmp_path / INCIDENTS_FILE).open("a") as file:
        file.write('\n{"kind": "sto')  # a process dies while it writes

    note(tmp_path, LOST.model_copy(update={"step": 4}))

    assert [incident.step for incident in history(tmp_path)] == [3, 4]
    assert count(tmp_path, "lost_driver") == 2
    assert count(tmp_path, "lost_driver", step=4) == 1
    assert count(tmp_path, "storage") == 0


def test_a_worker_that_is_lost_without_a_word_is_in_the_facts(make_job):
    job = make_job()
    launch = next_launch(job.scratch)
    claim(job.scratch, launch, 0)  # an attempt that says nothing more

    run_worker(job, Alone(), RARELY, launch, CPU)

    (incident,) = facts(job).incidents
    assert (incident.kind, incident.step) == ("lost_worker", 0)
    assert any("Lost worker" in sentence for sentence in facts(job).notes)


def test_a_loss_that_was_explained_is_not_told_twice(make_job):
    job = make_job()
    launch = next_launch(job.scratch)
    claim(job.scratch, launch, 0)
    note(job.scratch, Incident(kind="collective", what="No answer.", remedy="New workers."))

    run_worker(job, Alone(), RARELY, launch, CPU)

    assert [incident.kind for incident in facts(job).incidents] == ["collective"]


def test_another_number_of_workers_is_told_as_such(make_job):
    job = make_job()
    launch = next_launch(job.scratch)
    claim(job.scratch, launch, 0, num_workers=3)

    run_worker(job, Alone(), RARELY, launch, CPU)

    (incident,) = facts(job).incidents
    assert incident.kind == "resized"
    assert "1 workers where there were 3" in incident.what


def test_a_worker_killed_for_memory_comes_back_with_half_the_rows_and_the_same_losses(make_job):
    whole, smaller = make_job("whole"), make_job("smaller")
    expected, found = [], []
    run_worker(whole, Alone(), RARELY, next_launch(whole.scratch), CPU, expected.append)
    note(smaller.scratch, Incident(kind="out_of_memory", what="Killed.", remedy="Half the rows."))

    run_worker(smaller, Alone(), RARELY, next_launch(smaller.scratch), CPU, found.append)

    assert facts(smaller).num_rows_per_pass == facts(whole).num_rows_per_pass // 2
    torch.testing.assert_close(
        torch.tensor([step.loss for step in found]),
        torch.tensor([step.loss for step in expected]),
        rtol=1e-5,
        atol=0,
    )


def test_a_pass_halved_by_another_worker_is_told_at_once_and_halves_nothing_later(
    make_job, monkeypatch
):
    """Worker 1 is short of memory for a while, and worker 0 never is."""
    job, real, is_short = make_job(micro_batch=4), LossFunction.batch, True
    notes_after: list[str] = []

    def batch(self, rows, chunk, device):
        nonlocal is_short
        if is_short and len(chunk) > 2 and threading.current_thread().name == "worker 1":
            is_short = False
            raise torch.OutOfMemoryError("no memory left, says the test")
        return real(self, rows, chunk, device)

    def work(comm) -> None:
        threading.current_thread().name = f"worker {comm.rank}"

        def hear(_) -> None:
            notes_after.append((job.scratch / NOTES_FILE).read_text())

        run_worker(job, comm, RARELY, "0001", CPU, hear)

    monkeypatch.setattr(LossFunction, "batch", batch)
    run_on_threads(2, work)

    (incident,) = facts(job).incidents
    assert (incident.kind, incident.launch) == ("halved", "0001")
    assert "Worker 1: A pass of" in incident.what
    assert "Worker 1: A pass of" in notes_after[0], "and not at the end alone"
    assert sum("ran out of memory" in note for note in facts(job).notes) == 1
    assert agree(job, "0002")[0] == 0, "the next start has as much room as the first"


def test_a_worker_lost_after_a_pass_was_halved_is_told_all_the_same(make_job):
    job = make_job()
    launch = next_launch(job.scratch)
    claim(job.scratch, launch, 0)
    note(job.scratch, Incident(kind="halved", what="A pass of 4 rows.", remedy="2 rows."))

    run_worker(job, Alone(), RARELY, launch, CPU)

    assert [incident.kind for incident in facts(job).incidents] == ["halved", "lost_worker"]


class Kernel:
    """Counts whom it has killed, as Linux does: in files below folders of ours."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._proc, self._cgroups = folder / "proc", folder / "cgroup"
        (self._proc / "self").mkdir(parents=True)
        (self._cgroups / "user.slice/session-3.scope").mkdir(parents=True)
        self.lives_in("0::/")
        monkeypatch.setattr(killed, "PROC", self._proc)
        monkeypatch.setattr(killed, "CGROUPS", self._cgroups)

    def lives_in(self, stated: str) -> None:
        (self._proc / "self/cgroup").write_text(f"1:cpu:/elsewhere\n{stated}\n")

    def counts(self, *, machine: int, container: int | None = None, own: int | None = None) -> None:
        (self._proc / "vmstat").write_text(f"pgfault 12\noom_kill {machine}\n")
        for folder, num_killed in (("", container), ("user.slice/session-3.scope", own)):
            if num_killed is not None:
                text = f"low 0\noom {num_killed + 1}\noom_kill {num_killed}\n"
                (self._cgroups / folder / "memory.events").write_text(text)


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    return Kernel(tmp_path / "kernel", monkeypatch)


@pytest.fixture
def start(tmp_path):
    """Start a worker; return whose count has grown since it last started."""
    (tmp_path / "scratch").mkdir()
    return lambda launch="0001": killed_since_last_start(tmp_path / "scratch", launch)


def test_the_kernels_kills_count_from_the_last_start_of_the_same_launch(kernel, start):
    kernel.counts(machine=7)
    assert start() is None, "whatever happened before"
    assert start() is None
    kernel.counts(machine=8)
    assert start() == "machine"
    assert start() is None
    kernel.counts(machine=9)
    assert start("0002") is None, "hours may lie between two launches"


def test_a_container_counts_its_own_kills_and_not_the_machines(kernel, start):
    kernel.counts(machine=7, container=2)
    start()
    kernel.counts(machine=8, container=2)
    assert start() is None
    kernel.counts(machine=9, container=3)
    assert start() == "container"


def test_the_own_control_group_goes_before_that_of_all_of_the_container(kernel, start):
    kernel.lives_in("0::/user.slice/session-3.scope")
    kernel.counts(machine=7, container=2, own=1)
    start()
    kernel.counts(machine=8, container=3, own=1)
    assert start() is None
    kernel.counts(machine=9, container=4, own=2)
    assert start() == "container"


def test_where_another_group_counts_than_before_nothing_is_compared(kernel, start):
    kernel.counts(machine=1)
    start()
    kernel.counts(machine=1, container=8)

    assert start() is None


def agree(job, launch: str) -> tuple[int, str]:
    """Start once more; return the halvings, and what a person is told."""
    notes: list[str] = []
    return agree_on_halvings(job, Alone(), launch, notes), " ".join(notes)


@pytest.mark.parametrize("whose", ["machine", "container"])
def test_each_kill_halves_the_rows_of_a_pass_until_there_is_one(whose, kernel, make_job):
    job, rows = make_job(micro_batch=4), []
    launch = next_launch(job.scratch)
    for num_killed in range(4):
        kernel.counts(machine=num_killed, container=num_killed if whose == "container" else None)
        rows.append(4 >> agree(job, launch)[0])

    assert rows == [4, 2, 1, 1]


def test_whom_the_machine_kills_never_ends_a_run_with_passes_of_one_row(kernel, make_job):
    job = make_job(micro_batch=1)
    launch = next_launch(job.scratch)
    for num_killed in range(5):
        kernel.counts(machine=num_killed)
        run_worker(job, Alone(), RARELY, launch, CPU)

    found = facts(job)
    assert [incident.kind for incident in found.incidents] == ["killed_nearby"] * 4
    assert found.num_rows_per_pass == 1
    assert "maybe another's. Passes have one row already" in " ".join(found.notes)


def test_what_the_container_kills_with_one_row_ends_a_run_the_second_time(kernel, make_job):
    job = make_job(micro_batch=1)
    launch = next_launch(job.scratch)
    kernel.counts(machine=9, container=0)
    agree(job, launch)
    kernel.counts(machine=9, container=1)
    num_halvings, told = agree(job, launch)
    kernel.counts(machine=9, container=2)

    with pytest.raises(ResourceError, match="a single row") as caught:
        agree(job, launch)

    assert (num_halvings, "going on as it is" in told) == (0, True)
    assert "came back" in caught.value.why
    assert "dataset.max_length" in caught.value.fix


@pytest.mark.parametrize(
    ("num_workers", "kind", "is_own"),
    [
        (1, None, True),
        (1, "collective", True),
        (1, "killed_nearby", True),
        (1, "lost_gpu", False),
        (2, None, False),
    ],
)
def test_a_kill_in_the_container_is_a_workers_if_one_was_lost_without_a_word(
    num_workers, kind, is_own, kernel, make_job
):
    job = make_job(micro_batch=1)
    launch = next_launch(job.scratch)
    kernel.counts(machine=0, container=0)
    agree(job, launch)
    claim(job.scratch, launch, 0, num_workers)
    if kind:
        note(job.scratch, Incident(kind=kind, what="It says so.", remedy="New workers."))
    kernel.counts(machine=0, container=1)

    agree(job, launch)

    assert count(job.scratch, "out_of_memory") == int(is_own)
    assert history(job.scratch)[-1].kind == ("out_of_memory" if is_own else "killed_nearby")


def test_a_run_that_ended_so_may_be_tried_again_with_more_memory(kernel, make_job):
    job = make_job(micro_batch=1)
    for num_killed in range(2):
        kernel.counts(machine=0, container=num_killed)
        agree(job, "0001")
    kernel.counts(machine=0, container=2)
    with pytest.raises(ResourceError):
        agree(job, "0001")

    assert agree(job, "0002") == (0, "")


def test_kills_that_ray_told_the_launcher_of_end_the_call_they_happened_in(kernel, make_job):
    kernel.counts(machine=0)
    job = make_job(micro_batch=1)
    by_ray = Incident(kind="out_of_memory", what="Ray killed a worker.", remedy="Smaller.")
    note(job.scratch, by_ray.model_copy(update={"launch": "0001"}))
    assert agree(job, "0002") == (0, "")
    kernel.counts(machine=1)
    assert "maybe another's" in agree(job, "0002")[1]
    note(job.scratch, by_ray.model_copy(update={"launch": "0002"}))

    with pytest.raises(ResourceError, match="a single row"):
        agree(job, "0003")
    assert agree(job, "0004") == (0, ""), "the next call, perhaps with more memory"


def test_a_node_that_is_taken_later_is_asked_for_until_it_is_soon():
    left_s = iter([None, 3600.0, 3500.0, 250.0])
    lookout = Lookout(lambda: next(left_s), every_s=0.0)

    urgent = []
    while lookout.calls():
        urgent.append(lookout.is_urgent())

    assert urgent == [False, True, False, True]


def test_an_announced_preemption_saves_at_once_on_all_workers(make_job):
    job = make_job()
    launch = next_launch(job.scratch)
    asked: list[int] = []

    def work(comm) -> None:
        def ask() -> float | None:
            asked.append(comm.rank)
            return 60.0 if asked.count(comm.rank) == 2 else None  # announced after the second step

        run_worker(job, comm, RARELY, launch, CPU, lookout=Lookout(ask, every_s=0.0))

    run_on_threads(2, work)

    saved = [load(folder).position.step for folder in snapshots_in(job.scratch / FOLDER)]
    assert saved[-1] == 2, "at once"
    assert saved[0] == 6
    (incident,) = facts(job).incidents
    assert (incident.kind, incident.step) == ("preemption", 2)
    assert asked.count(0) == asked.count(1), "an answer that all must give together"
