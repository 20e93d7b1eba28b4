"""What runs in the cluster as a Ray job: a driver that outlives its flow.

    python -P -m qlora_core.backends.ray_job_entry ORDER    # a `JobOrder` in the shared store

It does what `ray_driver` does for a launcher that holds its stdin, with the same code; but nobody
holds it. So it answers with a file beside the snapshots, and what it says goes there as well as to
Ray's log of the job, which is gone with the cluster.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_core.backends.ray_job_order import JobOrder, last_word
from qlora_core.backends.ray_work import carry_out
from qlora_core.backends.ray_worker import RaySpec, unforeseen
from qlora_core.errors import LaunchError, QLoraError, UserError, storing
from qlora_core.fingerprint import files_below
from qlora_core.training.durable import reserve, sync


def main() -> None:
    """Run the order; end with code 1 if there is an error."""
    error: QLoraError | None = None
    try:
        order = _read(Path(sys.argv[1]))
        with _also_in(order.spec.log):
            error = _carried_out(order)
        order.leave_answer(error)
    except UserError as unwritable:
        error = unwritable
    if error:  # in the answer, too; but a network's file system may hide that for a minute
        sys.stdout.write(last_word(error))
    sys.exit(1 if error else 0)


def _read(file: Path) -> JobOrder:
    try:
        return JobOrder.model_validate_json(file.read_bytes())
    except OSError as error:
        raise UserError(
            f"{os.uname().nodename}, where the job's driver runs, cannot read {file}: "
            f"{error.strerror}.",
            why="The store must be one folder, at one path, for the flow and all of the cluster.",
            fix="Mount it on every node, the head included, or name one that is (workspace.store, "
            "or QLORAFLOW_HOME).",
        ) from error


def _carried_out(order: JobOrder) -> QLoraError | None:
    try:
        _work(order)
    except QLoraError as error:
        return error
    except Exception as error:
        return unforeseen(error, "The job's driver", order.spec.log)
    return None


def _work(order: JobOrder) -> None:
    import ray

    spec = order.spec
    try:
        ray.init(address="auto", namespace="qloraflow", log_to_driver=True)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise LaunchError(
            f"The job's driver cannot reach the Ray it runs on: {error}",
            fix=f"Run again; if it stays so, look at the cluster's head. The log: {spec.log}",
        ) from error
    try:
        if isinstance(spec, RaySpec):
            reserve(spec.error_file)  # so that a full store can be told, too
        carry_out(order.cluster, spec, order.flow)
    finally:
        ray.shutdown()
    if isinstance(spec, RaySpec):
        for name in files_below(spec.job.out):  # the answer says that they are there
            sync(spec.job.out / name)


@contextmanager
def _also_in(log: Path) -> Iterator[None]:
    """Let all that this process and its children say go to ``log``, and where it went before."""
    with storing(log):
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    before = os.dup(1)
    heard, said = os.pipe()
    for descriptor in (1, 2):
        os.dup2(said, descriptor)
    os.close(said)
    copying = threading.Thread(target=_copy, args=(heard, (before, file)), daemon=True)
    copying.start()
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for descriptor in (1, 2):
            os.dup2(before, descriptor)
        copying.join(timeout=2.0)  # a child may hold the pipe open for longer


def _copy(heard: int, places: tuple[int, ...]) -> None:
    while part := os.read(heard, 1 << 16):
        for place in places:
            with suppress(OSError):  # a full disk; whoever stops reading would block training
                os.write(place, part)


if __name__ == "__main__":
    main()
