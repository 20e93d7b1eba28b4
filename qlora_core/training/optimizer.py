"""Gradients as one vector, and AdamW on the float32 adapter.

Gradients are added into views of one flat vector. So adding up over workers is one collective, and
the global norm is one reduction. Three more places at its end let
the step's loss, the tokens computed and a call to all workers travel along.

Dims: P trainable parameters, all tensors together.
Source: Loshchilov & Hutter 2019, arXiv:1711.05101; Dettmers et al. 2022, arXiv:2110.02861 (8-bit).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_core.config import TrainingConfig
from qlora_core.errors import ResourceError

Parameters = Mapping[str, nn.Parameter]


class FlatGradients:
    """The gradients of all parameters in one vector; the loss and the work behind them.

    Args:
        parameters: What is trained; float32, on one device.
    """

    def __init__(self, parameters: Parameters) -> None:
        owners = list(parameters.values())
        size = sum(owner.numel() for owner in owners)
        self._all = torch.zeros(size + 3, dtype=torch.float32, device=owners[0].device)
        self.flat_P, (self.loss, self.num_computed, self.calls) = self._all[:-3], self._all[-3:]
        parts = torch.split(self.flat_P, [owner.numel() for owner in owners])
        self._views = [part.view_as(owner) for part, owner in zip(parts, owners, strict=True)]
        for owner, view in zip(owners, self._views, strict=True):
            owner.grad = view

    @property
    def message(self) -> Tensor:
        """(P + 3,) what workers add up: gradients, loss, tokens computed, calls."""
        return self._all

    def zero(self) -> None:
        """Start a new step."""
        self._all.zero_()

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add one gradient for each parameter; None where nothing depends on it."""
        pairs = zip(self._views, gradients, strict=True)
        known = [(view, gradient) for view, gradient in pairs if gradient is not None]
        if known:
            torch._foreach_add_([view for view, _ in known], [gradient for _, gradient in known])

    def multiply(self, factor: float) -> None:
        """Multiply gradients and loss."""
        self._all[:-2].mul_(factor)

    def clip(self, max_norm: float) -> float:
        """Scale the gradients down to a global norm of ``max_norm``; return the norm before."""
        norm = float(torch.linalg.vector_norm(self.flat_P))
        if norm > max_norm:
            self.flat_P.mul_(max_norm / norm)
        return norm


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer's memory as plain data: what a snapshot keeps."""

    tensors: dict[str, Tensor]
    """By ``<index of the parameter>.<name>``."""
    numbers: dict[str, int | float]
    """What is not a tensor, under such names."""


def make_optimizer(
    parameters: Parameters, config: TrainingConfig, device: torch.device, notes: list[str]
) -> torch.optim.Optimizer:
    """Return AdamW as ``config`` wants it; what was replaced is said in ``notes``.

    Raises:
        ResourceError: bitsandbytes cannot run its 8-bit AdamW here.
    """
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": 1e-8,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters.values(), fused=True, **settings)
    is_paged = config.optimizer == "paged_adamw_8bit"
    if is_paged and device.type != "cuda":
        notes.append(
            f"training.optimizer=paged_adamw_8bit ran as adamw_8bit: nothing pages on a {device}."
        )
        is_paged = False
    _require_8bit(device)
    import bitsandbytes as bnb

    kind = bnb.optim.PagedAdamW8bit if is_paged else bnb.optim.AdamW8bit
    made: torch.optim.Optimizer = kind(parameters.values(), **settings)
    return made


def state_of(optimizer: torch.optim.Optimizer) -> OptimizerState:
    """Return copies of everything the optimizer remembers, on the CPU."""
    tensors, numbers = {}, {}
    for index, (_, parameter) in enumerate(_owners(optimizer)):
        for name, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().clone()
            else:
                numbers[f"{index}.{name}"] = value
    return OptimizerState(tensors, numbers)


def restore(optimizer: torch.optim.Optimizer, state: OptimizerState) -> None:
    """Put back what `state_of` returned.

    bitsandbytes makes its buffers first, as a paged one is no ordinary tensor; they are filled.
    """
    owners = list(_owners(optimizer))
    for index, (group, parameter) in enumerate(owners):
        if hasattr(optimizer, "init_state"):
            optimizer.init_state(group, parameter, 0, index)
    for key, value in (state.tensors | state.numbers).items():
        index_text, _, name = key.partition(".")
        parameter = owners[int(index_text)][1]
        memory = optimizer.state[parameter]
        if isinstance(value, Tensor) and name in memory:
            memory[name].copy_(value)
        else:
            memory[name] = value.to(parameter.device) if isinstance(value, Tensor) else value


def _owners(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield group, parameter


def _require_8bit(device: torch.device) -> None:
    """Take one 8-bit step on a throw-away tensor: a missing kernel is found before training."""
    try:
        import bitsandbytes as bnb

        probe = nn.Parameter(torch.ones(4096, device=device))
        probe.grad = torch.ones_like(probe)
        bnb.optim.AdamW8bit([probe]).step()
    except Exception as error:
        raise ResourceError(
            f"training.optimizer: bitsandbytes' 8-bit AdamW does not run on this {device}: {error}",
            fix="Try training.optimizer=adamw.",
        ) from error
