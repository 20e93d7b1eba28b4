"""Where a worker on Ray computes: on what was booked for it, not on what it sees.

Ray hides the other GPUs of a node from who has booked some, and since 2.60 none from who has booked
none: all of those would take the same `cuda:0`, while somebody else trains on it. Ray Train goes by
what was booked, too (`ray.train.torch.get_device`).
"""

from typing import TYPE_CHECKING

from qlora_core.errors import ResourceError

if TYPE_CHECKING:
    import torch  # takes seconds, and drivers load this module


def booked_device(gpus: float) -> "torch.device":
    """Return the device of a worker that has booked so many GPUs.

    Raises:
        ResourceError: There is none, and a CPU would take its time unasked.
    """
    import torch

    if not gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ResourceError(
            f"A worker has booked {gpus:g} GPU, and torch sees none where it runs.",
            fix="Install a CUDA build of torch and a driver that fits it there, or start Ray there "
            "with --num-gpus=0; or set cluster.gpus_per_worker=0.",
        )
    return torch.device("cuda")
