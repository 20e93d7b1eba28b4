"""What became of what a run logged, and sending later what could not be sent then."""

from pathlib import Path

from qlora_core.artifacts import Frozen
from qlora_core.backends.journal import EndRecord, Journal, StartRecord
from qlora_core.backends.masking import MASK, mask_credentials
from qlora_core.backends.mlflow_delivery import Delivery
from qlora_core.backends.mlflow_run import Destination, continued, load_destination
from qlora_core.errors import ArtifactError, UserError

BUSY = "another process is sending this journal"


class TrackingReport(Frozen):
    """What became of everything that was logged."""

    run_id: str | None
    folder: Path
    num_waiting: int
    """Entries on the disk that no server has yet."""
    num_refused: int
    """Entries that MLflow will never take."""
    num_lost: int
    """Entries that could not even be written to the disk."""
    reason: str
    """The last thing that went wrong."""

    def is_complete(self) -> bool:
        """Say whether MLflow has everything."""
        return not (self.num_waiting or self.num_refused or self.num_lost)

    def sentence(self) -> str:
        """Return one line for a person; empty when MLflow has everything."""
        parts = []
        if self.num_waiting:
            parts.append(f"{self.num_waiting} tracking entries wait in {self.folder}")
        if self.num_refused:
            parts.append(f"MLflow refused {self.num_refused} tracking entries")
        if self.num_lost:
            parts.append(f"{self.num_lost} tracking entries could not be written")
        return "; ".join(parts) + (f" ({self.reason})" if parts and self.reason else "")


def replay(journal_folder: Path, tracking_uri: str | None = None) -> TrackingReport:
    """Send what an earlier process could not; a run that never ended is ended as `KILLED`.

    Args:
        journal_folder: Of the run.
        tracking_uri: Where to, if not where the run wanted it.

    Raises:
        ArtifactError: There is no journal in that folder.
        UserError: The address needs credentials, which are not kept on the disk.
    """
    delivery = Delivery(Journal(journal_folder), _destination(journal_folder, tracking_uri))
    with delivery.journal.sending() as alone:
        if not alone:
            return report_of(delivery, 0, BUSY)
        reason = ""
        try:
            _end_if_dead(delivery.journal)
            if delivery.num_waiting():
                delivery.deliver()
        except Exception as error:  # any outage: what waits, waits on
            reason = mask_credentials(f"{type(error).__name__}: {error}")[:500]
        return report_of(delivery, 0, reason)


def waiting(root: Path) -> list[Path]:
    """Return the journal folders below ``root`` with entries that no server has yet."""
    folders = sorted(path.parent for path in root.rglob("journal.jsonl"))
    return [folder for folder in folders if Journal(folder).num_waiting() > 0]


def _destination(folder: Path, tracking_uri: str | None) -> Destination:
    kept = load_destination(folder)
    if kept is None:
        raise ArtifactError(
            f"{folder} holds no tracking journal.", fix="Give the journal folder of a run."
        )
    if tracking_uri is not None:
        return continued(folder, kept.model_copy(update={"tracking_uri": tracking_uri}))
    if MASK in kept.tracking_uri:
        raise UserError(
            f"{folder} was tracked at {kept.tracking_uri}, whose password is not kept on the disk.",
            fix="Give the tracking URI again, or use MLFLOW_TRACKING_USERNAME and _PASSWORD.",
        )
    return kept


def _end_if_dead(journal: Journal) -> None:
    records = [entry.record for entry in journal.read().entries]
    turns = [record for record in records if isinstance(record, StartRecord | EndRecord)]
    if turns and isinstance(turns[-1], StartRecord):
        journal.append(EndRecord(status="KILLED"))


def report_of(delivery: Delivery, num_lost: int, reason: str) -> TrackingReport:
    """Return how ``delivery`` stands."""
    num_waiting = delivery.num_waiting()
    trouble = reason if num_waiting or num_lost else ""
    return TrackingReport(
        run_id=delivery.run_id,
        folder=delivery.journal.folder,
        num_waiting=num_waiting,
        num_refused=delivery.num_refused,
        num_lost=num_lost,
        reason=trouble or delivery.refusal,
    )
