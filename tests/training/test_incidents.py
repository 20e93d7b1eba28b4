"""What goes wrong is told apart, counted and kept."""

import torch

from qlora_core.artifacts import Incident
from qlora_core.config import SnapshotConfig
from qlora_core.training.attempt import claim, next_launch
from qlora_core.training.comm import Alone
from qlora_core.training.desk import SUMMARY_FILE
from qlora_core.training.incidents import INCIDENTS_FILE, count, history, note
from qlora_core.training.killed import killed_since_last_start
from qlora_core.training.lookout import Lookout
from qlora_core.training.snapshot import FOLDER, load, snapshots_in
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


def test_the_kernels_kills_count_from_the_last_start_of_the_same_launch(tmp_path):
    counter = tmp_path / "vmstat"

    def start(num_killed: int, launch: str = "0001") -> bool:
        counter.write_text(f"pgfault 12\noom_kill {num_killed}\n")
        return killed_since_last_start(tmp_path, launch, 0, (tmp_path / "none", counter))

    assert not start(7), "whatever happened before"
    assert not start(7)
    assert start(8)
    assert not start(8)
    assert not start(9, launch="0002"), "hours may lie between two launches"


def test_an_announced_preemption_saves_at_once_on_all_workers(make_job):
    job = make_job()
    launch = next_launch(job.scratch)
    asked: list[int] = []

    def work(comm) -> None:
        def ask() -> bool:
            asked.append(comm.rank)
            return asked.count(comm.rank) == 2  # announced after the second step

        run_worker(job, comm, RARELY, launch, CPU, lookout=Lookout(ask, every_s=0.0))

    run_on_threads(2, work)

    saved = [load(folder).position.step for folder in snapshots_in(job.scratch / FOLDER)]
    assert saved[-1] == 2, "at once"
    assert saved[0] == 6
    (incident,) = facts(job).incidents
    assert (incident.kind, incident.step) == ("preemption", 2)
    assert asked.count(0) == asked.count(1), "an answer that all must give together"
