import hashlib
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from qlora_core.config import QuantizationConfig
from qlora_core.errors import ConfigError, ModelError
from qlora_core.modeling.loading import load_base
from qlora_core.modeling.nf4 import dequantize_nf4_double, quantize_nf4_double
from qlora_core.modeling.quantization import (
    dequantized,
    layers_to_quantize,
    quantize_model,
    save_checkpoint,
    stored_bytes,
)
from tests.tiny import make_tiny_tokenizer

IDS = torch.arange(3, 35).reshape(2, 16)
METHODS = {
    "nf4": QuantizationConfig(),
    "nf4-single": QuantizationConfig(double=False),
    "fp4": QuantizationConfig(method="fp4"),
    "int8": QuantizationConfig(method="int8"),
    "none": QuantizationConfig(method="none"),
}


def original(folder: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def ignore(done: int, total: int, name: str) -> None:
    pass


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def quantised(folder: Path, config: QuantizationConfig, dtype: torch.dtype = torch.float32):
    model = original(folder)
    result = quantize_model(model, config, dtype, ignore)
    return model, result


def saved(model, folder: Path) -> Path:
    save_checkpoint(model, make_tiny_tokenizer(), folder / "model")
    return folder


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_base_loads_with_bitwise_the_same_answers(name, tiny_llama, tmp_path):
    model, _ = quantised(tiny_llama, METHODS[name])
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False

    loaded = load_base(saved(model, tmp_path))

    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


def test_a_saved_base_holds_bitwise_the_same_weights(tiny_llama, tmp_path):
    model, result = quantised(tiny_llama, METHODS["nf4"])

    loaded = load_base(saved(model, tmp_path))

    for name in result.layer_errors:
        ours, theirs = model.get_submodule(name), loaded.get_submodule(name)
        assert torch.equal(dequantized(ours), dequantized(theirs))


def test_weights_are_the_reference_s_nf4(tiny_llama):
    name = "model.layers.1.mlp.down_proj"
    weight = original(tiny_llama).get_submodule(name).weight.detach()

    model, _ = quantised(tiny_llama, METHODS["nf4"])

    expected = dequantize_nf4_double(quantize_nf4_double(weight), weight.shape)
    assert_close(dequantized(model.get_submodule(name)), expected, rtol=1e-6, atol=1e-9)


def test_the_checkpoint_answers_like_transformers_own_quantisation(tiny_llama, tmp_path):
    peer = AutoModelForCausalLM.from_pretrained(
        tiny_llama,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    )
    model, result = quantised(tiny_llama, METHODS["nf4"])

    by_peer = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path) / "model")

    for name in result.layer_errors:
        assert torch.equal(
            dequantized(by_peer.get_submodule(name)), dequantized(peer.get_submodule(name))
        )


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_layer_errors_are_those_of_an_independent_float64_computation(name, tiny_llama, tmp_path):
    model, result = quantised(tiny_llama, METHODS[name])
    before = original(tiny_llama)

    loaded = load_base(saved(model, tmp_path))

    assert len(result.layer_errors) == 14
    for layer, error in result.layer_errors.items():
        exact = before.get_submodule(layer).weight.detach().double()
        noise = dequantized(loaded.get_submodule(layer)).double() - exact
        assert error == pytest.approx((noise.square().mean() / exact.square().mean()).sqrt().item())
        assert 1e-4 < error < 0.2


def test_noise_grows_from_int8_over_nf4_to_fp4(tiny_llama):
    means = []
    for name in ("int8", "nf4", "fp4"):
        _, result = quantised(tiny_llama, METHODS[name])
        means.append(sum(result.layer_errors.values()))

    assert means == sorted(means)
    assert means[0] < means[1] / 5


def test_double_quantisation_saves_what_the_paper_says(tmp_path):
    size = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=1, tie_word_embeddings=True, **size)
    num_bytes = {}
    for double in (True, False):
        model = LlamaForCausalLM(config)
        result = quantize_model(model, QuantizationConfig(double=double), torch.float32, ignore)
        num_bytes[double] = stored_bytes(saved(model, tmp_path / str(double)) / "model")

    saved_bits = 8 * (num_bytes[False] - num_bytes[True]) / result.num_quantized_parameters

    table_bits = 8 * 1024 * 7 / result.num_quantized_parameters  # 256 levels with each layer
    assert saved_bits + table_bits == pytest.approx(0.5 - 0.127, abs=0.005)  # section 3


@pytest.mark.parametrize(("method", "num_quantised"), [("nf4", 1), ("fp4", 1), ("int8", 7)])
def test_layers_whose_rows_hold_no_whole_blocks_are_left_and_named(method, num_quantised, tmp_path):
    size = {"hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **size))

    config = QuantizationConfig(method=method)
    result = quantize_model(model, config, torch.float32, ignore)

    assert len(result.layer_errors) == num_quantised
    assert len(result.left_whole) == 7 - num_quantised
    assert max(result.layer_errors.values()) < 0.13
    loaded = load_base(saved(model.eval(), tmp_path))
    kept = {name for name, m in loaded.named_modules() if type(m) is torch.nn.Linear}
    assert kept == {"lm_head", *result.left_whole}


def test_the_tied_head_and_skipped_modules_stay_as_they_were(tiny_llama):
    config = QuantizationConfig(skip=("mlp.down_proj", "layers.0.self_attn"))

    model, result = quantised(tiny_llama, config)

    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sorted(result.layer_errors) == [
        *(f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up")),
        *(f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up")),
        *(f"model.layers.1.self_attn.{n}_proj" for n in "koqv"),
    ]


def test_skipped_modules_are_skipped_again_when_it_is_loaded(tiny_llama, tmp_path):
    model, result = quantised(tiny_llama, QuantizationConfig(skip=("layers.1.mlp",)))

    loaded = load_base(saved(model, tmp_path))

    four_bit = {n for n, m in loaded.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert four_bit == set(result.layer_errors)


def test_skipping_what_is_not_there_is_an_error(tiny_llama):
    with pytest.raises(ConfigError, match=r"mlp\.dwon_proj"):
        layers_to_quantize(original(tiny_llama), QuantizationConfig(skip=("mlp.dwon_proj",)))


def test_skipping_everything_is_an_error(tiny_llama):
    with pytest.raises(ModelError, match="no linear layer"):
        layers_to_quantize(original(tiny_llama), QuantizationConfig(skip=("model",)))


def test_a_weight_that_is_not_finite_is_refused_by_name(tiny_llama):
    model = original(tiny_llama)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")

    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj"):
        quantize_model(model, METHODS["nf4"], torch.float32, ignore)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_that_is_not_quantised_is_stored_in_the_compute_dtype(dtype, tiny_llama, tmp_path):
    model, _ = quantised(tiny_llama, METHODS["nf4"], dtype)

    loaded = load_base(saved(model, tmp_path))

    layer = loaded.model.layers[0].mlp.up_proj
    assert layer.weight.quant_state.dtype is dtype
    assert layer.compute_dtype is dtype
    assert loaded.model.embed_tokens.weight.dtype is dtype
    assert loaded.model.norm.weight.dtype is dtype


def test_plain_lora_keeps_the_weights_in_the_compute_dtype(tiny_llama, tmp_path):
    model, result = quantised(tiny_llama, METHODS["none"], torch.bfloat16)

    loaded = load_base(saved(model, tmp_path))

    assert result.layer_errors == {}
    assert result.num_quantized_parameters == 0
    expected = original(tiny_llama).to(torch.bfloat16)
    for name, parameter in expected.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)


def test_the_same_model_makes_the_same_bytes(tiny_llama, tmp_path):
    first, second = (
        saved(quantised(tiny_llama, METHODS["nf4"])[0], tmp_path / n) / "model" for n in "ab"
    )

    names = sorted(path.name for path in first.iterdir())
    assert "model.safetensors" in names
    assert "chat_template.jinja" in names
    assert [digest(first / n) for n in names] == [digest(second / n) for n in names]


def test_layers_that_store_weights_transposed_are_quantised_too(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=297, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    before = logits(model)

    result = quantize_model(model, METHODS["nf4"], torch.float32, ignore)
    loaded = load_base(saved(model, tmp_path))

    assert len(result.layer_errors) == 8
    assert_close(logits(loaded), before, rtol=0, atol=0.2 * before.abs().max().item())


def test_answers_are_the_same_after_an_evaluation_without_gradients(tiny_llama, tmp_path):
    """bitsandbytes repacks weights in eval mode on some CPUs, and computes in bfloat16 then."""
    model, _ = quantised(tiny_llama, METHODS["nf4"])
    loaded = load_base(saved(model, tmp_path))
    layer = loaded.model.layers[0].mlp.up_proj
    packed = layer.weight.data.clone()
    x_BI = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        answer_BO = layer(x_BI)

    assert torch.equal(layer.weight.data, packed)
    assert_close(answer_BO, x_BI @ dequantized(layer).T)
