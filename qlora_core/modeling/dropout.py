"""Dropout whose masks belong to rows, not to passes.

torch draws one mask for whatever goes through a layer together, from one stream. So the number of
workers, and the memory there happens to be, would change the result: they decide who computes which
rows, how many in a pass, beside which others. Here each row of a step has its own mask for each
layer, drawn by a generator that is seeded by (seed, step, row, layer) and nothing else: the same
wherever the row is computed, alone or among others, padded or end to end, the first time or when
the backward pass computes it again.

That asks for tokens that lie as the rows do: (1, N, I) or (N, I) end to end, (B, T, I) or
(B * T, I) padded. Where they do not (an expert sees what was routed to it), torch draws as ever,
and so it does where dropout is no module (in attention, say); `training.loop` notices and says so.

A row that a step holds twice, as when the dataset is smaller than a step, has its masks twice. A
generator's numbers are the same on all CPUs, and on all GPUs of one model.

Dims: N tokens of a pass, B rows, T tokens they are padded to, I features.
Source: Srivastava et al. 2014, JMLR 15; scaled while training, as torch does.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import blake2b

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DrawnPass:
    """The rows that go through the model together, and what their masks are a function of.

    Args:
        seed: The run's.
        step: The optimizer step.
        rows: Each row's place in the dataset.
        lengths: Its tokens.
        padded_to: T; None: the rows lie end to end.
    """

    seed: int
    step: int
    rows: Sequence[int]
    lengths: Sequence[int]
    padded_to: int | None = None

    @property
    def num_tokens(self) -> int:
        """N, padding included."""
        return len(self.rows) * self.padded_to if self.padded_to else sum(self.lengths)

    def holds(self, x: Tensor) -> bool:
        """Say whether the tokens of ``x`` lie as the rows do."""
        shape = (len(self.rows), self.padded_to) if self.padded_to else (1, self.num_tokens)
        return tuple(x.shape[:-1]) in (shape, (self.num_tokens,))

    def mask(self, layer: int, like: Tensor, keep: float) -> Tensor:
        """Return what is kept of ``like``, bool, each number with a probability of ``keep``."""
        mask_NI = torch.zeros(
            (self.num_tokens, like.shape[-1]), dtype=torch.bool, device=like.device
        )
        generator, start = torch.Generator(like.device), 0
        for row, length in zip(self.rows, self.lengths, strict=True):
            generator.manual_seed(_seed(self.seed, self.step, row, layer))
            mask_NI[start : start + length].bernoulli_(keep, generator=generator)
            start += self.padded_to or length
        return mask_NI.view(like.shape)


def _seed(*numbers: int) -> int:
    text = " ".join(str(int(number)) for number in numbers)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


class RowDropout:
    """The dropout of one model, which makes one pass at a time."""

    def __init__(self) -> None:
        self._pass: DrawnPass | None = None  # not by thread: autograd recomputes in one of its own

    @contextmanager
    def drawing(self, drawn: DrawnPass) -> Iterator[None]:
        """Draw for the rows of a pass within the block, its backward pass included."""
        self._pass = drawn
        try:
            yield
        finally:
            self._pass = None

    def forward_of(self, module: nn.Dropout, layer: int) -> Callable[..., Tensor]:
        """Return what computes ``module``, the model's dropout number ``layer``."""

        def forward(x: Tensor) -> Tensor:
            drawn, rate = self._pass, module.p
            if drawn is None or not module.training or not 0 < rate < 1 or not drawn.holds(x):
                return F.dropout(x, rate, module.training)
            return torch.where(drawn.mask(layer, x, 1 - rate), x, 0) / (1 - rate)

        return forward


@contextmanager
def dropped_by_row(model: nn.Module) -> Iterator[RowDropout | None]:
    """Let ``model`` drop by row inside the block; None: it has no dropout.

    Its modules are numbered in the order of the model, the same for all workers.
    """
    dropout = RowDropout()
    drops = [module for module in model.modules() if type(module) is nn.Dropout and module.p]
    with ExitStack() as undo:
        for layer, module in enumerate(drops):
            module.forward = dropout.forward_of(module, layer)  # type: ignore[method-assign]
            undo.callback(delattr, module, "forward")  # the instance's, which hides the class's
        yield dropout if drops else None
