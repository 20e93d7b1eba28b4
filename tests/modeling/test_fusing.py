import weakref
from contextlib import ExitStack

import pytest
import torch

from qlora_core.config import AdapterConfig, ModelConfig, QuantizationConfig
from qlora_core.modeling.fusing import _Norm, _replace_if_same, fused
from qlora_core.modeling.loading import load_original
from qlora_core.modeling.lora import attach_adapter, trainable_parameters
from qlora_core.modeling.quantization import quantize_model
from qlora_core.sources import find_source
from tests.tiny import small_model


@pytest.fixture
def adapted(tiny_llama):
    def make(method: str = "nf4", dtype: torch.dtype = torch.float32, **settings):
        source = find_source(str(tiny_llama))
        base = load_original(ModelConfig(source=str(tiny_llama)), source, dtype)
        if method != "none":
            quantize_model(base, QuantizationConfig(method=method), dtype, lambda *_: None)
        return with_adapter(base, AdapterConfig(**({"rank": 4} | settings)))

    return make


def with_adapter(base, config: AdapterConfig):
    """A model in training whose adapter is not zero, so that all gradients are at work."""
    model = attach_adapter(base.requires_grad_(False), config, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(model).values():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.train()


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
def test_fused_functions_give_pefts_loss_and_gradients(adapted, method, budget_bytes):
    model = adapted(method, rslora=True)
    expected = loss_and_gradients(model)

    with fused(model, budget_bytes) as taken:
        found = loss_and_gradients(model)

    assert len(taken.base_layers) == 14
    takes = budget_bytes > 0 and method != "none"  # whole weights are kept anyway
    assert (taken.spare_bytes < budget_bytes) == takes
    assert_same(found, expected)


def test_layers_are_fused_whichever_of_them_carry_an_adapter(adapted):
    model = adapted(targets=["q_proj", "v_proj", "up_proj"])
    expected = loss_and_gradients(model)

    with fused(model, 10**9) as taken:
        found = loss_and_gradients(model)

    assert len(taken.base_layers) == 6
    assert_same(found, expected)


def test_biases_of_the_frozen_layers_are_added(adapted):
    model = adapted("none")
    for name, layer in model.named_modules():
        if name.endswith(("q_proj.base_layer", "v_proj.base_layer", "down_proj.base_layer")):
            bias = 0.1 * torch.randn(layer.out_features)
            layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    expected = loss_and_gradients(model)

    with fused(model, 10**9):
        found = loss_and_gradients(model)

    assert_same(found, expected)


def test_recomputed_activations_are_fused_as_well(adapted):
    model = adapted()
    expected = loss_and_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})

    with fused(model, 10**9):
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

    with fused(model, 10**9):
        found = [attention.q_proj(x), attention.k_proj(other), attention.q_proj(other)]

    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{"dropout": 0.1}, {"dora": True}])
def test_what_is_not_plain_lora_is_left_to_peft(adapted, settings):
    with fused(adapted(**settings), 10**9) as taken:
        assert taken.base_layers == frozenset()
        assert taken.num_left == 14


@pytest.mark.parametrize("method", ["nf4", "none"])
def test_in_16_bits_the_gradients_are_as_near_to_the_exact_ones_as_pefts(adapted, method):
    exact = loss_and_gradients(adapted(method))
    model = adapted(method, torch.bfloat16)
    theirs = loss_and_gradients(model)

    with fused(model, 10**9) as taken:
        ours = loss_and_gradients(model)

    assert taken.num_left == 0
    assert all(gradient.dtype == torch.float32 for gradient in ours[1])
    assert distance(ours[1], exact[1]) <= 1.5 * distance(theirs[1], exact[1])


def distance(found, expected) -> float:
    pairs = zip(found, expected, strict=True)
    squares = [float((a - b).square().sum() / b.square().sum()) for a, b in pairs]
    return sum(squares) ** 0.5


def test_after_the_block_the_layers_are_pefts_again(adapted):
    model = adapted()

    with fused(model, 10**9):
        assert any("forward" in vars(layer) for layer in model.modules())

    assert not any("forward" in vars(layer) for layer in model.modules())


@pytest.mark.parametrize(
    ("kind", "settings", "gated", "norms", "rotary"),
    [
        ("Llama", {}, 2, 5, 1),
        ("Mistral", {}, 2, 5, 1),
        ("Qwen2", {}, 2, 5, 1),
        ("Qwen3", {"head_dim": 16}, 2, 9, 1),
        ("Gemma2", {"head_dim": 16}, 2, 9, 1),
        ("Gemma3Text", {"head_dim": 16}, 2, 13, 1),
        ("Phi", {}, 0, 0, 1),
        ("Phi3", {}, 0, 5, 1),
        ("SmolLM3", {}, 2, 5, 1),
        ("Granite", {}, 2, 5, 1),
        ("Cohere", {}, 2, 0, 0),
        ("GPTNeoX", {"rotary_pct": 0.5}, 0, 0, 1),
    ],
)
def test_on_common_architectures_what_fits_is_fused_and_the_numbers_stay(
    kind, settings, gated, norms, rotary
):
    model = architecture(kind, settings)
    expected = loss_and_gradients(model)

    with fused(model, 10**9) as taken:
        found = loss_and_gradients(model)

    assert taken.num_left == 0
    assert (taken.num_gated, taken.num_norms, taken.num_rotary) == (gated, norms, rotary)
    assert_same(found, expected)


def architecture(kind: str, settings: dict):
    base = small_model(kind, **settings)
    generator = torch.Generator().manual_seed(2)
    for module in base.modules():  # norms start at one, which would hide what they do
        if getattr(module, "weight", None) is not None and module.weight.dim() == 1:
            noise = torch.randn(module.weight.shape, generator=generator)
            module.weight.data.add_(0.2 * noise)
    return with_adapter(base, AdapterConfig(rank=4))


def test_a_block_that_computes_something_else_stays_as_it_is(adapted):
    model = adapted()
    block = model.get_base_model().model.layers[0].mlp
    theirs = type(block).forward

    class Doubled(type(block)):
        def forward(self, x):
            return 2 * theirs(self, x)

    block.__class__ = Doubled
    expected = loss_and_gradients(model)

    with fused(model, 10**9) as taken:
        found = loss_and_gradients(model)

    assert taken.num_gated == 1
    assert_same(found, expected)


def test_whole_weights_are_joined_without_a_copy_and_lie_apart_again_afterwards(adapted):
    model = adapted("none")
    attention = model.get_base_model().model.layers[0].self_attn
    bases = [getattr(attention, name).get_base_layer() for name in ("q_proj", "k_proj", "v_proj")]
    before = [base.weight.clone() for base in bases]

    with fused(model, 0):
        inside = {base.weight.untyped_storage().data_ptr() for base in bases}
    outside = {base.weight.untyped_storage().data_ptr() for base in bases}

    assert len(inside) == 1
    assert len(outside) == 3
    assert all(torch.equal(base.weight, weight) for base, weight in zip(bases, before, strict=True))


def test_in_16_bits_a_layer_norm_is_not_taken_for_an_rms_norm():
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def is_replaced(norm) -> bool:
        norm = norm.to(torch.bfloat16)
        with ExitStack() as undo:
            ours = _Norm(norm.weight.detach(), 1e-5)
            return _replace_if_same(undo, norm, ours, len(norm.weight))

    sizes = [512, 1024, 4096, 8192, 12288]
    assert not any(is_replaced(CohereLayerNorm(size, eps=1e-5)) for size in sizes)
    assert all(is_replaced(LlamaRMSNorm(size, eps=1e-5)) for size in sizes)


@pytest.mark.parametrize("kind", ["Olmo2", "Llama", "Qwen3", "Gemma2"])
def test_fused_functions_work_in_16_bits_too(kind):
    model = architecture(kind, {}).bfloat16()
    ids = torch.arange(3, 27).reshape(2, 12)
    expected = model(input_ids=ids, labels=ids).loss

    with fused(model, 0):
        found = model(input_ids=ids, labels=ids).loss
        found.backward()

    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)


def test_what_a_failed_pass_has_left_is_let_go_of(adapted):
    model = adapted()
    query = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(1, 5, query.in_features, requires_grad=True)

    with fused(model, 0) as taken:
        output = query(x)  # computes keys and values as well, and nobody fetches them
        graph = weakref.ref(output.grad_fn)
        del output
        assert graph() is not None
        taken.forget()
        assert graph() is None
