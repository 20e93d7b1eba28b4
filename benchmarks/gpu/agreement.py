"""Does the fast path compute the same loss and gradients as transformers and PEFT?

Both compute one batch with the same adapter, in the dtype that is measured, and a third time
transformers and PEFT do in float32 on the same 4-bit weights. In 16 bits no two orders of additions
agree to the last digits; so what counts is that ours is as near to the float32 numbers as theirs.
"""

import gc
import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.building import random_model
from benchmarks.gpu.cases import ALPHA, RANK, SEED, Case
from benchmarks.gpu.processes import MARK
from benchmarks.gpu.rows import random_rows
from qlora_core.config import AdapterConfig
from qlora_core.data.prepared import Rows
from qlora_core.modeling.fusing import fused
from qlora_core.modeling.kernels import find_kernels, sizes_of
from qlora_core.modeling.lora import attach_adapter, trainable_parameters
from qlora_core.modeling.packing import packed_attention
from qlora_core.training.objective import LossFunction

_NUM_ROWS, _LONGEST = 2, 512
_NOISE = 0.01  # on A and B, so that B is not zero and all gradients are at work


@dataclass(frozen=True)
class Agreement:
    """Relative differences [dimensionless]."""

    loss: float
    """Of ours to theirs, in the dtype that is measured."""
    gradient: float
    """The same of the whole gradient: norm of the difference over norm."""
    our_loss_error: float
    """To theirs in float32."""
    their_loss_error: float
    our_gradient_error: float
    their_gradient_error: float
    notes: tuple[str, ...]

    def report(self) -> None:
        """Print it for the runner."""
        print(MARK + json.dumps(asdict(self)), flush=True)


@dataclass(frozen=True)
class _Answer:
    loss: float
    gradient_P: Tensor


def measure(case: Case) -> Agreement:
    """Compare on a few rows of the case's shape."""
    notes: list[str] = []
    ours, theirs = _answers(case, notes)
    gc.collect()  # the model is part of reference cycles
    torch.cuda.empty_cache()
    (exact,) = _answers(replace(case, dtype="float32"))
    return Agreement(
        loss=_relative(ours.loss, theirs.loss),
        gradient=_distance(ours, theirs),
        our_loss_error=_relative(ours.loss, exact.loss),
        their_loss_error=_relative(theirs.loss, exact.loss),
        our_gradient_error=_distance(ours, exact),
        their_gradient_error=_distance(theirs, exact),
        notes=tuple(notes),
    )


def _answers(case: Case, notes: list[str] | None = None) -> list[_Answer]:
    """Return ours and theirs; theirs alone if there is nowhere to put our notes."""
    device = torch.device(case.device)
    model = _model(case, device)
    length = min(case.row_length, _LONGEST)
    rows = random_rows(_NUM_ROWS, length, model.config.vocab_size, SEED)
    theirs = _theirs(model, rows, device)
    return [theirs] if notes is None else [_ours(model, rows, device, notes), theirs]


def _model(case: Case, device: torch.device) -> Any:
    base = random_model(case.shape, device, getattr(torch, case.dtype), SEED)
    model = attach_adapter(base, AdapterConfig(rank=RANK, alpha=ALPHA), SEED)
    generator = torch.Generator().manual_seed(SEED)
    for parameter in trainable_parameters(model).values():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(_NOISE * noise.to(device))
    return model.train()


def _theirs(model: Any, rows: Rows, device: torch.device) -> _Answer:
    ids_BT = torch.from_numpy(rows.flat_ids.reshape(len(rows), -1)).long().to(device)
    return _answer(model, model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss)


def _ours(model: Any, rows: Rows, device: torch.device, notes: list[str]) -> _Answer:
    dtype = model.get_input_embeddings().weight.dtype
    kernels = find_kernels(device, dtype, sizes_of(model.config))
    notes += kernels.notes
    loss = LossFunction(model, notes, kernels)
    loss.try_out(rows, device)
    with ExitStack() as stack:
        if loss.packs:
            stack.enter_context(packed_attention(model))
        stack.enter_context(fused(model, 0, kernels))
        batch = loss.batch(rows, np.arange(len(rows)), device)
        return _answer(model, loss(batch) / int(rows.num_supervised.sum()))


def _answer(model: Any, loss: Tensor) -> _Answer:
    parts = torch.autograd.grad(loss, list(trainable_parameters(model).values()))
    flat_P = torch.cat([part.detach().reshape(-1).double() for part in parts])
    return _Answer(float(loss.detach()), flat_P.cpu())


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected)


def _distance(found: _Answer, expected: _Answer) -> float:
    difference = (found.gradient_P - expected.gradient_P).norm()
    return float(difference / expected.gradient_P.norm())
