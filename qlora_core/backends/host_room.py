"""What workers need of a machine's own memory, where its GPUs do not hold the base.

A 4-bit base that fits on no GPU lies with the host while a model is asked (`modeling.hosted`).
Every worker of a machine keeps a copy of its own there. In training with `cluster.offload_base`
each keeps its part of the base there, and all do so if one of them must (`training.placing`).
"""

from collections.abc import Sequence

from qlora_core.artifacts import Frozen


class HostNeed(Frozen):
    """Memory of the host, for one worker."""

    size_bytes: int
    enough_gpu_bytes: int | None
    """A GPU with so much free holds the base, and needs no host; none: the host is wanted."""
    num_dividing: int | None = None
    """Workers that divide the base, each with a part of so many bytes; more of them would have
    smaller ones. None: each has a copy of its own."""

    def for_all(self, gpus_bytes: Sequence[int]) -> "HostNeed":
        """Return the need once the GPUs of all nodes are known: who divide a base do as the least.

        Args:
            gpus_bytes: Free for a worker, on each node.
        """
        enough = self.enough_gpu_bytes
        if self.num_dividing is None or enough is None or min(gpus_bytes, default=0) >= enough:
            return self
        return self.model_copy(update={"enough_gpu_bytes": None})

    def lacking(
        self, gpu_bytes: int, host_bytes: int, num_workers: int, *, is_free: bool = True
    ) -> str:
        """Say what a machine lacks; nothing if it has room.

        Args:
            gpu_bytes: Free on the GPU of a worker.
            host_bytes: Free in the machine's own memory.
            num_workers: That may run there at once.
            is_free: So much is free; else it is all there is.
        """
        if self.enough_gpu_bytes is not None and gpu_bytes >= self.enough_gpu_bytes:
            return ""
        num_workers = min(num_workers, self.num_dividing or num_workers)
        if num_workers * self.size_bytes <= host_bytes:
            return ""
        unless = ""
        if self.enough_gpu_bytes is not None:
            unless = f", unless a GPU has {self.enough_gpu_bytes / 1e9:.2f} GB free"
        counted = "of memory free" if is_free else "of memory in all"
        return (
            f"it has {host_bytes / 1e9:.2f} GB {counted}, and the 4-bit base takes "
            f"{num_workers * self.size_bytes / 1e9:.2f} GB there for {num_workers} workers"
            f"{unless}; free some, let fewer workers run there, or leave the node out"
        )
