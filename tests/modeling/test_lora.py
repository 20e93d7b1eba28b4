import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from qlora_core.config import AdapterConfig, QuantizationConfig
from qlora_core.errors import ArtifactError, ConfigError, ModelError
from qlora_core.modeling.loading import load_base
from qlora_core.modeling.lora import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_state,
    attach_adapter,
    load_adapter,
    load_adapter_state,
    save_adapter,
    trainable_parameters,
)
from qlora_core.modeling.quantization import quantize_model, save_checkpoint
from tests.tiny import make_tiny_tokenizer

IDS = torch.arange(3, 35).reshape(2, 16)
RANK4 = AdapterConfig(rank=4, alpha=8)
METHODS = ("nf4", "fp4", "int8", "none")


@pytest.fixture(scope="module")
def bases(tiny_llama, tmp_path_factory) -> dict[str, Path]:
    """Folders of the tiny Llama, quantised in each way, computing in float32."""
    made = {}
    for method in METHODS:
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        config = QuantizationConfig(method=method)
        quantize_model(model, config, torch.float32, lambda *_: None)
        made[method] = tmp_path_factory.mktemp(method)
        save_checkpoint(model, make_tiny_tokenizer(), made[method] / "model")
    return made


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def disturbed(model: PeftModel, seed: int = 0) -> PeftModel:
    """Move every adapter weight, so that the adapter matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable_parameters(model).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_a_new_adapter_changes_nothing(method, init, bases):
    expected = logits(load_base(bases[method]))

    model = attach_adapter(load_base(bases[method]), RANK4.model_copy(update={"init": init}), 0)

    assert torch.equal(logits(model.eval()), expected)


@pytest.mark.parametrize("method", ["nf4", "fp4", "none"])
@pytest.mark.parametrize("changes", [{"init": "orthogonal"}, {"dora": True}], ids=str)
def test_starts_that_are_not_zero_cancel_out(method, changes, bases):
    expected = logits(load_base(bases[method]))

    model = attach_adapter(load_base(bases[method]), RANK4.model_copy(update=changes), 0)

    assert_close(logits(model.eval()), expected, rtol=1e-4, atol=1e-5)


def test_an_orthogonal_start_gives_both_factors_a_gradient(bases):
    model = attach_adapter(load_base(bases["nf4"]), AdapterConfig(rank=4, init="orthogonal"), 0)

    model(IDS, labels=IDS).loss.backward()

    for parameter in trainable_parameters(model).values():
        assert parameter.abs().max() > 0
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("method", METHODS)
def test_every_linear_layer_but_the_head_gets_an_adapter_and_nothing_else_trains(method, bases):
    model = attach_adapter(load_base(bases[method]), RANK4, 0)

    parameters = trainable_parameters(model)

    assert len(parameters) == 2 * 14
    assert all("lora_" in name and "lm_head" not in name for name in parameters)
    assert list(parameters) == sorted(parameters)


def test_adapter_weights_are_float32_on_a_base_that_computes_in_bfloat16(tiny_llama):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)

    model = attach_adapter(base, RANK4, 0)

    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}


def test_the_same_seed_gives_the_same_adapter_and_moves_nobody_s_random_state(bases):
    torch.manual_seed(1)
    first = adapter_state(attach_adapter(load_base(bases["nf4"]), RANK4, 7))
    drawn = torch.rand(3)
    torch.manual_seed(1)
    expected = torch.rand(3)
    again = adapter_state(attach_adapter(load_base(bases["nf4"]), RANK4, 7))
    other = adapter_state(attach_adapter(load_base(bases["nf4"]), RANK4, 8))

    assert torch.equal(drawn, expected)
    assert list(first) == list(again)
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = [name for name in first if not torch.equal(first[name], other[name])]
    assert len(changed) == 14  # every A; B is zero whatever the seed


@pytest.mark.parametrize("rslora", [False, True])
def test_the_adapter_is_scaled_as_the_papers_say(rslora, bases):
    config = AdapterConfig(rank=4, alpha=6, rslora=rslora, targets=("layers.0.mlp.up_proj",))
    base = load_base(bases["none"])
    x_BI = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    weight_OI = base.model.layers[0].mlp.up_proj.weight.detach().clone()

    model = disturbed(attach_adapter(base, config, 0)).eval()

    state = adapter_state(model)
    a_RI, b_OR = (next(t for n, t in state.items() if f"lora_{f}" in n) for f in "AB")
    scaling = 6 / 4**0.5 if rslora else 6 / 4
    expected = (weight_OI.double() + scaling * b_OR.double() @ a_RI.double()) @ x_BI.double().T
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert_close(layer(x_BI).double(), expected.T, rtol=1e-5, atol=1e-6)


def test_targets_are_matched_by_the_endings_of_names(bases):
    config = AdapterConfig(rank=4, targets=("q_proj", "layers.1.mlp.up_proj"))

    model = attach_adapter(load_base(bases["nf4"]), config, 0)

    names = [n.removesuffix(".lora_A.weight") for n in adapter_state(model) if "lora_A" in n]
    assert [n.removeprefix("base_model.model.model.layers.") for n in names] == [
        "0.self_attn.q_proj",
        "1.mlp.up_proj",
        "1.self_attn.q_proj",
    ]


@pytest.mark.parametrize("target", ["query", "lm_head", "embed_tokens"])
def test_a_target_that_matches_nothing_is_refused_with_what_would_match(target, bases):
    config = AdapterConfig(targets=("q_proj", target))

    with pytest.raises(ConfigError, match=rf"'{target}' matches no linear layer") as raised:
        attach_adapter(load_base(bases["nf4"]), config, 0)
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in raised.value.fix


def test_an_orthogonal_start_of_odd_rank_is_refused(bases):
    with pytest.raises(ConfigError, match=r"even adapter\.rank, not 5"):
        attach_adapter(load_base(bases["nf4"]), AdapterConfig(rank=5, init="orthogonal"), 0)


def test_dora_on_int8_is_refused(bases):
    with pytest.raises(ConfigError, match="dora"):
        attach_adapter(load_base(bases["int8"]), AdapterConfig(dora=True), 0)


@pytest.mark.parametrize(
    ("method", "dora"),
    [*((m, False) for m in METHODS), ("nf4", True), ("fp4", True), ("none", True)],
)
def test_a_saved_adapter_answers_the_same_in_plain_peft_and_in_ours(method, dora, bases, tmp_path):
    config = RANK4.model_copy(update={"dora": dora, "rslora": True})
    model = disturbed(attach_adapter(load_base(bases[method]), config, 0)).eval()
    expected = logits(model)
    assert not torch.allclose(expected, logits(load_base(bases[method])), atol=1e-3)

    save_adapter(model, tmp_path, "org/base", "abc123")

    by_peft = PeftModel.from_pretrained(load_base(bases[method]), tmp_path)
    by_us = load_adapter(load_base(bases[method]), tmp_path)
    assert torch.equal(logits(by_peft), expected)
    assert torch.equal(logits(by_us), expected)
    assert not any(parameter.requires_grad for parameter in by_us.parameters())
    settings = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/base", "abc123")


def test_an_adapter_made_by_plain_peft_loads_here(bases, tmp_path):
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = disturbed(get_peft_model(load_base(bases["nf4"]), settings)).eval()
    model.save_pretrained(tmp_path)

    loaded = load_adapter(load_base(bases["nf4"]), tmp_path)

    assert torch.equal(logits(loaded), logits(model))


def test_the_same_weights_make_the_same_bytes(bases, tmp_path):
    for name in "ab":
        model = disturbed(attach_adapter(load_base(bases["nf4"]), RANK4, 0))
        save_adapter(model, tmp_path / name, "base", None)

    for file in (WEIGHTS_FILE, CONFIG_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_state_goes_in_place_and_comes_back_as_it_was(bases, tmp_path):
    source = disturbed(attach_adapter(load_base(bases["nf4"]), RANK4, 0))
    target = attach_adapter(load_base(bases["nf4"]), RANK4, 1)
    before = trainable_parameters(target)

    load_adapter_state(target, adapter_state(source))

    after = trainable_parameters(target)
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(logits(target.eval()), logits(source.eval()))
    save_adapter(target, tmp_path, "base", None)
    assert load_file(tmp_path / WEIGHTS_FILE).keys() == adapter_state(target).keys()


@pytest.mark.parametrize("damage", ["missing", "unexpected", "another shape"])
def test_state_that_does_not_fit_is_refused(damage, bases):
    model = attach_adapter(load_base(bases["nf4"]), RANK4, 0)
    state = dict(adapter_state(model))
    name = next(iter(state))
    if damage == "missing":
        del state[name]
    elif damage == "unexpected":
        state["base_model.model.lm_head.lora_A.weight"] = state[name]
    else:
        state[name] = state[name][:, :-1]

    with pytest.raises(ArtifactError, match=f"1 (of )?{damage}"):
        load_adapter_state(model, state)


def test_a_damaged_adapter_is_an_artefact_error(bases, tmp_path):
    save_adapter(attach_adapter(load_base(bases["nf4"]), RANK4, 0), tmp_path, "base", None)
    weights = tmp_path / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-50])

    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_adapter(load_base(bases["nf4"]), tmp_path)


def test_an_architecture_that_peft_cannot_adapt_is_refused_with_a_way_out():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1))

    with pytest.raises(ModelError, match="cannot adapt all layers of MambaForCausalLM") as caught:
        attach_adapter(model, AdapterConfig(), seed=0)
    assert "adapter.targets" in caught.value.fix


def test_experts_that_peft_would_adapt_but_nobody_could_merge_are_refused():
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    experts = {"num_experts": 2, "moe_intermediate_size": 16, "num_experts_per_tok": 1}
    shared = {"shared_expert_intermediate_size": 16, "layer_types": ["full_attention"]}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**sizes, **experts, **shared, **heads))

    with pytest.raises(ModelError, match="stacked experts of Qwen3NextForCausalLM"):
        attach_adapter(model, AdapterConfig(), seed=0)
