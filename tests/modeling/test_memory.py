from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
)

from qlora_core.config import AdapterConfig, QuantizationConfig, TrainingConfig
from qlora_core.data.prepared import Rows
from qlora_core.errors import ConfigError
from qlora_core.modeling.activations import num_pairs_of
from qlora_core.modeling.dropout import DrawnPass, dropped_by_row
from qlora_core.modeling.fusing import fused
from qlora_core.modeling.lora import attach_adapter, trainable_parameters
from qlora_core.modeling.memory import (
    MemoryEstimate,
    Workload,
    estimate_full,
    estimate_lora,
    estimate_qlora,
    optimizer_bytes,
)
from qlora_core.modeling.packing import packed_attention
from qlora_core.modeling.quantization import quantize_model
from qlora_core.modeling.shape import Shape, published_config, shape_of
from qlora_core.modeling.sharding import ShardedBase, blocks_of
from qlora_core.modeling.stored import parts_of, quantized_bytes
from qlora_core.training.collation import Batch, collate, pack
from qlora_core.training.comm import Alone
from qlora_core.training.objective import LossFunction

GB = 1e9
CPU = torch.device("cpu")
NF4 = QuantizationConfig()
ADAPTER = AdapterConfig()
TRAINING = TrainingConfig()

LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
)  # fmt: skip
LLAMA_70B = LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
)  # fmt: skip
SMALL = LlamaConfig(
    hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=500, tie_word_embeddings=True,
)  # fmt: skip


def work(
    num_tokens=4096, num_supervised=1024, checkpointing=False, dtype="bfloat16", **others
) -> Workload:
    return Workload(
        **others,
        num_tokens=num_tokens,
        num_supervised=num_supervised,
        recompute="layers" if checkpointing else "nothing",
        compute_dtype=dtype,
    )


def small(config: PretrainedConfig, quantization, dtype=torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).requires_grad_(False)
    quantize_model(model, quantization, dtype, lambda *_: None)
    return model


def bytes_held(model: torch.nn.Module) -> tuple[int, int, int]:
    """(quantised weights, their constants, everything else), counted tensor by tensor."""
    weights = constants = rest = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        scale = getattr(parameter, "SCB", None)
        if state is not None:
            tensors = [state.absmax, state.code]
            if state.nested:
                tensors += [state.state2.absmax, state.state2.code, state.offset]
            constants += sum(t.nbytes for t in tensors)
            weights += parameter.nbytes
        elif scale is not None:
            constants += scale.nbytes
            weights += parameter.nbytes
        else:
            rest += parameter.nbytes
    return weights, constants, rest


@pytest.mark.parametrize(
    "quantization",
    [
        QuantizationConfig(),
        QuantizationConfig(double=False),
        QuantizationConfig(method="fp4"),
        QuantizationConfig(method="int8"),
        QuantizationConfig(method="none"),
        QuantizationConfig(skip=("down_proj",)),
    ],
    ids=["nf4", "nf4-single", "fp4", "int8", "none", "skip-down"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_constants_are_exactly_what_bitsandbytes_holds(quantization, dtype):
    model = small(SMALL, quantization, getattr(torch, dtype))

    shape = shape_of(SMALL, quantization, ADAPTER)
    planned = estimate_qlora(shape, quantization, ADAPTER, TRAINING, work(dtype=dtype))

    assert (planned.weights, planned.constants, planned.unquantized) == bytes_held(model)


@pytest.mark.parametrize("size", [(64, 64), (100, 70), (1, 3), (576, 1536)], ids=str)
@pytest.mark.parametrize("double", [True, False])
def test_ragged_layers_are_counted_to_the_byte(size, double):
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(
        torch.randn(size), quant_type="nf4", compress_statistics=double
    )

    planned = quantized_bytes(*size, QuantizationConfig(double=double))

    constants = state.absmax.nbytes + state.code.nbytes
    if double:
        constants += state.state2.absmax.nbytes + state.state2.code.nbytes + state.offset.nbytes
    assert planned == (packed.nbytes, constants)


@pytest.mark.parametrize(
    "adapter",
    [ADAPTER, AdapterConfig(rank=4, dora=True), AdapterConfig(targets=("q_proj", "v_proj"))],
    ids=str,
)
def test_adapter_gradients_and_moments_are_exactly_what_training_allocates(adapter):
    parameters = trainable_parameters(attach_adapter(small(SMALL, NF4), adapter, 0))
    optimizer = torch.optim.AdamW(parameters.values())
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = optimizer.state.values()

    planned = estimate_qlora(shape_of(SMALL, NF4, adapter), NF4, adapter, TRAINING, work())

    size = sum(p.nbytes for p in parameters.values())
    assert planned.adapter == planned.gradients == size
    assert planned.optimizer == sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in state)


@pytest.mark.parametrize("size", [100, 4096, 5000])
def test_8_bit_moments_are_exactly_what_bitsandbytes_allocates(size):
    import bitsandbytes as bnb

    parameter = torch.nn.Parameter(torch.ones(size))
    parameter.grad = torch.ones_like(parameter)
    optimizer = bnb.optim.AdamW8bit([parameter])
    optimizer.step()
    state = optimizer.state[parameter]

    held = [t for n, t in state.items() if isinstance(t, torch.Tensor) and "qmap" not in n]

    assert optimizer_bytes([size], "adamw_8bit") == sum(t.nbytes for t in held)


def bytes_kept_for_backward(model, batch: Batch) -> int:
    """What autograd really keeps, each storage once, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor
        return tensor

    loss = LossFunction(model)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def padded(*, rows: int, length: int, answer: int) -> Batch:
    return collate(some_rows((length,) * rows, answer), np.arange(rows), CPU)


def packed(lengths: tuple[int, ...], answer: int) -> Batch:
    rows = some_rows(lengths, answer)
    return pack(rows, np.arange(len(lengths)), CPU, shares_prefix=False)


def some_rows(lengths: tuple[int, ...], answer: int) -> Rows:
    """Random rows of which the last tokens are supervised."""
    ids = np.random.default_rng(0).integers(SMALL.vocab_size, size=sum(lengths), dtype=np.int32)
    offsets = np.cumsum([0, *lengths])
    labels = np.full_like(ids, -100)
    for end in offsets[1:]:
        labels[end - answer : end] = ids[end - answer : end]
    return Rows(ids, labels, offsets)


@pytest.mark.parametrize(
    ("dtype", "dropout"), [("float32", 0.0), ("bfloat16", 0.0), ("float32", 0.1)]
)
def test_pefts_activations_are_within_a_tenth_of_what_autograd_keeps(dtype, dropout):
    adapter = AdapterConfig(rank=8, dropout=dropout)
    model = attach_adapter(small(SMALL, NF4, getattr(torch, dtype)), adapter, 0).train()
    rows = DrawnPass(seed=0, step=1, rows=range(4), lengths=(96,) * 4, padded_to=96)
    with dropped_by_row(model) as drops, drops.drawing(rows) if drops else nullcontext():
        kept = bytes_kept_for_backward(model, padded(rows=4, length=96, answer=1))
    load = work(4 * 96, 4, dtype=dtype, is_fused=False)

    planned = estimate_qlora(shape_of(SMALL, NF4, adapter), NF4, adapter, TRAINING, load)

    assert planned.activations == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")], ids=str)
def test_our_own_functions_activations_are_within_a_tenth_of_what_autograd_keeps(targets):
    adapter, lengths = AdapterConfig(rank=8, targets=targets), (96, 200, 70)
    model = attach_adapter(small(SMALL, NF4), adapter, 0).train()
    with fused(model, 10**9), packed_attention(model):
        kept = bytes_kept_for_backward(model, packed(lengths, answer=1))
    num_pairs = sum(num_pairs_of(length) for length in lengths)
    load = work(sum(lengths), 1, dtype="float32", num_pairs=num_pairs)

    planned = estimate_qlora(shape_of(SMALL, NF4, adapter), NF4, adapter, TRAINING, load)

    assert planned.activations == pytest.approx(kept, rel=0.1)


def test_full_fine_tuning_keeps_what_autograd_keeps_within_a_tenth():
    torch.manual_seed(0)
    model = LlamaForCausalLM(SMALL).train()
    kept = bytes_kept_for_backward(model, padded(rows=4, length=96, answer=1))

    planned = estimate_full(shape_of(SMALL, NF4, ADAPTER), work(4 * 96, 4, dtype="float32"))

    assert planned.activations == pytest.approx(kept, rel=0.1)


def test_an_8b_model_in_nf4_takes_under_6_gb_at_4_127_bits():
    shape = shape_of(LLAMA_8B, NF4, ADAPTER)

    planned = estimate_qlora(shape, NF4, ADAPTER, TRAINING, work())

    linear = sum(group.num_weights for group in shape.linears)
    bits = 8 * (planned.weights + planned.constants) / linear
    assert shape.num_parameters == 8_030_261_248  # as Meta published it
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=0.001)
    assert 5.6 * GB < planned.weights + planned.constants + planned.unquantized < 5.8 * GB


def test_double_quantisation_saves_0_37_bits_per_parameter():
    single = QuantizationConfig(double=False)
    shape = shape_of(LLAMA_8B, NF4, ADAPTER)
    linear = sum(group.num_weights for group in shape.linears)

    def constants(quantization: QuantizationConfig) -> int:
        return estimate_qlora(shape, quantization, ADAPTER, TRAINING, work()).constants

    assert 8 * (constants(single) - constants(NF4)) / linear == pytest.approx(0.373, abs=0.001)


def test_full_fine_tuning_takes_16_bytes_per_parameter_before_activations():
    shape = shape_of(LLAMA_8B, NF4, ADAPTER)

    for dtype in ("bfloat16", "float32"):
        full = estimate_full(shape, work(dtype=dtype))
        assert full.weights + full.gradients + full.optimizer == 16 * shape.num_parameters


def total(config: PretrainedConfig, checkpointing=True) -> dict[str, MemoryEstimate]:
    shape = shape_of(config, NF4, ADAPTER)
    load = work(2048, 512, checkpointing)
    return {
        "qlora": estimate_qlora(shape, NF4, ADAPTER, TRAINING, load),
        "lora": estimate_lora(shape, ADAPTER, TRAINING, load),
        "full": estimate_full(shape, load),
    }


def test_a_70b_model_fits_one_80_gb_gpu_with_qlora_alone():
    """QLoRA's claim: 780 GB of full fine-tuning become less than 48 for 65B (abstract)."""
    planned = total(LLAMA_70B)

    assert planned["qlora"].total < 60 * GB
    assert 140 * GB < planned["lora"].total < 160 * GB
    assert planned["full"].total > 1100 * GB


def test_checkpointing_moves_activations_and_logits_that_are_gone_before_it_alone():
    off, on = total(LLAMA_8B, False)["qlora"], total(LLAMA_8B, True)["qlora"]

    assert on.activations < off.activations / 10
    assert on.logits + on.workspace == max(off.logits, off.workspace)
    assert on.model_copy(update={"activations": off.activations, "logits": off.logits}) == off


def test_activations_grow_with_tokens_and_logits_with_supervised_ones():
    shape = shape_of(SMALL, NF4, ADAPTER)

    def estimate(tokens: int, supervised: int) -> MemoryEstimate:
        return estimate_qlora(shape, NF4, ADAPTER, TRAINING, work(tokens, supervised))

    one, more_tokens, more_answers = estimate(100, 10), estimate(200, 10), estimate(100, 20)
    assert more_tokens.activations == pytest.approx(2 * one.activations, abs=1)
    assert more_tokens.logits == one.logits
    assert more_answers.logits == pytest.approx(2 * one.logits)
    assert more_answers.activations == one.activations


def test_weights_kept_dequantised_are_counted_up_to_their_budget():
    model = small(SMALL, NF4)
    shape = shape_of(SMALL, NF4, ADAPTER)
    dense = sum(  # what modeling.dense keeps: every 4-bit layer, in the compute dtype
        m.weight.quant_state.shape.numel() * 4
        for m in model.modules()
        if type(m).__name__ == "Linear4bit"
    )

    def planned(quantization: QuantizationConfig, budget: int) -> int:
        load = work(dtype="float32").model_copy(update={"dense_budget_bytes": budget})
        return estimate_qlora(shape, quantization, ADAPTER, TRAINING, load).dense

    assert planned(NF4, 10**9) == dense > 0
    assert planned(NF4, 1000) == 1000
    assert planned(NF4, 0) == planned(QuantizationConfig(method="int8"), 10**9) == 0


def test_paged_moments_are_marked_as_movable():
    shape = shape_of(SMALL, NF4, ADAPTER)
    paged = TrainingConfig(optimizer="paged_adamw_8bit")

    planned = estimate_qlora(shape, NF4, ADAPTER, paged, work())

    assert planned.paged == planned.optimizer > 0
    assert planned.total == sum(size for _, size in planned.components())


def test_a_gpt2_is_counted_although_it_stores_weights_transposed():
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=2)
    real = AutoModelForCausalLM.from_config(config)

    shape = shape_of(config, NF4, ADAPTER)

    assert shape.num_parameters == sum(p.numel() for p in real.parameters())
    sizes = {(group.num_out, group.num_in): group.count for group in shape.linears}
    assert sizes == {(192, 64): 2, (64, 64): 2, (256, 64): 2, (64, 256): 2}


def test_the_shape_is_plain_data():
    shape = shape_of(LLAMA_8B, NF4, ADAPTER)

    assert Shape.model_validate_json(shape.model_dump_json()) == shape


def test_targets_that_match_nothing_are_an_error_in_the_plan_already():
    with pytest.raises(ConfigError, match="wq_proj"):
        shape_of(SMALL, NF4, AdapterConfig(targets=("wq_proj",)))


def test_a_part_of_a_sharded_base_is_predicted_to_the_byte():
    for quantization in (NF4, QuantizationConfig(double=False)):
        model, alone = small(SMALL, quantization), ShardedBase(Alone())
        blocks = blocks_of(model)
        for block in blocks:
            alone.take(block)

        planned = parts_of(shape_of(SMALL, quantization, ADAPTER), quantization, 1)

        assert planned.kept == alone.part_bytes
        with alone.at_hand(blocks[0]), alone.at_hand(blocks[1]):
            assert planned.gathered == alone.present_bytes


@pytest.mark.parametrize(
    ("size", "num_parameters", "num_linear", "block_gb"),
    # linear weights of a layer, 2 H^2 + 2 H (8 H / heads) + 3 H F, times layers; of a block in GB
    [
        ("8b", 8_030_261_248, 6_979_321_856, 0.1125),
        ("70b", 70_553_706_496, 68_451_041_280, 0.4412),
        ("405b", 405_853_388_800, 401_646_551_040, 1.6436),
    ],
)
def test_a_published_size_needs_what_hand_arithmetic_says(
    size, num_parameters, num_linear, block_gb
):
    """A 4-bit weight takes half a byte, and its scale a byte for each 64 of them."""
    config = published_config(size)
    shape = shape_of(config, NF4, ADAPTER)
    per_weight = 1 / 2 + 1 / 64

    parts = parts_of(shape, NF4, 8)

    assert shape.num_parameters == num_parameters  # as Meta published them
    assert sum(group.num_weights for group in shape.linears) == num_linear
    assert parts.kept == pytest.approx(num_linear * per_weight / 8, rel=1e-5)
    assert parts.gathered / 2 / GB == pytest.approx(block_gb, abs=0.0001)


def test_sharding_divides_the_base_and_nothing_else():
    shape = shape_of(LLAMA_70B, NF4, ADAPTER)
    whole = estimate_qlora(shape, NF4, ADAPTER, TRAINING, work())

    parts = estimate_qlora(shape, NF4, ADAPTER, TRAINING, work(num_shards=4))
    on_host = estimate_qlora(shape, NF4, ADAPTER, TRAINING, work(num_shards=4, offloads_base=True))

    assert 4 * parts.weights + parts.constants == pytest.approx(
        whole.weights + whole.constants, rel=0.001
    )
    changed = {"weights", "constants", "gathered"}
    assert whole.model_dump(exclude=changed) == parts.model_dump(exclude=changed)
    sent = parts.weights // 80  # of one layer, which goes to the GPU before others get it
    with_sent = {"weights": 0, "gathered": parts.gathered + sent}
    assert on_host == parts.model_copy(update=with_sent)
