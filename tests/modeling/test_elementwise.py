"""Fused element-wise functions against autograd in float64."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from qlora_core.modeling.elementwise import ACTIVATIONS, rms_norm, rotate
from qlora_core.modeling.gated import find_activation


def output_and_gradient(compute, x):
    x = x.clone().requires_grad_()
    y = compute(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    (y * weights).sum().backward()
    return y.detach(), x.grad


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4], ids=["near epsilon", "usual", "large"])
def test_rms_norm_is_llamas(scale):
    x, norm = scale * random(2, 5, 16), LlamaRMSNorm(16, eps=1e-5)
    norm.weight.data = 1 + 0.1 * random(16)
    weight = norm.weight.detach()

    found = output_and_gradient(lambda x: rms_norm(x, weight, 1e-5), x)

    x64 = x.double()  # transformers' own rounds to float32 inside
    expected = output_and_gradient(
        lambda x: weight.double() * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5), x64
    )
    assert_same(found, expected)
    assert_same(found, output_and_gradient(norm, x))


def test_rotation_is_llamas():
    x, angles = random(2, 3, 7, 8), random(2, 7, 4)
    cos, sin = (f(torch.cat([angles, angles], -1)) for f in (torch.cos, torch.sin))

    found = output_and_gradient(lambda x: rotate(x, cos[:, None], sin[:, None]), x)

    theirs = output_and_gradient(lambda x: apply_rotary_pos_emb(x, x, cos, sin)[0], x)
    assert_same(found, theirs)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=["silu", "gelu tanh", "gelu"])
def test_an_activations_gradient_is_autograds(activation):
    x, g = 3 * random(50), random(50)
    out = torch.empty(50)

    activation.differentiate(g, x, out)

    leaf = x.double().requires_grad_()
    activation.apply(leaf).backward(g.double())
    assert_same([out], [leaf.grad])


def test_an_activation_is_found_by_what_it_computes():
    from transformers.activations import ACT2FN

    names = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu": 2}

    found = {name: find_activation(ACT2FN[name]) for name in names}

    assert found == {name: ACTIVATIONS[place] for name, place in names.items()}
    assert find_activation(torch.nn.ReLU()) is None
    assert find_activation(torch.nn.Linear(3, 3)) is None
