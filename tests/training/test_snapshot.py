import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from math import ceil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_core.config import SnapshotConfig
from qlora_core.errors import LaunchError, StoreError
from qlora_core.modeling.loading import load_saved_config
from qlora_core.modeling.memory import USABLE
from qlora_core.modeling.shape import shape_of
from qlora_core.ports import StepMetrics, TrainJob
from qlora_core.training import snapshot, worker
from qlora_core.training.attempt import claim, next_launch, read_record
from qlora_core.training.comm import Alone
from qlora_core.training.desk import SUMMARY_FILE, job_fingerprint
from qlora_core.training.journal import JOURNAL_FILE, read_curve, read_journal
from qlora_core.training.room import Demand, Passes, find_room
from qlora_core.training.snapshot import (
    FOLDER,
    SnapshotWriter,
    damage,
    load,
    newest_valid,
    passes_of_newest,
    snapshots_in,
)
from qlora_core.training.worker import run_worker
from tests.training.fakes import run_on_threads

OFTEN = SnapshotConfig(every_steps=2, keep=2)


class Killed(BaseException):
    """Stands for SIGKILL."""


def run(job: TrainJob, kill_after: int | None = None, snapshots: SnapshotConfig = OFTEN):
    """Train in this process and return the steps told; optionally stop dead after a step."""
    told: list[StepMetrics] = []

    def on_step(metrics: StepMetrics) -> None:
        told.append(metrics)
        if metrics.step == kill_after:
            raise Killed

    try:
        launch = next_launch(job.scratch)
        run_worker(job, Alone(), snapshots, launch, torch.device("cpu"), on_step)
    except Killed:
        assert kill_after is not None
    return told


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def facts(job: TrainJob) -> dict:
    return json.loads((job.scratch / SUMMARY_FILE).read_text())


@pytest.mark.parametrize("kill_after", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_killed_training_ends_with_the_same_bytes(kill_after, optimizer, make_job):
    settings = {"dropout": 0.3, "optimizer": optimizer, "rank": 64}  # 4096 numbers, so 8 bits
    whole, broken = make_job("whole", **settings), make_job("broken", **settings)
    run(whole)

    run(broken, kill_after=kill_after)
    told = run(broken)

    assert files(broken.out) == files(whole.out)
    assert [step.step for step in told] == [1, 2, 3, 4, 5, 6]
    assert [s.step for s in read_journal(broken.scratch / JOURNAL_FILE)] == [1, 2, 3, 4, 5, 6]
    resumed_at = kill_after // 2 * 2
    assert facts(broken)["num_attempts"] == 2
    assert facts(broken)["resumed_at"] == [resumed_at]


def test_early_stopping_goes_on_where_it_was(make_job):
    settings = {"epochs": 40, "learning_rate": 0.3, "heldout_every": 1, "early_stopping": 3}
    whole, broken = make_job("whole", **settings), make_job("broken", **settings)
    num_steps = len(run(whole))
    best = facts(whole)["num_steps"]

    for kill_after in range(2, num_steps, 2):
        run(broken, kill_after=kill_after)
    run(broken)

    assert facts(whole)["stopped_early"]
    assert best < num_steps
    assert files(broken.out) == files(whole.out)
    assert facts(broken)["heldout_loss"] == read_curve(whole.out)[best - 1].heldout_loss


def test_the_same_job_leaves_the_same_bytes_and_no_timings(make_job):
    first, second = make_job("first"), make_job("second")
    run(first)
    run(second)

    assert files(first.out) == files(second.out)
    assert set(files(first.out)) == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "curve.jsonl",
    }


def test_only_the_newest_snapshots_are_kept(make_job):
    job = make_job()
    run(job, snapshots=SnapshotConfig(every_steps=1, keep=3))

    steps = [folder.name.partition("-")[0] for folder in snapshots_in(job.scratch / FOLDER)]

    assert steps == ["step_00000006", "step_00000005", "step_00000004"]


def test_a_snapshot_is_taken_when_the_time_has_come(make_job):
    job = make_job()
    run(job, kill_after=4, snapshots=SnapshotConfig(every_s=1e-6))

    assert snapshots_in(job.scratch / FOLDER)[0].name.startswith("step_00000004")


def test_after_a_notice_it_is_always_time_unless_saving_takes_longer_than_training(make_job):
    job = make_job()
    attempt = claim(job.scratch, "0001", 0, 1)
    writer = SnapshotWriter(job.scratch, SnapshotConfig(every_s=1e9), attempt, "job")

    before = writer.is_due(1)
    writer.hurry()
    after = writer.is_due(1)
    writer._took_s = 60.0
    slow = writer.is_due(1)

    assert (before, after, slow) == (False, True, False)


def with_memory_for(monkeypatch, num_rows: int) -> None:
    """Let workers find the memory for passes of so many of a micro-batch's 8 rows."""

    def found(demand, _):
        at = replace(demand, before=None)  # whatever was before: memory is what is there
        needs = at.estimate(at.workload(num_rows, "nothing")).total
        return find_room(demand, ceil(needs / USABLE) + 1)

    monkeypatch.setattr(worker, "find_room", found)


def test_a_training_goes_on_with_passes_as_they_were_though_there_is_more_memory_now(
    make_job, monkeypatch
):
    whole, broken = (make_job(name, micro_batch=8) for name in ("whole", "broken"))
    with_memory_for(monkeypatch, 2)
    run(whole)
    run(broken, kill_after=3)
    with_memory_for(monkeypatch, 8)

    run(broken)

    assert files(broken.out) == files(whole.out)
    assert facts(broken)["num_rows_per_pass"] == 2
    assert "as before the interruption" in " ".join(facts(broken)["notes"])


def test_another_number_of_workers_makes_its_own_passes(make_job, monkeypatch):
    job = make_job(micro_batch=8)
    with_memory_for(monkeypatch, 2)
    run(job, kill_after=3)
    with_memory_for(monkeypatch, 8)
    launch = next_launch(job.scratch)

    run_on_threads(2, lambda comm: run_worker(job, comm, OFTEN, launch, torch.device("cpu")))

    assert facts(job)["resumed_at"] == [2]
    assert facts(job)["num_rows_per_pass"] == 8


def test_a_snapshot_of_a_version_that_did_not_keep_passes_is_gone_on_from(make_job):
    job = make_job()
    run(job, kill_after=3)
    folder = snapshots_in(job.scratch / FOLDER)[0]
    state = json.loads((folder / "state.json").read_text())
    del state["passes"]
    (folder / "state.json").write_text(json.dumps(state))

    assert passes_of_newest(job.scratch, job_fingerprint(job)) == ()
    assert load(folder).position.step == 2


@pytest.mark.parametrize(
    ("num_rows", "memory_for", "expected"),
    [
        (2, (8, "nothing"), (2, "layers")),  # all fits, but it was so before
        (2, (2, "layers"), (2, "layers")),
        (2, (1, "layers"), (1, "layers")),  # no longer fits
    ],
)
def test_passes_are_as_before_where_they_fit(num_rows, memory_for, expected, make_job):
    job = make_job(micro_batch=8)
    demand = Demand(
        shape=shape_of(load_saved_config(job.base), job.quantization, job.adapter),
        quantization=job.quantization,
        adapter=job.adapter,
        training=job.training,
        device="cpu",
        compute_dtype="float32",
        max_length=2000,
    )
    memory_bytes = ceil(demand.estimate(demand.workload(*memory_for)).total / USABLE) + 1

    room = find_room(
        replace(demand, before=Passes(num_rows=num_rows, recompute="layers")), memory_bytes
    )

    assert (room.num_rows, room.recompute) == expected
    assert room.is_as_before is (expected == (num_rows, "layers"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: list[Callable[[Path], None]] = [truncate, flip_a_bit, empty, Path.unlink]
FILES = [
    "adapter.safetensors",
    "optimizer.safetensors",
    "best.safetensors",
    "journal.jsonl",
    "state.json",
    "MANIFEST.json",
]


@pytest.fixture(scope="module")
def two_snapshots(tmp_path_factory, nf4_base, dataset):
    """A job killed after step 5, with snapshots of steps 2 and 4."""
    from qlora_core.config import AdapterConfig, QuantizationConfig, TrainingConfig
    from tests.training.conftest import SMALL

    folder = tmp_path_factory.mktemp("killed")
    job = TrainJob(
        base=nf4_base,
        data=dataset,
        out=folder / "out",
        scratch=folder / "scratch",
        quantization=QuantizationConfig(),
        adapter=AdapterConfig(rank=4),
        training=TrainingConfig(**SMALL),
        seed=3,
    )
    run(job, kill_after=5)
    return job


@pytest.mark.parametrize("harm", DAMAGES, ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_snapshot_is_set_aside_aloud_for_the_one_before(
    name, harm, two_snapshots, tmp_path
):
    scratch = Path(shutil.copytree(two_snapshots.scratch, tmp_path / "scratch"))
    newest, before = snapshots_in(scratch / FOLDER)
    notes: list[str] = []

    harm(newest / name)
    found = newest_valid(scratch, job_fingerprint(two_snapshots), notes)

    assert found == before
    assert load(before).position.step == 2
    assert len(notes) == 1
    assert newest.name in notes[0]
    assert not newest.exists()


def test_training_goes_on_from_the_snapshot_before_a_damaged_one(make_job):
    whole, broken = make_job("whole"), make_job("broken")
    run(whole)
    run(broken, kill_after=5)
    flip_a_bit(snapshots_in(broken.scratch / FOLDER)[0] / "optimizer.safetensors")

    run(broken)

    assert files(broken.out) == files(whole.out)
    assert facts(broken)["resumed_at"] == [2]
    assert "optimizer.safetensors is damaged" in " ".join(facts(broken)["notes"])


def test_without_a_valid_snapshot_training_starts_anew(make_job):
    whole, broken = make_job("whole"), make_job("broken")
    run(whole)
    run(broken, kill_after=3)
    for folder in snapshots_in(broken.scratch / FOLDER):
        (folder / "MANIFEST.json").unlink()

    run(broken)

    assert files(broken.out) == files(whole.out)


def test_a_half_written_snapshot_is_never_seen(make_job):
    job = make_job()
    run(job, kill_after=3)
    torso = job.scratch / FOLDER / ".step_00000004-0001.1.tmp"
    torso.mkdir()
    (torso / "adapter.safetensors").write_bytes(b"half")

    run(job)

    assert facts(job)["resumed_at"] == [2]
    assert not torso.exists()


def test_what_a_killed_save_left_makes_room_before_the_next_one(tmp_path):
    folder = tmp_path / FOLDER
    claim(tmp_path, "0001", 0)
    for token in ("0001.1", "0003.1"):
        (folder / f".step_00000004-{token}.tmp").mkdir(parents=True)

    SnapshotWriter(tmp_path, SnapshotConfig(), claim(tmp_path, "0002", 0), "job")

    assert [left.name for left in folder.iterdir()] == [".step_00000004-0003.1.tmp"]


def test_a_snapshot_of_another_job_is_not_used(make_job):
    job = make_job()
    run(job, kill_after=3)
    folder = snapshots_in(job.scratch / FOLDER)[0]

    problem = damage(folder, job_fingerprint(make_job("other", learning_rate=0.5)))

    assert "another job" in problem


@pytest.mark.parametrize(("true", "false"), [('"step": 2', '"step": 6'), ("0001.1", "0000.1")])
def test_a_snapshot_whose_manifest_says_another_step_or_attempt_is_damaged(true, false, make_job):
    job = make_job()
    run(job, kill_after=3)
    folder = snapshots_in(job.scratch / FOLDER)[0]
    manifest = folder / "MANIFEST.json"
    manifest.write_text(manifest.read_text().replace(true, false))

    assert "MANIFEST.json is damaged" in damage(folder, job_fingerprint(job))


def test_a_stale_attempt_stops_before_it_writes(make_job):
    job = make_job()
    launch = next_launch(job.scratch)

    def overtaken(metrics: StepMetrics) -> None:
        if metrics.step == 3:
            next_launch(job.scratch)

    with pytest.raises(LaunchError, match="stale"):
        run_worker(job, Alone(), OFTEN, launch, torch.device("cpu"), overtaken)

    assert [f.name for f in snapshots_in(job.scratch / FOLDER)] == ["step_00000002-0001.1"]
    assert list(job.out.iterdir()) == []


def saved(job: TrainJob):
    """Return what the newest snapshot of a killed training holds, and the name of its job."""
    return load(snapshots_in(job.scratch / FOLDER)[0]), job_fingerprint(job)


def at_step(state, step: int):
    return replace(state, position=replace(state.position, step=step))


@pytest.mark.parametrize("wakes_in", ["sync", "_clear", "snapshots_in"])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_stale_attempt_that_wakes_up_while_it_clears_spares_what_its_successor_wrote(
    wakes_in, keep, two_snapshots, tmp_path, monkeypatch
):
    state, job = saved(two_snapshots)
    config = SnapshotConfig(every_steps=1, keep=keep)
    old = SnapshotWriter(tmp_path, config, claim(tmp_path, "0001", 0), job)
    root, real, slept = tmp_path / FOLDER, getattr(snapshot, wakes_in, None), []

    def successor() -> None:
        """All of it while the old attempt sleeps: one snapshot is whole, the next half-written."""
        slept.append(True)
        new = SnapshotWriter(tmp_path, config, claim(tmp_path, "0001", 15), job)
        new.save(at_step(state, 30))
        (root / ".step_00000031-0001.2.tmp").mkdir()

    def sleeps_first(*given):
        if not slept and (root / "step_00000015-0001.1").exists():
            successor()
        return real(*given)

    if wakes_in == "_clear":
        real = SnapshotWriter._clear
        monkeypatch.setattr(SnapshotWriter, "_clear", sleeps_first)
    else:
        monkeypatch.setattr(snapshot, wakes_in, sleeps_first)
    with suppress(LaunchError):  # it hears of it, unless it had asked just before
        old.save(at_step(state, 15))

    assert slept
    assert (root / ".step_00000031-0001.2.tmp").exists()
    assert newest_valid(tmp_path, job, []) == root / "step_00000030-0001.2"


def test_an_attempt_clears_away_what_earlier_ones_have_left(two_snapshots, tmp_path):
    state, job = saved(two_snapshots)
    config = SnapshotConfig(every_steps=1, keep=1)
    old = SnapshotWriter(tmp_path, config, claim(tmp_path, "0001", 0), job)
    old.save(at_step(state, 9))
    (tmp_path / FOLDER / ".step_00000010-0001.1.tmp").mkdir()
    starts = [claim(tmp_path, "0001", 9) for _ in range(9)]  # the tenth is no text before the first

    SnapshotWriter(tmp_path, config, starts[-1], job).save(at_step(state, 10))

    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["step_00000010-0001.10"]


def test_an_older_launch_cannot_claim_the_folder_again(tmp_path):
    older, newer = next_launch(tmp_path), next_launch(tmp_path)

    first, second = claim(tmp_path, newer, 0), claim(tmp_path, newer, 10)

    assert (first.token, second.token) == ("0002.1", "0002.2")
    assert read_record(tmp_path).started_after == (0, 10)
    with pytest.raises(LaunchError, match="launch 0001 is stale"):
        claim(tmp_path, older, 10)
    with pytest.raises(LaunchError, match=r"attempt 0002\.1 is stale"):
        first.require_current()


def test_a_worker_that_was_replaced_while_it_loaded_does_not_fence_its_successor(
    make_job, monkeypatch
):
    job, load = make_job(), worker._prepare

    def slowly(*given):
        claim(job.scratch, "0001", 0)  # by those of the same launch that came after it
        return load(*given)

    monkeypatch.setattr(worker, "_prepare", slowly)
    with pytest.raises(LaunchError, match=r"attempt 0001\.1 has taken over while"):
        run(job)

    assert read_record(job.scratch).token == "0001.1"
    assert not (job.scratch / "journal.jsonl").exists()


def test_no_room_for_a_snapshot_is_a_store_error_and_spares_the_earlier_one(make_job, monkeypatch):
    import os

    job, real_fsync = make_job(), os.fsync

    def full_disk(descriptor: int) -> None:
        if "step_00000004" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(28, "No space left on device")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StoreError, match="the disk is full"):
        run(job)
    monkeypatch.undo()

    assert [f.name for f in (job.scratch / FOLDER).iterdir()] == ["step_00000002-0001.1"]
    assert damage(job.scratch / FOLDER / "step_00000002-0001.1", job_fingerprint(job)) is None


def test_a_snapshot_holds_exact_float32_moments(make_job):
    job = make_job()
    run(job)

    tensors = load_file(snapshots_in(job.scratch / FOLDER)[0] / "optimizer.safetensors")

    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any(name.endswith("exp_avg_sq") for name in tensors)
