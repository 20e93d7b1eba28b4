"""What Ray runs on each worker of an evaluation: load the model once, then answer batch by batch.

Whatever goes wrong is *said*, as plain fields, and not raised: Ray would wrap it, and the driver
has to tell an error of ours, which ends the evaluation, from a lost worker, which does not; nor
does one whose GPU has failed, or that cannot read the store just now.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from qlora_core.artifacts import Frozen
from qlora_core.backends.ray_device import booked_device
from qlora_core.backends.ray_worker import unforeseen
from qlora_core.backends.replies import REPLIES_FILE
from qlora_core.errors import QLoraError, hiccups_told
from qlora_core.ports import AskJob, Batch, Reply


class AskSpec(Frozen):
    """What the launcher tells the driver, and the driver its workers."""

    job: AskJob
    launch: str = ""
    """Of those that run as jobs."""
    log: Path
    """Where driver and workers write what they say."""

    @property
    def replies_file(self) -> Path:
        """Where the driver keeps replies."""
        return self.job.scratch / REPLIES_FILE


class Said(Frozen):
    """What a worker tells the driver: one of these."""

    batches: tuple[Batch, ...] = ()
    reply: Reply | None = None
    error: dict[str, str] | None = None


class Asker:
    """One worker.

    Args:
        spec: An `AskSpec` in JSON.
        num_threads: The cores it owns.
        gpus: That were booked for it.
    """

    def __init__(self, spec: str, num_threads: int, gpus: float) -> None:
        self._spec = AskSpec.model_validate_json(spec)
        self._num_threads, self._gpus = num_threads, gpus
        self._open = ExitStack()

    def prepare(self) -> str:
        """Load the model; say which batches there are."""
        return self._saying(self._prepare)

    def ask(self, batch: str) -> str:
        """Put a batch to the model; say the reply."""
        asked = Batch.model_validate_json(batch)
        return self._saying(lambda: Said(reply=self._interview.reply(asked)))

    def _prepare(self) -> Said:
        import torch

        from qlora_core.evaluation.interview import open_interview

        torch.set_num_threads(self._num_threads)
        device = booked_device(self._gpus)
        self._interview = self._open.enter_context(open_interview(self._spec.job, device))
        return Said(batches=self._interview.batches)

    def _saying(self, act: Callable[[], Said]) -> str:
        from qlora_core.training.device import lost_devices_told

        try:
            with hiccups_told(self._spec.job.model), lost_devices_told():
                said = act()
        except QLoraError as error:
            said = Said(error=error.to_json())
        except Exception as error:
            unknown = unforeseen(error, "A worker in evaluation", self._spec.log, QLoraError)
            said = Said(error=unknown.to_json())
        return said.model_dump_json()
