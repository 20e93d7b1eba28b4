"""The output head and the loss as one function, so that the logits never exist whole.

Logits of K positions over a vocabulary of V are the largest tensor of a step, and autograd keeps
two of them. But the head is frozen: all the backward pass needs is the gradient of the hidden
states, and that can be had on the way, a few positions at a time:

    logits = h W'        loss = logsumexp(logits) - logits[label]        dh = (softmax - onehot) W

Written with `log_softmax`, whose rounding is that of the usual cross-entropy; built on `logsumexp`
the gradient would be off by 2e-4.

Dims: K supervised positions, H hidden size, V vocabulary.
Source: Wijmans et al. 2024, arXiv:2411.09009 (loss and gradient without logits in memory).
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 50_000_000


def cross_entropy_sum(hidden_KH: Tensor, weight_VH: Tensor, labels_K: Tensor) -> Tensor:
    """Return the cross-entropy summed over all positions, float32, a scalar.

    Args:
        hidden_KH: What the head multiplies.
        weight_VH: The head's frozen weight.
        labels_K: What each position must predict.
    """
    loss: Tensor = _CrossEntropySum.apply(  # type: ignore[no-untyped-call]
        hidden_KH, weight_VH, labels_K
    )
    return loss


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_KH: Tensor, weight_VH: Tensor, labels_K: Tensor) -> Tensor:
        dh_KH = torch.empty_like(hidden_KH) if ctx.needs_input_grad[0] else None
        loss = torch.zeros((), device=hidden_KH.device)
        num_rows = max(1, CHUNK_BYTES // (4 * len(weight_VH)))
        for start in range(0, len(hidden_KH), num_rows):
            chunk = slice(start, start + num_rows)
            labels_C1 = labels_K[chunk, None]
            shares_CV = _log_shares(hidden_KH[chunk] @ weight_VH.T)
            loss -= shares_CV.gather(1, labels_C1).sum()
            if dh_KH is not None:
                minus_one_C1 = shares_CV.new_full(labels_C1.shape, -1.0)
                shares_CV.exp_().scatter_add_(1, labels_C1, minus_one_C1)
                dh_KH[chunk] = shares_CV.to(weight_VH.dtype) @ weight_VH
        ctx.dh_KH = dh_KH
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return ctx.dh_KH * g, None, None


def _log_shares(logits_CV: Tensor) -> Tensor:
    """Return log_softmax in float32, in the place of ``logits_CV`` where torch can do that.

    Fresh memory for tens of megabytes costs a CPU more than the function itself.
    """
    if logits_CV.device.type == "cpu" and logits_CV.dtype == torch.float32:
        return torch._log_softmax(logits_CV, -1, False, out=logits_CV)
    return torch.log_softmax(logits_CV, -1, dtype=torch.float32)
