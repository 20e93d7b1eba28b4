"""A plain loop with transformers and PEFT on the same rows: what many a script looks like."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.building import num_multiplied, random_model
from benchmarks.gpu.cases import ALPHA, LEARNING_RATE, RANK, SEED, Case
from benchmarks.gpu.measuring import Measurement, Watch
from benchmarks.gpu.rows import random_rows
from qlora_core.config import AdapterConfig
from qlora_core.modeling.lora import attach_adapter

_MAX_NORM = 1.0


def measure(case: Case) -> Measurement:
    """Train the steps of ``case``."""
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    base = random_model(case.shape, device, dtype, SEED)
    watch, losses = Watch(case, num_multiplied(base)), []
    model: Any = attach_adapter(base, AdapterConfig(rank=RANK, alpha=ALPHA), SEED).train()
    if case.saves_memory:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    batches = torch.split(ids_of(case, base.config.vocab_size), case.micro_batch)
    num_passes = case.global_batch // case.micro_batch
    watch.begin()
    for start in range(0, len(batches), num_passes):
        losses.append(_step(model, batches[start : start + num_passes], device))
        torch.nn.utils.clip_grad_norm_(parameters, _MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if watch.step_done():
            break
    return watch.measurement("plain", losses)


def ids_of(case: Case, vocabulary: int) -> Tensor:
    """Return the (rows, length) tokens of all steps."""
    num_rows = case.global_batch * (case.num_warmup + case.num_steps)
    rows = random_rows(num_rows, case.row_length, vocabulary, SEED)
    return torch.from_numpy(rows.flat_ids.reshape(num_rows, -1)).long()


def _step(model: Any, batches: tuple[Tensor, ...], device: torch.device) -> float:
    """Leave the gradients of a step; return its loss."""
    total = torch.zeros((), device=device)
    for ids_BT in batches:
        ids_BT = ids_BT.to(device, non_blocking=True)
        loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss / len(batches)
        loss.backward()
        total += loss.detach()
    return float(total)
