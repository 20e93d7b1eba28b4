"""What many GPUs would do, as arithmetic: nothing in here is measured.

With W GPUs that train data-parallel, each on its own B tokens a step, a step takes

    t(W) = c + s(W)              c = 4 N B / (u F)
                                 s(W) = 2 (W - 1) / W * 4 P / b + 2 (W - 1) * l

and the efficiency is c / t(W). N frozen weights that each token is multiplied by, forward and in
the backward pass to the layers below (2 FLOP each; they get no gradients themselves; the head is
left out), P trainable parameters whose float32 gradients are added up, F the GPU's peak [FLOP/s], u
the share of it that is reached, b the bandwidth of the slowest link of the ring [bytes/s], l the
delay of one hop [s]. Nothing overlaps, as in our loop: gradients are added up when all of them are
there. Every GPU holds the whole base, so a model that does not fit on one is not projected.

Source: Patarasuk & Yuan 2009 (the ring); Hu et al. 2021, arXiv:2106.09685 (P); Kaplan et al. 2020,
arXiv:2001.08361, sec. 2.1 (2 FLOP for each weight and token).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.scale.summary import ring_bytes
from qlora_core.config import AdapterConfig, QuantizationConfig
from qlora_core.modeling.shape import Shape, shape_of

LLAMA: dict[str, dict[str, Any]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64},
}  # fmt: skip
"""Sizes of Llama 3.1 (Grattafiori et al. 2024, arXiv:2407.21783, table 3)."""
NUM_GPUS = (1, 16, 32, 64)
"""One, and as many as are in machines of eight: the ring passes between machines."""


@dataclass(frozen=True)
class Assumed:
    """What is assumed and not measured."""

    tokens_per_gpu: int = 8192
    """Of a step."""
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
    link: str
    num_gpus: int
    compute_s: float
    exchange_s: float

    @property
    def efficiency(self) -> float:
        """The share of a step that is spent computing."""
        return self.compute_s / (self.compute_s + self.exchange_s)


def trainable_parameters(shape: Shape, rank: int) -> int:
    """Return P: of all adapted layers, rank times (inputs + outputs)."""
    return sum(
        group.count * rank * (group.num_in + group.num_out)
        for group in shape.linears
        if group.has_adapter
    )


def projected(shape: Shape, model: str, link: str, num_gpus: int, assumed: Assumed) -> Projected:
    """Return what the formula above says."""
    num_frozen = sum(group.num_weights for group in shape.linears)
    flops = 4 * num_frozen * assumed.tokens_per_gpu
    message_bytes = 4 * trainable_parameters(shape, AdapterConfig().rank)
    hops_s = 2 * (num_gpus - 1) * assumed.hop_s
    return Projected(
        model,
        link,
        num_gpus,
        compute_s=flops / (assumed.used_share * assumed.peak_flops),
        exchange_s=ring_bytes(message_bytes, num_gpus) / LINKS[link] + hops_s,
    )


def shape_of_llama(model: str) -> Shape:
    """Return the sizes of a Llama 3.1, without any of its weights."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        **LLAMA[model], num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False
    )
    return shape_of(config, QuantizationConfig(), AdapterConfig())


def all_projected(assumed: Assumed) -> Iterator[Projected]:
    """Yield every model on every network on every number of GPUs."""
    for model in LLAMA:
        shape = shape_of_llama(model)
        for link in LINKS:
            for num_gpus in NUM_GPUS:
                yield projected(shape, model, link, num_gpus, assumed)


def table(lines: list[Projected]) -> str:
    """Return the projected efficiencies, as Markdown."""
    head = " | ".join(f"{n} GPUs" for n in NUM_GPUS if n > 1)
    text = [f"| model | slowest link | computing a step [s] | {head} |"]
    text.append("| " + " | ".join(["---"] * (3 + len(NUM_GPUS) - 1)) + " |")
    for model, link in dict.fromkeys((line.model, line.link) for line in lines):
        mine = [line for line in lines if (line.model, line.link) == (model, link)]
        shares = " | ".join(f"{line.efficiency:.1%}" for line in mine if line.num_gpus > 1)
        text.append(f"| {model} | {link} | {mine[0].compute_s:.2f} | {shares} |")
    return "\n".join(text)
