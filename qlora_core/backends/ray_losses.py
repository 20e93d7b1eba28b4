"""Tell what a process of Ray's has lost from what it has met.

A worker, a node or Ray Train's controller that is gone may be there again a minute later. Ray Train
replaces workers that it polls, and none of those that it is starting: what is lost then ends all of
it. An error that a process raised by itself is no loss, as it would raise it again: but for what
torch says of a peer that is gone while workers join.
"""

from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    TaskUnschedulableError,
    WorkerCrashedError,
)

_GONE = (
    RayActorError,
    NodeDiedError,
    LocalRayletDiedError,
    WorkerCrashedError,
    ObjectLostError,
    TaskUnschedulableError,  # of a task that belongs on one node
    OutOfMemoryError,
)


def is_loss(error: BaseException) -> bool:
    """Say whether ``error`` tells of a process or node that is gone, or was cut off.

    Args:
        error: What one of Ray's processes met, taken out of what Ray has wrapped it into.
    """
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return False
    return isinstance(error, _GONE) or _is_lost_peer(error)


def _is_lost_peer(error: BaseException) -> bool:
    """Say whether torch's store of names or its network has failed, and not its settings."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "connectFullMesh failed" in str(error)
