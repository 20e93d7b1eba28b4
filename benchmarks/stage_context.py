"""What a stage needs around it when it is called by itself: services in memory, folders on disk."""

from pathlib import Path

from qlora_core.backends.in_process import InProcessLauncher
from qlora_core.backends.memory import MemoryRegistry, MemoryTracker, SilentProgress
from qlora_core.config import SnapshotConfig
from qlora_core.ports import Context


def stage_context(out: Path) -> Context:
    """Return a context that writes to ``out``, made if need be, with a scratch folder inside."""
    scratch = out / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    launcher = InProcessLauncher(SnapshotConfig())
    return Context(out, scratch, MemoryTracker(), MemoryRegistry(), launcher, SilentProgress())
