"""Ray's trainer, without the process that Ray Train 2.60 leaves on a cluster to clean up after it.

That is a detached actor (`PlacementGroupCleaner`) which asks a Ray each second whether the
trainer's controller lives, and takes the workers' places away if not. It asks the Ray that it
*finds* on its machine: where there are two, maybe the other one, and its watch ends with an error
there, or worse. Where there is no dashboard it is never answered, and complains once a second. In
both cases it outlives a driver that was killed, for ever.

It is not needed here. Places belong to the driver's job, so Ray takes them back when the driver
ends; and ours ends with its controller.
"""

from typing import Any

from ray.train.torch import TorchTrainer

_CLEANER = "PlacementGroupCleanerCallback"


class Trainer(TorchTrainer):  # type: ignore[misc]  # Ray says nothing of its types
    """A `TorchTrainer` that ends with its driver."""

    def _create_default_callbacks(self) -> list[Any]:
        """Leave the cleaner out; a Ray that does not call this has it."""
        callbacks: list[Any] = super()._create_default_callbacks()
        return [one for one in callbacks if type(one).__name__ != _CLEANER]
