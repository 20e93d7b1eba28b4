"""Rank 0's paperwork: the journal, the snapshots, the notes, and in the end the result."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from qlora_core.artifacts import AdapterCheckpoint, Frozen, Incident
from qlora_core.config import SnapshotConfig
from qlora_core.errors import LaunchError, storing
from qlora_core.fingerprint import fingerprint
from qlora_core.modeling.lora import save_adapter
from qlora_core.ports import StepMetrics, TrainJob
from qlora_core.training.attempt import Attempt, AttemptRecord, claim, read_record
from qlora_core.training.durable import replace_durably
from qlora_core.training.incidents import history, note
from qlora_core.training.journal import JOURNAL_FILE, NOTES_FILE, Journal, add_notes, write_curve
from qlora_core.training.loop import Position, Run, keep_best
from qlora_core.training.optimizer import state_of
from qlora_core.training.snapshot import SnapshotWriter, TrainingState

SUMMARY_FILE = "summary.json"
"""The facts of a finished training, in the scratch folder."""
_PREEMPTION = Incident(
    kind="preemption",
    what="A node will be taken away.",
    remedy="Saved at once, and after each step for some minutes.",
)


def job_fingerprint(job: TrainJob) -> str:
    """Return the name of what is trained and how; where it lies does not matter."""
    return fingerprint(
        {"adapter": job.adapter.hashed(), "training": job.training.hashed(), "seed": job.seed}
    )


class LastWord(Frozen):
    """What each worker says at the end: memory and remedies are its own."""

    notes: tuple[str, ...]
    peak_bytes: int
    num_rows: int
    """Of its passes, at most."""


@dataclass
class Desk:
    """Writes down what training does; the only one who writes."""

    run: Run
    job: TrainJob
    journal: Journal
    writer: SnapshotWriter
    attempt: Attempt
    notes: list[str]
    _num_notes_written: int = field(default=0, init=False)
    _num_steps_told: int = field(default=0, init=False)

    def record(self, metrics: StepMetrics, position: Position, *, is_urgent: bool = False) -> None:
        """Note one step; save if it is time to or urgent, and at the end in any case.

        What is urgent once stays so for a while: a node that was announced to be taken away goes
        within minutes, and takes along what was done since the last snapshot.
        """
        self.journal.append(metrics)
        if is_urgent:
            self.writer.hurry()
            _tell(self.job, self.attempt, self.notes, _PREEMPTION, position.step)
        is_end = position.step == self.run.plan.num_steps or position.stopped_early
        if not is_end and not is_urgent and not self.writer.is_due(position.step):
            return
        self.writer.save(
            TrainingState(
                position=position,
                adapter={name: p.detach() for name, p in self.run.parameters.items()},
                optimizer=state_of(self.run.optimizer),
                steps=self.journal.steps,
                passes=(self.run.room.passes, *self.run.passes[1:]),
            )
        )

    def tell(self, on_step: Callable[[StepMetrics], None]) -> None:
        """Write new notes down and hand the steps not yet told to ``on_step``."""
        add_notes(self.job.scratch, self.notes[self._num_notes_written :])
        self._num_notes_written = len(self.notes)
        fresh = self.journal.steps[self._num_steps_told :]
        self._num_steps_told = len(self.journal.steps)
        for step in fresh:
            on_step(step)

    def finish(self, position: Position, words: Sequence[LastWord]) -> None:
        """Leave the result in ``job.out`` and its facts in the scratch folder.

        Args:
            position: The end.
            words: Of all workers, by rank.

        Raises:
            StoreError: There is no room, say.
            LaunchError: A newer attempt has taken over.
        """
        self._note(words)
        self.journal.close()
        self.attempt.require_current()
        kept = keep_best(self.run, position)
        save_adapter(self.run.model, self.job.out, self.job.base_name, None)
        write_curve(self.job.out, self.journal.steps)
        facts = self._facts(position, kept, words)
        replace_durably(self.job.scratch / SUMMARY_FILE, facts.model_dump_json(indent=1).encode())

    def _note(self, words: Sequence[LastWord]) -> None:
        """Take note of what other workers say that rank 0 does not."""
        for rank, word in enumerate(words):
            self.notes += [
                f"Worker {rank}: {note}" for note in word.notes if note not in self.notes
            ]
        self.tell(lambda _: None)

    def _facts(self, position: Position, kept: int, words: Sequence[LastWord]) -> AdapterCheckpoint:
        steps = self.journal.steps
        seconds = sum(step.seconds for step in steps)
        starts = read_record(self.job.scratch).started_after
        path = self.job.scratch / NOTES_FILE
        with storing(path, "read"):
            notes = path.read_text("utf-8").splitlines()
        return AdapterCheckpoint(
            num_trainable_parameters=sum(p.numel() for p in self.run.parameters.values()),
            num_target_layers=sum(bool(getattr(m, "lora_A", ())) for m in self.run.model.modules()),
            num_steps=kept,
            num_steps_run=position.step,
            num_steps_planned=self.run.plan.num_steps,
            num_tokens=position.num_tokens,
            num_supervised_tokens=position.num_supervised_tokens,
            train_loss=_last_tenth(steps),
            heldout_loss=_heldout_at(kept, steps),
            stopped_early=position.stopped_early,
            seconds=position.seconds,
            tokens_per_s=position.num_tokens / seconds,
            supervised_tokens_per_s=position.num_supervised_tokens / seconds,
            peak_memory_bytes=max(word.peak_bytes for word in words),
            predicted_peak_bytes=self.run.room.estimate.total,
            num_rows_per_pass=min(word.num_rows for word in words),
            num_workers=self.run.comm.world_size,
            num_attempts=len(starts),
            resumed_at=starts[1:],
            incidents=history(self.job.scratch),
            notes=tuple(dict.fromkeys(notes)),
        )


def open_desk(
    run: Run,
    job: TrainJob,
    snapshots: SnapshotConfig,
    launch: str,
    after: int,
    steps: Iterable[StepMetrics],
    notes: list[str],
    known: AttemptRecord,
) -> Desk:
    """Claim the scratch folder for this attempt, which goes on after step ``after``.

    Args:
        run: What is trained.
        job: Where it is written.
        snapshots: When it is saved.
        launch: That this attempt is of.
        after: The step it goes on after.
        steps: All up to there.
        notes: What a person should know.
        known: The attempts when this worker started. If there is another by now, this one was cut
            off while it loaded, and has been replaced.

    Raises:
        LaunchError: A newer attempt is already there.
    """
    before, num_workers = read_record(job.scratch), run.comm.world_size
    if before.started_after != known.started_after:
        raise LaunchError(f"attempt {before.token} has taken over while this worker started.")
    attempt = claim(job.scratch, launch, after, num_workers)
    if incident := _why_again(job, before, launch, num_workers):
        _tell(job, attempt, notes, incident, after)
    if after:
        notes.append(f"Training went on after step {after} (attempt {attempt.token}).")
    writer = SnapshotWriter(job.scratch, snapshots, attempt, job_fingerprint(job))
    attempt.require_current()
    journal = Journal(job.scratch / JOURNAL_FILE, steps)
    return Desk(run, job, journal, writer, attempt, notes)


def _why_again(
    job: TrainJob, before: AttemptRecord, launch: str, num_workers: int
) -> Incident | None:
    """Return why workers start again in a launch, if nobody has said so; None if they do not."""
    if before.launch != launch or not before.token:
        return None
    if before.num_workers[-1] != num_workers:
        what = f"There are {num_workers} workers where there were {before.num_workers[-1]}."
        return Incident(kind="resized", what=what, remedy="They share the same steps.")
    since = (past for past in history(job.scratch) if past.unix_time > before.claimed_s)
    if any(past.kind != "halved" for past in since):  # which ends no worker
        return None
    return Incident(
        kind="lost_worker",
        what="A worker or its node was lost.",
        remedy="New workers go on from the last snapshot.",
    )


def _tell(job: TrainJob, attempt: Attempt, notes: list[str], incident: Incident, step: int) -> None:
    """Put an incident into the history, and tell it to the person who watches."""
    told = note(job.scratch, incident.model_copy(update={"step": step, "launch": attempt.token}))
    notes.append(told.sentence())


def _heldout_at(step: int, steps: list[StepMetrics]) -> float:
    measured = steps[step - 1].heldout_loss
    assert measured is not None, "the last step and the best one are measured"  # noqa: S101
    return measured


def _last_tenth(steps: list[StepMetrics]) -> float:
    last = steps[-max(1, len(steps) // 10) :]
    total = sum(step.loss * step.num_supervised_tokens for step in last)
    return total / max(1, sum(step.num_supervised_tokens for step in last))
