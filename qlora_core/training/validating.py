"""Measure snapshots beside the training that writes them: the same rows and sum as training's own.

Training measures the held-out loss itself at steps that the recipe names, and stands still
meanwhile. A snapshot has all that is needed to do it elsewhere: whoever has the base loads its
adapter, and gets to the bit what one worker would have measured after that step. Snapshots come
by the clock, so what is measured of them is told to trackers, and is no part of the result.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_core.data.prepared import read_split
from qlora_core.errors import ModelError, StoreError, storing
from qlora_core.modeling.hosted import BasePlace, load_hosted
from qlora_core.modeling.loading import load_base
from qlora_core.modeling.lora import attach_adapter
from qlora_core.modeling.sharding import ShardedBase
from qlora_core.ports import TrainJob
from qlora_core.training import snapshot
from qlora_core.training.comm import Alone
from qlora_core.training.desk import job_fingerprint
from qlora_core.training.journal import Validation
from qlora_core.training.loop import measure_heldout
from qlora_core.training.placing import place_judged_base
from qlora_core.training.worker import assemble, fast_paths

Validator = Callable[[Path], Validation]


@contextmanager
def open_validator(
    job: TrainJob, device: torch.device, *, offloads_base: bool = False
) -> Iterator[Validator]:
    """Load the base once; yield what measures a snapshot's folder.

    A 4-bit base that does not fit on a GPU stays with its host (`modeling.hosted`); the first
    `Validation` says so.

    Args:
        job: That writes the snapshots.
        device: Where to measure.
        offloads_base: The base stays with the GPU's host in any case.

    Raises:
        ResourceError: There is no room for the base.
    """
    rows = read_split(job.data, "train"), read_split(job.data, "heldout")
    place = place_judged_base(job, rows[0], device, wants_host=offloads_base)
    notes = [f"Beside training {note}." for note in place.notes]
    loaded, base = _load(job, place, device, notes)
    model = attach_adapter(loaded, job.adapter, job.seed)
    run = assemble(job, model, rows, Alone(), device, [], base=base)
    with fast_paths(run) as fast:

        def validate(folder: Path) -> Validation:
            step = snapshot.step_of(folder)
            try:
                tensors = _verified(folder, job)
            except (ModelError, StoreError) as error:  # the next one may be measured
                return Validation(step=step, note=f"Snapshot {folder.name}: {error.what}")
            with torch.no_grad():
                for name, parameter in fast.parameters.items():
                    parameter.copy_(tensors[name])
            note = " ".join(notes)
            notes.clear()
            return Validation(step=step, heldout_loss=measure_heldout(fast), note=note)

        yield validate


def _verified(folder: Path, job: TrainJob) -> dict[str, Tensor]:
    """Return the adapter in a snapshot.

    Raises:
        ModelError: It is damaged.
        StoreError: It cannot be read, or was cleared away meanwhile.
    """
    if found := snapshot.damage(folder, job_fingerprint(job)):
        raise ModelError(f"{found}.")
    with storing(folder, "read"):
        return snapshot.load_adapter(folder)


def _load(
    job: TrainJob, place: BasePlace, device: torch.device, notes: list[str]
) -> tuple[PreTrainedModel, ShardedBase | None]:
    if place.is_hosted:
        return load_hosted(job.base, device, notes)
    return load_base(job.base, device), None
