"""What one training worker does, from the base's files to the sealed adapter; no Ray in it.

Every worker runs the same code. Rank 0 alone writes: the journal after each step, snapshots when
due, and the result. It also decides where to go on (the newest snapshot that verifies), and its
start is everybody's start, so workers on unlike machines still hold the same adapter.

Left in ``job.out``, to be sealed: the adapter in PEFT's format and `curve.jsonl`; byte for byte
the same for the same job on as many CPU workers of a kind that find memory for passes of as many
rows. What was measured goes to ``<scratch>/summary.json``.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel

from qlora_core.artifacts import Incident
from qlora_core.config import ClusterConfig, SnapshotConfig
from qlora_core.data.prepared import Rows, read_split
from qlora_core.errors import (
    DataError,
    ModelError,
    StoreError,
    hiccups_told,
)
from qlora_core.modeling.dense import dense_weights
from qlora_core.modeling.dropout import dropped_by_row
from qlora_core.modeling.fusing import always_here, fused
from qlora_core.modeling.heap import give_back_at_once
from qlora_core.modeling.kernels import find_kernels, sizes_of
from qlora_core.modeling.loading import load_base, quiet
from qlora_core.modeling.lora import attach_adapter, trainable_parameters
from qlora_core.modeling.memory import Recompute
from qlora_core.modeling.packing import packed_attention
from qlora_core.modeling.parts import load_in_parts
from qlora_core.modeling.shape import Shape, shape_of_model
from qlora_core.modeling.sharding import ShardedBase
from qlora_core.ports import StepMetrics, TrainJob
from qlora_core.training import snapshot
from qlora_core.training.attempt import AttemptRecord, read_record
from qlora_core.training.batching import Plan, plan_training
from qlora_core.training.comm import Comm
from qlora_core.training.desk import LastWord, job_fingerprint, open_desk
from qlora_core.training.device import device_errors
from qlora_core.training.incidents import note
from qlora_core.training.journal import add_notes
from qlora_core.training.lanes import open_lanes
from qlora_core.training.lookout import Lookout
from qlora_core.training.loop import Position, Run, train
from qlora_core.training.memory import (
    memory_for_worker,
    peak_memory_bytes,
)
from qlora_core.training.objective import LossFunction
from qlora_core.training.optimizer import FlatGradients, make_optimizer, restore
from qlora_core.training.placing import Placement, demand_of, place_base
from qlora_core.training.room import Demand, Passes, Room, find_room
from qlora_core.training.start import agree_on_halvings, require_store
from qlora_core.training.together import Together
from qlora_core.training.trying import Trial


def ignore(_: StepMetrics) -> None:
    """Listen to no step."""


def run_worker(
    job: TrainJob,
    comm: Comm,
    snapshots: SnapshotConfig,
    launch: str,
    device: torch.device,
    on_step: Callable[[StepMetrics], None] = ignore,
    lookout: Lookout | None = None,
    cluster: ClusterConfig = ClusterConfig(),  # noqa: B008  # frozen
) -> None:
    """Train to the end, going on from the newest valid snapshot if there is one.

    Args:
        job: What to train.
        comm: The line to the other workers.
        snapshots: When rank 0 saves.
        launch: Name of this launch, from `attempt.next_launch`.
        device: Where this worker's model lives.
        on_step: Called on rank 0 for each step, those of earlier attempts first.
        lookout: Looks out for nodes that will be taken away; all workers have one, or none has.
        cluster: Says where the base shall lie.

    Raises:
        TrainingError: The loss or a gradient is not finite.
        ResourceError: The device has too little memory.
        ClusterError: Nodes do not see the store.
        StoreError: Snapshots or results cannot be written, or inputs not be read just now.
        LaunchError: A newer attempt has taken over, or other workers are gone.
        DeviceError: A GPU has failed.
    """
    notes: list[str] = []
    lookout = lookout or Lookout()
    with device_errors():
        require_store(job, comm, launch)
        known = read_record(job.scratch) if comm.rank == 0 else AttemptRecord()
        num_halvings = agree_on_halvings(job, comm, launch, notes)
        before = _passes_before(job, comm)
        run = _prepare(job, comm, device, notes, cluster, num_halvings, before)
        position, steps = _go_on(run, job, notes)
        run = replace(run, met=_teller(job, comm, launch, position, notes))
        if comm.rank == 0:
            desk = open_desk(run, job, snapshots, launch, position.step, steps, notes, known)
            desk.tell(on_step)
        with fast_paths(run) as fast:
            for metrics in train(replace(fast, calls=lookout.calls), position):
                is_urgent = bool(fast.gradients.calls) and lookout.is_urgent()
                if comm.rank == 0:
                    desk.record(metrics, position, is_urgent=is_urgent)
                    desk.tell(on_step)
    words = comm.gather(_last_word(run).model_dump())
    if comm.rank == 0:
        desk.finish(position, [LastWord(**word) for word in words])


def _teller(
    job: TrainJob, comm: Comm, launch: str, position: Position, notes: list[str]
) -> Callable[[Incident], None]:
    """Return what puts an incident into the history, and tells it to the person who watches.

    Rank 0's notes are told after each step, those of others at the end alone: so they tell it here.
    """

    def tell(incident: Incident) -> None:
        who = f"Worker {comm.rank}: " if comm.rank else ""
        found = {"step": position.step, "launch": launch, "what": who + incident.what}
        told = incident.model_copy(update=found)
        with suppress(StoreError):  # no reason to end a pass: whoever saves will meet it
            note(job.scratch, told)
            if comm.rank:
                add_notes(job.scratch, [told.sentence()])
        if not comm.rank:
            notes.append(told.sentence())

    return tell


def _last_word(run: Run) -> LastWord:
    peak = peak_memory_bytes(run.device)
    return LastWord(notes=tuple(run.loss.notes), peak_bytes=peak, num_rows=run.room.num_rows)


def _passes_before(job: TrainJob, comm: Comm) -> Passes | None:
    """Return how this worker made its passes at the newest snapshot, if there were as many then."""
    found = []
    if comm.rank == 0:
        known = snapshot.passes_of_newest(job.scratch, job_fingerprint(job))
        found = [passes.model_dump() for passes in known]
    found = comm.broadcast(found)
    return Passes(**found[comm.rank]) if len(found) == comm.world_size else None


def plan_of(job: TrainJob, num_rows: int) -> Plan:
    """Return the content of every step of ``job`` on a dataset of ``num_rows`` training rows."""
    return plan_training(job.training, job.seed, num_rows)


def _prepare(
    job: TrainJob,
    comm: Comm,
    device: torch.device,
    notes: list[str],
    cluster: ClusterConfig,
    num_halvings: int,
    before: Passes | None,
) -> Run:
    with hiccups_told(job.data):
        train_rows, heldout = read_split(job.data, "train"), read_split(job.data, "heldout")
    if not len(train_rows) or not len(heldout):
        raise DataError(
            f"There are {len(train_rows)} training and {len(heldout)} held-out rows.",
            fix="Training needs at least one of each; change dataset.heldout or give more rows.",
        )
    base = None
    with hiccups_told(job.base):
        place = place_base(job, cluster, train_rows, comm, device, notes)
        if place.is_sharded:
            offloads = place.is_offloaded
            loaded, base = load_in_parts(job.base, device, comm, notes, is_offloaded=offloads)
        else:
            loaded = load_base(job.base, device)
    model = attach_adapter(loaded, job.adapter, job.seed)
    rows = (train_rows, heldout)
    return assemble(job, model, rows, comm, device, notes, num_halvings, base, before)


def assemble(
    job: TrainJob,
    model: PeftModel,
    rows: tuple[Rows, Rows],
    comm: Comm,
    device: torch.device,
    notes: list[str],
    num_halvings: int = 0,
    base: ShardedBase | None = None,
    before: Passes | None = None,
) -> Run:
    """Return what `train` takes, the ways that work for this model and device found by trying.

    Args:
        job: What to train; its files are not read.
        model: On ``device``, with a new adapter.
        rows: To train on, and held out.
        comm: The line to the other workers.
        device: Where this worker's model lives.
        notes: Where it is said what had to be done the slow way.
        num_halvings: How often passes were too large before.
        base: The model's base, if it is sharded.
        before: How this worker made its passes when the snapshot was taken that it goes on from.
    """
    train_rows, heldout = rows
    start_trial = Trial if base is None else partial(Trial, comm, base)
    loss = _loss_function(model, train_rows, device, notes, start_trial)
    if device.type == "cuda":  # what trying took says nothing of training
        torch.cuda.reset_peak_memory_stats(device)
    place = Placement(base is not None, base is not None and base.is_offloaded)
    demand = demand_of(job, _shape(model, job), train_rows, comm, device, place)
    demand = replace(demand, num_halvings=num_halvings, before=before)
    room = _find_room(demand, comm, loss, device)
    passes = comm.gather(room.passes.model_dump())
    _set_checkpointing(model, job, room.recompute, device)
    parameters = trainable_parameters(model)
    return Run(
        model=model,
        parameters=parameters,
        optimizer=make_optimizer(parameters, job.training, device, notes),
        plan=plan_of(job, len(train_rows)),
        train=train_rows,
        heldout=heldout,
        config=job.training,
        comm=comm,
        device=device,
        seed=job.seed,
        loss=loss,
        room=room,
        gradients=FlatGradients(parameters),
        met=lambda incident: loss.notes.append(incident.sentence()),
        base=base,
        passes=tuple(Passes(**each) for each in passes),
    )


def _shape(model: PeftModel, job: TrainJob) -> Shape:
    """Return the shape as `qlora plan` counts it: of the model before it was quantised."""
    with torch.device("meta"), quiet():
        unquantized = type(model.get_base_model())(model.get_base_model().config)
    return shape_of_model(unquantized, job.quantization, job.adapter)


def _loss_function(
    model: PeftModel,
    rows: Rows,
    device: torch.device,
    notes: list[str],
    start_trial: Callable[[], Trial],
) -> LossFunction:
    dtype = model.get_input_embeddings().weight.dtype
    kernels = find_kernels(device, dtype, sizes_of(model.config))
    notes += kernels.notes
    loss = LossFunction(model, notes, kernels)
    loss.try_out(rows, device, start_trial)
    return loss


def _find_room(demand: Demand, comm: Comm, loss: LossFunction, device: torch.device) -> Room:
    """Decide how a micro-batch is computed here; say what is not as the recipe asks."""
    micro_batch, is_sharded = demand.training.micro_batch, demand.is_sharded
    known = replace(
        demand,
        num_lanes=_num_lanes(loss, micro_batch, device, is_sharded=is_sharded),
        is_packed=loss.packs,
        shares_prefix=loss.packs and not loss.draws and device.type == "cpu",
    )
    room = find_room(known, memory_for_worker(device, comm.local_size))
    if is_sharded:  # passes are made together
        room.num_rows = min(comm.gather(room.num_rows))
    loss.notes += room.notes(demand.training)
    return room


def _set_checkpointing(
    model: PeftModel, job: TrainJob, recompute: Recompute, device: torch.device
) -> None:
    if recompute == "nothing":
        return
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{job.base_name or job.base} cannot recompute its activations.",
            fix="Set training.checkpointing=off and lower training.micro_batch instead.",
        )
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    if device.type == "cpu":  # kept inputs between short-lived tensors make a heap of mostly holes
        give_back_at_once()


def _go_on(run: Run, job: TrainJob, notes: list[str]) -> tuple[Position, list[StepMetrics]]:
    """Put everybody where the newest valid snapshot is, or at rank 0's start."""
    found = None
    if run.comm.rank == 0:
        folder = snapshot.newest_valid(job.scratch, job_fingerprint(job), notes)
        found = folder and str(folder)
    found = run.comm.broadcast(found)
    if found is None:
        _start_like_rank_0(run)
        return Position(), []
    state = snapshot.load(Path(found))
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            parameter.copy_(state.adapter[name])
    restore(run.optimizer, state.optimizer)
    return state.position, state.steps


def _start_like_rank_0(run: Run) -> None:
    with torch.no_grad():
        for parameter in run.parameters.values():
            if run.comm.rank != 0:
                parameter.zero_()
            run.comm.all_reduce_sum(parameter)


@contextmanager
def fast_paths(run: Run) -> Iterator[Run]:
    """Pack, fuse, and dequantise once, where there is memory to spare; yield the run to train.

    Args:
        run: From `assemble`.
    """
    with ExitStack() as stack:
        if run.loss.packs:
            stack.enter_context(packed_attention(run.model))
        budget_bytes = run.room.workload.dense_budget_bytes
        at_hand = always_here if run.base is None else run.base.at_hand
        taken = stack.enter_context(fused(run.model, budget_bytes, run.loss.kernels, at_hand))
        if taken.num_left:
            run.loss.notes.append(
                f"{taken.num_left} adapted layers are computed by PEFT, as they have dropout or "
                "DoRA, or compute in 8 bits: correct, but slower."
            )
        if taken.slow_parts:
            run.loss.notes.append(
                f"The model's own code computes {', '.join(taken.slow_parts)}: correct, but slower."
            )
        dropout = stack.enter_context(dropped_by_row(run.model))
        stack.enter_context(dense_weights(run.model, taken.spare_bytes, taken.base_layers))
        is_sharded = run.base is not None
        num_lanes = _num_lanes(run.loss, run.config.micro_batch, run.device, is_sharded=is_sharded)
        lanes = stack.enter_context(open_lanes(num_lanes))
        together = _together(run, taken.forget)
        yield replace(run, lanes=lanes, forget=taken.forget, together=together, dropout=dropout)


def _together(run: Run, forget: Callable[[], None]) -> Together | None:
    if run.base is None:
        return None
    return Together(run.base, run.comm, run.room, run.device, run.met, forget)


def _num_lanes(
    loss: LossFunction, micro_batch: int, device: torch.device, *, is_sharded: bool
) -> int:
    if device.type != "cpu" or loss.draws or is_sharded:  # one block is here, for one lane
        return 1
    return min(torch.get_num_threads(), micro_batch)
