"""A plain loop over padded rows with transformers and PEFT: what many a script looks like."""

from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.training.gauge import Gauge
from benchmarks.training.systems.order import fulfil
from benchmarks.training.workload import IGNORED, Row, Settings, Workload


def train(workload: Workload, gauge: Gauge, _: Path) -> None:
    """Train ``gauge``'s steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(workload.model, device_map={"": device})
    model = PeftModel.from_pretrained(base, workload.adapter, is_trainable=True).train()
    gauge.attach(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=workload.settings.learning_rate, weight_decay=0.0, fused=True
    )
    for rows in workload.steps(gauge.num_all_steps):
        gauge.losses.append(_step(model, rows, workload.settings, device))
        torch.nn.utils.clip_grad_norm_(parameters, workload.settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        gauge.step_done()


def _step(model: PeftModel, rows: list[Row], settings: Settings, device: str) -> float:
    """Leave the gradients of a step; return its loss."""
    num_supervised = sum(sum(row.supervised[1:]) for row in rows)
    total = 0.0
    for start in range(0, len(rows), settings.micro_batch):
        batch = padded(rows[start : start + settings.micro_batch], settings.pad_id)
        on_device = {name: tensor.to(device) for name, tensor in batch.items()}
        loss = model(**on_device, num_items_in_batch=num_supervised).loss
        loss.backward()
        total += float(loss)
    return total


def padded(rows: list[Row], pad_id: int) -> dict[str, Tensor]:
    """Return the rows padded on the right to the longest of them."""
    length = max(len(row.input_ids) for row in rows)

    def stacked(values: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([value + [filler] * (length - len(value)) for value in values])

    return {
        "input_ids": stacked([row.input_ids for row in rows], pad_id),
        "attention_mask": stacked([[1] * len(row.input_ids) for row in rows], 0),
        "labels": stacked([row.labels for row in rows], IGNORED),
    }


if __name__ == "__main__":
    fulfil(train)
