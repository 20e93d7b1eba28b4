import pytest
import torch

from qlora_core.config import AdapterConfig, ModelConfig, QuantizationConfig
from qlora_core.modeling.dense import BUDGET_BYTES, asking_budget, dense_weights
from qlora_core.modeling.loading import load_original
from qlora_core.modeling.lora import attach_adapter, trainable_parameters
from qlora_core.modeling.quantization import quantize_model
from qlora_core.sources import find_source


@pytest.fixture
def adapted(tiny_llama):
    source = find_source(str(tiny_llama))
    base = load_original(ModelConfig(source=str(tiny_llama)), source, torch.float32)
    quantize_model(base, QuantizationConfig(), torch.float32, lambda *_: None)
    model = attach_adapter(base.requires_grad_(False), AdapterConfig(rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(model).values():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def _gradients(model):
    ids = torch.arange(3, 27).reshape(2, 12)
    loss = model(input_ids=ids, labels=ids).loss
    gradients = torch.autograd.grad(loss, list(trainable_parameters(model).values()))
    return loss.detach(), gradients


def test_training_on_dense_weights_changes_no_bit_of_loss_or_gradients(adapted):
    loss, gradients = _gradients(adapted)

    with dense_weights(adapted, BUDGET_BYTES) as num_dense:
        dense_loss, dense_gradients = _gradients(adapted)

    assert num_dense == 14
    assert torch.equal(loss, dense_loss)
    assert all(map(torch.equal, gradients, dense_gradients))


def test_a_gpu_is_asked_with_no_weights_dequantised_as_it_rounds_otherwise_with_them():
    assert asking_budget(torch.device("cuda", 1)) == 0
    assert asking_budget(torch.device("cpu")) == 2_000_000_000
