import torch

from qlora_core.config import AdapterConfig
from qlora_core.modeling import offload
from qlora_core.modeling.lora import attach_adapter, trainable_parameters
from tests.tiny import small_model


def loss_and_gradients(model) -> list[torch.Tensor]:
    ids = torch.arange(24).reshape(2, 12)
    loss = model(input_ids=ids, labels=ids).loss
    return [loss, *torch.autograd.grad(loss, list(trainable_parameters(model).values()))]


def test_inputs_of_recomputed_layers_go_to_the_host_and_back_without_changing_a_bit(monkeypatch):
    model = attach_adapter(small_model("Llama"), AdapterConfig(rank=4), seed=0).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    expected, back, from_host = loss_and_gradients(model), [], offload.from_host
    monkeypatch.setattr(offload, "SMALLEST", 2 * 12 * 64)  # a layer's input
    monkeypatch.setattr(offload, "from_host", lambda kept: back.append(kept) or from_host(kept))

    with offload.kept_on_host():
        found = loss_and_gradients(model)

    assert all(map(torch.equal, found, expected))
    brought = [kept for kept in back if isinstance(kept, offload.OnHost)]
    assert sum(kept.copy.shape == (2, 12, 64) for kept in brought) >= 2  # one for each layer


def test_what_is_small_or_a_weight_stays_where_it_is(monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 100)
    back, from_host = [], offload.from_host
    monkeypatch.setattr(offload, "from_host", lambda kept: back.append(kept) or from_host(kept))
    weight = torch.nn.Parameter(torch.ones(200))
    few = torch.ones(50, requires_grad=True)

    with offload.kept_on_host():
        ((weight * weight).sum() + (few * few).sum()).backward()

    assert not any(isinstance(kept, offload.OnHost) for kept in back)
