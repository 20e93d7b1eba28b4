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

from qlora_core.modeling.kernels import Predict

CHUNK_BYTES = 50_000_000
GPU_CHUNK_BYTES = 500_000_000  # a GPU multiplies a thousand rows as fast as it reads the head


def cross_entropy_sum(
    hidden_KH: Tensor, weight_VH: Tensor, labels_K: Tensor, predict: Predict | None = None
) -> Tensor:
    """Return the cross-entropy summed over all positions, float32, a scalar.

    Args:
        hidden_KH: What the head multiplies.
        weight_VH: The head's frozen weight.
        labels_K: What each position must predict.
        predict: A kernel for losses and gradient; none: torch computes them.
    """
    loss: Tensor = _CrossEntropySum.apply(  # type: ignore[no-untyped-call]
        hidden_KH, weight_VH, labels_K, predict or _predict
    )
    return loss


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_KH: Tensor, weight_VH: Tensor, labels_K: Tensor, predict: Predict
    ) -> Tensor:
        dh_KH = torch.empty_like(hidden_KH) if ctx.needs_input_grad[0] else None
        loss = torch.zeros((), device=hidden_KH.device)
        chunk_bytes = GPU_CHUNK_BYTES if hidden_KH.is_cuda else CHUNK_BYTES
        num_rows = max(1, chunk_bytes // (4 * len(weight_VH)))
        room_CV = hidden_KH.new_empty(min(num_rows, len(hidden_KH)), len(weight_VH))
        for start in range(0, len(hidden_KH), num_rows):
            chunk = slice(start, start + num_rows)
            rows_CH = hidden_KH[chunk]
            logits_CV = torch.mm(rows_CH, weight_VH.T, out=room_CV[: len(rows_CH)])
            if dh_KH is None:
                loss -= _log_shares(logits_CV).gather(1, labels_K[chunk, None]).sum()
                continue
            losses_C, dlogits_CV = predict(logits_CV, labels_K[chunk])
            loss += losses_C.sum()
            torch.mm(dlogits_CV, weight_VH, out=dh_KH[chunk])
        ctx.dh_KH = dh_KH
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.dh_KH * g, None, None, None


def _predict(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    shares_CV = _log_shares(logits_CV)
    losses_C = -shares_CV.gather(1, labels_C[:, None])[:, 0]
    minus_one_C1 = shares_CV.new_full((len(labels_C), 1), -1.0)
    shares_CV.exp_().scatter_add_(1, labels_C[:, None], minus_one_C1)
    return losses_C, shares_CV.to(logits_CV.dtype)


def _log_shares(logits_CV: Tensor) -> Tensor:
    """Return log_softmax in float32, in the place of ``logits_CV`` where torch can do that.

    Fresh memory for tens of megabytes costs a CPU more than the function itself.
    """
    if logits_CV.device.type == "cpu" and logits_CV.dtype == torch.float32:
        return torch._log_softmax(logits_CV, -1, False, out=logits_CV)
    return torch.log_softmax(logits_CV, -1, dtype=torch.float32)
