"""What many GPUs would do, as arithmetic: nothing in here is measured.

    python -m benchmarks.scale.projection

With W GPUs that train data-parallel, each on its own B tokens a step, a step takes

    t(W) = max(c, g(W)) + s(W)   c = k N B / (u F)
                                 g(W) = n (2 L - 1) ((W - 1) / W * D / b + (W - 1) * l)
                                 s(W) = 2 (W - 1) / W * 4 P / b + 2 (W - 1) * l

and the efficiency is c / t(W). N frozen weights that each token is multiplied by (the head is left
out), F the GPU's peak [FLOP/s], u the share of it that is reached. k is 4: 2 FLOP for each weight
forward, 2 in the backward pass to the layers below; frozen weights get no gradients themselves. It
is 6 where layers are recomputed, forward once more. Which of them, and how many rows fit in a pass,
`training.room.find_room` says of a GPU of this size: what `qlora plan` says.

s(W): P trainable parameters, whose float32 gradients go round a ring (all-reduce); b the bandwidth
of the slowest link of the ring [bytes/s], l the delay of one hop [s]. Nothing overlaps it, as in
our loop: gradients are added up when all of them are there.

g(W), of a base in parts alone: in each of the n passes of a step every GPU is sent each of L blocks
of D bytes, forth and back, the last one once (`modeling.sharding`), around the same ring. One block
comes while another computes, so the longer of the two counts. That is the best there can be: the
first block of a pass, before which nothing computes, is not counted, nor that gathering takes some
of the GPU's own bandwidth. A base that is whole on every GPU has no g.

Source: Patarasuk & Yuan 2009 (the ring; an all-gather is the second half of an all-reduce); Hu et
al. 2021, arXiv:2106.09685 (P); Kaplan et al. 2020, arXiv:2001.08361, sec. 2.1 (2 FLOP for each
weight and token); Chen et al. 2016, arXiv:1604.06174 (one forward pass more to recompute);
Rajbhandari et al. 2020, arXiv:1910.02054, sec. 7 (what travels of parts).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from benchmarks.scale.summary import ring_bytes
from qlora_core.config import AdapterConfig, QuantizationConfig, TrainingConfig
from qlora_core.modeling.shape import Shape, published_config, shape_of
from qlora_core.modeling.stored import parts_of
from qlora_core.training.room import Demand, Room, find_room

Base = Literal["whole", "in parts"]
CASES: tuple[tuple[str, Base], ...] = (
    ("8B", "whole"),
    ("70B", "whole"),
    ("70B", "in parts"),
    ("405B", "in parts"),
)
"""Llama 3.1 in every way that fits; of 8B, which leaves most of a GPU free, not in parts."""
NUM_GPUS = (1, 16, 32, 64)
"""One, and as many as are in machines of eight: the ring passes between machines."""
_DEFAULT = QuantizationConfig(keep_dequantized="off")


@dataclass(frozen=True)
class Assumed:
    """What is assumed and not measured."""

    tokens_per_gpu: int = 8192
    """Of a step."""
    row_tokens: int = 1024
    """Of each row; `dataset.max_length`, if nothing else is said."""
    gpu_bytes: int = 80 * 10**9
    peak_flops: float = 989e12
    """Of an H100 SXM in bfloat16, dense, as its data sheet has it."""
    used_share: float = 0.35
    """Of that peak, while computing."""
    hop_s: float = 30e-6


LINKS = {
    "10 Gbit/s Ethernet": 1.25e9,
    "100 Gbit/s Ethernet": 12.5e9,
    "400 Gbit/s InfiniBand": 50e9,
}
"""Between machines, one for each; a ring passes each machine's link once [bytes/s]."""


@dataclass(frozen=True)
class Projected:
    """One model on one network, on so many GPUs."""

    model: str
    base: Base
    link: str
    num_gpus: int
    num_rows: int
    """Of a pass."""
    recomputes: bool
    compute_s: float
    gather_s: float
    exchange_s: float

    @property
    def step_s(self) -> float:
        """Seconds of a step: t."""
        return max(self.compute_s, self.gather_s) + self.exchange_s

    @property
    def efficiency(self) -> float:
        """The share of a step that is spent computing."""
        return self.compute_s / self.step_s


def trainable_parameters(shape: Shape, rank: int) -> int:
    """Return P: of all adapted layers, rank times (inputs + outputs)."""
    return sum(
        group.count * rank * (group.num_in + group.num_out)
        for group in shape.linears
        if group.has_adapter
    )


def projected(model: str, base: Base, link: str, num_gpus: int, assumed: Assumed) -> Projected:
    """Return what the formula above says.

    Raises:
        ValueError: The model does not fit in this way.
    """
    shape, room = shape_of_llama(model), room_of(model, base, num_gpus, assumed)
    if not room.fits:
        raise ValueError(f"{model} {base} does not fit on {num_gpus} GPU(s), so it has no row.")
    recomputes = room.recompute != "nothing"
    num_frozen = sum(group.num_weights for group in shape.linears)
    flops = (6 if recomputes else 4) * num_frozen * assumed.tokens_per_gpu
    message_bytes = 4 * trainable_parameters(shape, AdapterConfig().rank)
    hops_s = (num_gpus - 1) * assumed.hop_s
    return Projected(
        model,
        base,
        link,
        num_gpus,
        room.num_rows,
        recomputes,
        compute_s=flops / (assumed.used_share * assumed.peak_flops),
        gather_s=_gather_s(shape, link, num_gpus, room, assumed) if base == "in parts" else 0.0,
        exchange_s=ring_bytes(message_bytes, num_gpus) / LINKS[link] + 2 * hops_s,
    )


def _gather_s(shape: Shape, link: str, num_gpus: int, room: Room, assumed: Assumed) -> float:
    """Return g."""
    num_passes = math.ceil(assumed.tokens_per_gpu / assumed.row_tokens / room.num_rows)
    sent_bytes = (num_gpus - 1) * parts_of(shape, _DEFAULT, num_gpus).kept / shape.num_layers
    block_s = sent_bytes / LINKS[link] + (num_gpus - 1) * assumed.hop_s
    return num_passes * (2 * shape.num_layers - 1) * block_s


@cache
def shape_of_llama(model: str) -> Shape:
    """Return the sizes of a Llama 3.1, without any of its weights."""
    return shape_of(published_config(model.lower()), _DEFAULT, AdapterConfig())


@cache
def room_of(model: str, base: Base, num_gpus: int, assumed: Assumed) -> Room:
    """Return how a pass is computed on such a GPU."""
    demand = Demand(
        shape=shape_of_llama(model),
        quantization=_DEFAULT,
        adapter=AdapterConfig(),
        training=TrainingConfig(),
        device="cuda",
        compute_dtype="bfloat16",
        world_size=num_gpus,
        max_length=assumed.row_tokens,
        is_sharded=base == "in parts",
    )
    return find_room(demand, assumed.gpu_bytes)


def all_projected(assumed: Assumed) -> Iterator[Projected]:
    """Yield every model on every network on every number of GPUs that holds it."""
    for model, base in CASES:
        for link in LINKS:
            for num_gpus in NUM_GPUS:
                if base == "whole" or num_gpus > 1:
                    yield projected(model, base, link, num_gpus, assumed)


def table(lines: list[Projected]) -> str:
    """Return the projected efficiencies, as Markdown."""
    most = NUM_GPUS[-1]
    head = ["model", "base", "a pass", "slowest link", "computing a step [s]",
            f"gathers, {most} GPUs [s]", f"a step, {most} GPUs [s]",
            *(f"{n} GPUs" for n in NUM_GPUS if n > 1)]  # fmt: skip
    text = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for model, base, link in dict.fromkeys((line.model, line.base, line.link) for line in lines):
        kind = (model, base, link)
        mine = [ln for ln in lines if (ln.model, ln.base, ln.link) == kind and ln.num_gpus > 1]
        cells = [
            model,
            base,
            _alike(f"{ln.num_rows} rows{', layers again' * ln.recomputes}" for ln in mine),
            link,
            _alike(f"{ln.compute_s:.2f}" for ln in mine),
            f"{mine[-1].gather_s:.2f}" if base == "in parts" else "",
            f"{mine[-1].step_s:.2f}",
            *(f"{ln.efficiency:.1%}" for ln in mine),
        ]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def _alike(texts: Iterator[str]) -> str:
    """Return what is the same on any number of GPUs, or else all there is."""
    return " / ".join(dict.fromkeys(texts))


if __name__ == "__main__":
    print(table(list(all_projected(Assumed()))))
