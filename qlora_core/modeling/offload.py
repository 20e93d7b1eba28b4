"""Keep in the host's memory what a GPU has no room for until the backward pass.

With recomputed layers all that is left of them are their inputs, yet at long rows those are the
largest part of what a GPU holds. They are copied to pinned memory as they are saved, and back when
their layer is computed again. Both copies are queued behind the kernels that make and use the
tensor, so nobody waits for them but the GPU.

Source: Ren et al. 2021, arXiv:2101.06840, sec. 3 (what to keep where).
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SMALLEST = 1 << 18  # numbers; below that a copy costs more than it frees


@dataclass(frozen=True)
class OnHost:
    """A tensor that was taken to the host."""

    copy: Tensor
    device: torch.device


def kept_on_host() -> AbstractContextManager[None]:
    """Return a block in which large activations that autograd keeps lie in the host's memory."""
    return torch.autograd.graph.saved_tensors_hooks(_to_host, from_host)


def _to_host(tensor: Tensor) -> Tensor | OnHost:
    is_activation = tensor.is_floating_point() and not isinstance(tensor, nn.Parameter)
    if not is_activation or tensor.numel() < SMALLEST:
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return OnHost(copy.copy_(tensor, non_blocking=True), tensor.device)


def from_host(kept: Tensor | OnHost) -> Tensor:
    """Return what was kept, on its device."""
    if isinstance(kept, Tensor):
        return kept
    return kept.copy.to(kept.device, non_blocking=True)
