import pytest
import torch

from qlora_core.config import AdapterConfig, ModelConfig, QuantizationConfig
from qlora_core.modeling.loading import load_original
from qlora_core.modeling.lora import attach_adapter, trainable_parameters
from qlora_core.modeling.products import fused_products
from qlora_core.modeling.quantization import quantize_model
from qlora_core.sources import find_source


@pytest.fixture
def adapted(tiny_llama):
    def make(method: str = "nf4", dtype: torch.dtype = torch.float32, **settings):
        source = find_source(str(tiny_llama))
        base = load_original(ModelConfig(source=str(tiny_llama)), source, dtype)
        if method != "none":
            quantize_model(base, QuantizationConfig(method=method), dtype, lambda *_: None)
        config = AdapterConfig(**({"rank": 4} | settings))
        model = attach_adapter(base.requires_grad_(False), config, seed=0)
        generator = torch.Generator().manual_seed(1)
        for parameter in trainable_parameters(model).values():
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return model.train()

    return make


def loss_and_gradients(model):
    ids = torch.arange(3, 27).reshape(2, 12)
    loss = model(input_ids=ids, labels=ids).loss
    return loss.detach(), torch.autograd.grad(loss, list(trainable_parameters(model).values()))


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("budget_bytes", [0, 40_000, 10**9], ids=["none", "some", "all"])
@pytest.mark.parametrize("method", ["nf4", "fp4", "none"])
def test_fused_products_give_pefts_loss_and_gradients(adapted, method, budget_bytes):
    model = adapted(method, rslora=True)
    expected = loss_and_gradients(model)

    with fused_products(model, budget_bytes) as fused:
        found = loss_and_gradients(model)

    assert len(fused.base_layers) == 14
    assert (fused.spare_bytes < budget_bytes) == (budget_bytes > 0)
    assert_same(found, expected)


def test_layers_are_fused_whichever_of_them_carry_an_adapter(adapted):
    model = adapted(targets=["q_proj", "v_proj", "up_proj"])
    expected = loss_and_gradients(model)

    with fused_products(model, 10**9) as fused:
        found = loss_and_gradients(model)

    assert len(fused.base_layers) == 6
    assert_same(found, expected)


def test_biases_of_the_frozen_layers_are_added(adapted):
    model = adapted("none")
    for name, layer in model.named_modules():
        if name.endswith(("q_proj.base_layer", "v_proj.base_layer", "down_proj.base_layer")):
            bias = 0.1 * torch.randn(layer.out_features)
            layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    expected = loss_and_gradients(model)

    with fused_products(model, 10**9):
        found = loss_and_gradients(model)

    assert_same(found, expected)


def test_recomputed_activations_are_fused_as_well(adapted):
    model = adapted()
    expected = loss_and_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})

    with fused_products(model, 10**9):
        found = loss_and_gradients(model)

    assert_same(found, expected)


def test_siblings_called_with_other_inputs_compute_alone(adapted):
    model = adapted()
    attention = model.get_base_model().model.layers[0].self_attn
    x, other = (
        torch.randn(2, 5, attention.q_proj.in_features),
        torch.randn(2, 5, attention.q_proj.in_features),
    )
    expected = [attention.q_proj(x), attention.k_proj(other), attention.q_proj(other)]

    with fused_products(model, 10**9):
        found = [attention.q_proj(x), attention.k_proj(other), attention.q_proj(other)]

    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{"dropout": 0.1}, {"dora": True}])
def test_what_is_not_plain_lora_is_left_to_peft(adapted, settings):
    with fused_products(adapted(**settings), 10**9) as fused:
        assert fused.base_layers == frozenset()


def test_products_of_other_dtypes_are_left_to_peft(adapted):
    with fused_products(adapted("none", torch.bfloat16), 10**9) as fused:
        assert fused.base_layers == frozenset()


def test_after_the_block_the_layers_are_pefts_again(adapted):
    model = adapted()

    with fused_products(model, 10**9):
        assert any("forward" in vars(layer) for layer in model.modules())

    assert not any("forward" in vars(layer) for layer in model.modules())
