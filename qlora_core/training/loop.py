"""The training loop: one optimizer step after another, each yielded as a StepMetrics.

    for every step:   rows of the step -> this worker's micro-batches -> gradients add up
                      sum over workers -> clip -> AdamW -> (held-out loss) -> yield

The generator owns no files and no clock but a stopwatch: whoever drives it saves, logs or stops
between two steps, when `Position` and weights agree.

*Resumable.* Everything a step depends on is the weights, the optimizer's memory and the step's
number: rows come from the plan, dropout's masks from (seed, step, row, layer). No random state is
saved, because none outlives a step; the caller's own is left alone.

*The same on any cluster.* Gradients are sums over supervised tokens, divided by those of the whole
step, so micro-batch and world size only change the order of additions. Masks belong to rows
(`modeling.dropout`). What else a model draws comes from a stream of each worker's and depends on
how the rows are divided; a note says so where it happens.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from qlora_core.artifacts import Incident
from qlora_core.config import TrainingConfig
from qlora_core.data.prepared import Rows
from qlora_core.errors import NotFiniteError
from qlora_core.modeling.dropout import DrawnPass, RowDropout
from qlora_core.modeling.offload import kept_on_host
from qlora_core.modeling.sharding import ShardedBase
from qlora_core.ports import StepMetrics
from qlora_core.training.batching import Indices, Plan, deal, heldout_rows
from qlora_core.training.collation import Batch
from qlora_core.training.comm import Comm
from qlora_core.training.lanes import Lanes
from qlora_core.training.memory import is_out_of_memory, peak_memory_bytes
from qlora_core.training.objective import LossFunction
from qlora_core.training.optimizer import FlatGradients, Parameters
from qlora_core.training.room import Passes, Room
from qlora_core.training.schedule import learning_rate
from qlora_core.training.together import Together

R = TypeVar("R")

_FLOAT16_WEIGHT = 1 / 16
"""Of a token's loss in float16, which ends at 6e-8: divided by all tokens of a step, gradients
would vanish (Micikevicius et al. 2018, arXiv:1710.03740). The division follows in float32."""

_DIVISION_MATTERS = (
    "The model draws at random for all rows of a pass at once (dropout in its attention or among "
    "experts, or a router's noise), so the result depends on the number of workers and on how many "
    "rows fit into a pass."
)


@dataclass
class Position:
    """How far training is: with weights and optimizer, all that a snapshot holds."""

    step: int = 0
    seconds: float = 0.0
    """Spent training, over all attempts, held-out measurements included."""
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    best_adapter: dict[str, Tensor] | None = None
    """Copy of the parameters at the best held-out loss; none if it is measured at the end alone."""
    num_measured_since_best: int = 0
    stopped_early: bool = False


@dataclass(frozen=True)
class Run:
    """What is trained, on what, and how."""

    model: nn.Module
    parameters: Parameters
    optimizer: torch.optim.Optimizer
    plan: Plan
    train: Rows
    heldout: Rows
    config: TrainingConfig
    comm: Comm
    device: torch.device
    seed: int
    loss: LossFunction
    room: Room
    gradients: FlatGradients
    lanes: Lanes = Lanes()  # noqa: RUF009  # frozen
    calls: Callable[[], bool] = lambda: False
    """Says whether all workers shall look up after this step (`lookout`)."""
    forget: Callable[[], None] = lambda: None
    """Lets go of what a pass that ran out of memory has left in the model."""
    met: Callable[[Incident], None] = lambda _: None
    """Told of a pass that was halved."""
    base: ShardedBase | None = None
    """The base, if it lies in parts on all workers."""
    together: Together | None = None
    """How passes over a sharded base are made."""
    dropout: RowDropout | None = None
    """Draws masks, if the model has dropout."""
    passes: tuple[Passes, ...] = ()
    """How each worker, by rank, made its passes when it started; its own may be smaller by now."""


@dataclass(frozen=True)
class _Part:
    gradients: Sequence[Tensor | None]
    loss: Tensor
    num_tokens: int


@dataclass(frozen=True)
class _Update:
    loss: float
    grad_norm: float
    learning_rate: float


def train(run: Run, position: Position) -> Iterator[StepMetrics]:
    """Yield one StepMetrics for each optimizer step from the one after ``position`` on.

    Raises:
        TrainingError: The loss or a gradient is not finite.
    """
    while position.step < run.plan.num_steps and not position.stopped_early:
        watch = time.monotonic()
        step = position.step + 1
        num_computed = _add_up_gradients(run, step)
        update = _update(run, step)
        seconds = time.monotonic() - watch
        heldout = _measure(run, step)
        metrics = _metrics(run, step, update, heldout, num_computed, seconds)
        _advance(run, position, metrics)
        position.seconds += time.monotonic() - watch
        yield metrics


def measure_heldout(run: Run) -> float:
    """Return the mean held-out loss [nats per supervised token], computed by all workers."""
    rows = heldout_rows(len(run.heldout), run.config.heldout_rows)
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    run.model.eval()

    def add_up() -> None:
        total.zero_()
        compute = partial(_heldout_loss, run)
        for loss in _passes(run, compute, rows, run.heldout, goes_back=False):
            total.add_(loss)

    _until_it_fits(run, add_up)
    run.comm.all_reduce_sum(total)
    return float(total) / max(1, int(run.heldout.num_supervised[rows].sum()))


@torch.no_grad()  # of the thread that calls it
def _heldout_loss(run: Run, chunk: Indices) -> Tensor:
    return run.loss(run.loss.batch(run.heldout, chunk, run.device))


def keep_best(run: Run, position: Position) -> int:
    """With early stopping, put the best adapter back; return the step of the adapter there is."""
    if position.best_adapter is None or run.config.early_stopping is None:
        return position.step
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            parameter.copy_(position.best_adapter[name])
    return position.best_step


def _add_up_gradients(run: Run, step: int) -> int:
    """Leave the step's mean loss and its gradients in ``run.gradients``; return tokens computed."""
    rows = run.plan.rows(step)
    num_supervised = max(1, int(run.train.num_supervised[rows].sum()))
    weight = _FLOAT16_WEIGHT if _is_float16(run) else 1 / num_supervised
    run.model.train()

    def add_up() -> None:
        run.gradients.zero()
        compute = partial(_differentiate, run, weight, step)
        with _seeded(run, step):
            for part in _passes(run, compute, rows, run.train, goes_back=True):
                run.gradients.add(part.gradients)
                run.gradients.loss.add_(part.loss)
                run.gradients.num_computed.add_(part.num_tokens)

    _until_it_fits(run, add_up)
    run.gradients.calls.fill_(float(run.calls()))
    run.comm.all_reduce_sum(run.gradients.message)
    if weight != 1 / num_supervised:
        run.gradients.multiply(1 / (num_supervised * weight))
    return int(run.gradients.num_computed)


def _until_it_fits(run: Run, add_up: Callable[[], None]) -> None:
    """Call ``add_up``; again, if workers that make their passes together ran out of memory."""
    add_up()
    while run.together is not None and run.together.must_repeat():
        add_up()


def _passes(
    run: Run, compute: Callable[[Indices], R], chosen: Indices, rows: Rows, *, goes_back: bool
) -> Iterator[R]:
    """Yield what ``compute`` returns for each pass over this worker's share of ``chosen``."""
    shares = _shares(run, chosen, rows)
    if run.together is not None:
        yield from run.together.passes(compute, shares, goes_back=goes_back)
        return
    for chunk in shares[run.comm.rank]:
        yield from _in_passes(run, compute, chunk, rows)


def _in_passes(
    run: Run, compute: Callable[[Indices], R], chunk: Indices, rows: Rows
) -> Iterator[R]:
    """Yield what ``compute`` returns for a micro-batch, in as many passes as memory asks for.

    A pass that runs out of memory has yielded nothing yet: its rows are computed again, fewer at a
    time.
    """
    waiting = np.array_split(chunk, run.room.num_passes(len(chunk)))
    while waiting:
        part, waiting = waiting[0], waiting[1:]
        try:
            done = list(run.lanes.map(compute, part, rows))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            run.forget()
            before, incident = run.room.num_rows, run.room.shrink(len(part), str(error))
            if run.room.num_rows < before:  # else it was cut before that was known
                run.met(incident)
            waiting = np.array_split(part, 2) + waiting
        else:
            yield from done


def _is_float16(run: Run) -> bool:
    return next(run.model.parameters()).dtype == torch.float16


def _differentiate(run: Run, weight: float, step: int, chunk: Indices) -> _Part:
    """Return what the rows of ``chunk`` add to ``step``, each token's loss times ``weight``."""
    batch = run.loss.batch(run.train, chunk, run.device)
    parameters = list(run.parameters.values())
    gradients: Sequence[Tensor | None] = [None] * len(parameters)
    with _masks(run, step, chunk, batch):
        with kept_on_host() if run.room.offloads else nullcontext():
            loss = run.loss(batch) * weight
        if loss.requires_grad:  # something is supervised
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return _Part(gradients, loss.detach(), batch.input_ids_BT.numel())


def _masks(run: Run, step: int, chunk: Indices, batch: Batch) -> AbstractContextManager[None]:
    """Let dropout draw for the rows of ``chunk``."""
    if run.dropout is None:
        return nullcontext()
    padded_to = None if batch.layout is not None else batch.input_ids_BT.shape[1]
    lengths = run.train.lengths[chunk].tolist()
    return run.dropout.drawing(DrawnPass(run.seed, step, chunk.tolist(), lengths, padded_to))


def _update(run: Run, step: int) -> _Update:
    """Take one step of AdamW."""
    rate = learning_rate(step, run.plan.num_steps, run.config)
    loss, norm = float(run.gradients.loss), run.gradients.clip(run.config.max_grad_norm)
    _require_finite(run, step, "loss", loss)
    _require_finite(run, step, "gradient's norm", norm)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    return _Update(loss, norm, rate)


def _require_finite(run: Run, step: int, name: str, value: float) -> None:
    if math.isfinite(value):
        return
    rate = learning_rate(step, run.plan.num_steps, run.config)
    is_short = next(run.model.parameters()).dtype != torch.float32
    raise NotFiniteError(
        f"The {name} is {value} at step {step} (learning rate {rate:.3g}).",
        why="Every later step would be as broken; the last snapshot is not.",
        fix=f"Lower training.learning_rate (try {min(run.config.learning_rate / 3, 2e-4):.1g}), or "
        "lengthen training.warmup"
        + (", or set quantization.compute_dtype=float32." if is_short else "."),
    )


def _measure(run: Run, step: int) -> float | None:
    """Return the held-out loss if this step is one to measure at: the last one always is."""
    every = run.config.heldout_every
    if step != run.plan.num_steps and (every is None or step % every):
        return None
    heldout = measure_heldout(run)
    _require_finite(run, step, "held-out loss", heldout)
    return heldout


def _advance(run: Run, position: Position, metrics: StepMetrics) -> None:
    position.step = metrics.step
    position.num_tokens += metrics.num_tokens
    position.num_supervised_tokens += metrics.num_supervised_tokens
    if metrics.heldout_loss is not None and run.config.heldout_every is not None:
        _judge(run, position, metrics.heldout_loss)


def _judge(run: Run, position: Position, heldout: float) -> None:
    """Keep the adapter if it is the best so far; stop when there was none for too long."""
    if heldout < position.best_loss:
        position.best_loss, position.best_step = heldout, position.step
        position.best_adapter = {n: p.detach().clone() for n, p in run.parameters.items()}
        position.num_measured_since_best = 0
        return
    position.num_measured_since_best += 1
    is_last, patience = position.step == run.plan.num_steps, run.config.early_stopping
    is_over = patience is not None and position.num_measured_since_best >= patience
    position.stopped_early = is_over and not is_last


def _shares(run: Run, rows: Indices, source: Rows) -> list[list[Indices]]:
    return deal(
        rows,
        source.lengths,
        world_size=run.comm.world_size,
        micro_batch=run.config.micro_batch,
    )


@contextmanager
def _seeded(run: Run, step: int) -> Iterator[None]:
    """Make what is drawn a function of (seed, step, rank); leave the caller's random state alone.

    Dropout by row draws nothing here. What moves this stream is drawn for all rows of a pass.
    """
    entropy = np.random.SeedSequence([run.seed, step, run.comm.rank])
    devices = [run.device] if run.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
        before = _random_state(run.device)
        yield
        is_moved = not torch.equal(before, _random_state(run.device))
    if is_moved and run.loss.draws and _DIVISION_MATTERS not in run.loss.notes:
        run.loss.notes.append(_DIVISION_MATTERS)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _metrics(
    run: Run, step: int, update: _Update, heldout: float | None, num_computed: int, seconds: float
) -> StepMetrics:
    rows = run.plan.rows(step)
    num_tokens = int(run.train.lengths[rows].sum())
    num_supervised = int(run.train.num_supervised[rows].sum())
    return StepMetrics(
        step=step,
        num_steps=run.plan.num_steps,
        epoch=run.plan.epoch(step),
        loss=update.loss,
        heldout_loss=heldout,
        learning_rate=update.learning_rate,
        grad_norm=update.grad_norm,
        num_tokens=num_tokens,
        num_supervised_tokens=num_supervised,
        num_computed_tokens=num_computed,
        seconds=seconds,
        tokens_per_s=num_tokens / seconds,
        supervised_tokens_per_s=num_supervised / seconds,
        memory_bytes=peak_memory_bytes(run.device),
    )
