"""What a token leaves for the backward pass, against what autograd really keeps."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch

from qlora_core.config import AdapterConfig
from qlora_core.data.prepared import Rows
from qlora_core.modeling.fusing import fused
from qlora_core.modeling.lora import attach_adapter
from qlora_core.modeling.packing import packed_attention
from qlora_core.training.memory import bytes_per_token
from qlora_core.training.objective import LossFunction
from tests.tiny import small_model

CPU = torch.device("cpu")
NUM_ROWS, LENGTH = 2, 100


@pytest.mark.parametrize("num_key_value_heads", [2, 8], ids=["grouped heads", "single heads"])
def test_a_fused_model_keeps_about_as_much_of_a_token_as_the_plan_counts(num_key_value_heads):
    base = small_model(
        "Llama",
        hidden_size=256,
        intermediate_size=896,
        num_attention_heads=8,
        num_key_value_heads=num_key_value_heads,
        num_hidden_layers=4,
    )
    base.config.dtype = torch.float32
    model = attach_adapter(base.requires_grad_(False), AdapterConfig(rank=4), seed=0).train()

    kept = bytes_kept(model) / (NUM_ROWS * LENGTH)

    planned = bytes_per_token(base.config, is_fused=True)
    assert kept <= planned <= 1.3 * kept
    assert bytes_per_token(base.config, is_fused=False) > planned


def bytes_kept(model) -> int:
    """Bytes of all memory that autograd holds after a forward pass, the model's own apart."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    held = {}

    def hold(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so no address comes twice
        return tensor

    random = np.random.default_rng(0)
    ids = random.integers(1, 64, NUM_ROWS * LENGTH, dtype=np.int32)
    rows = Rows(ids, ids, np.arange(NUM_ROWS + 1) * LENGTH)
    loss = LossFunction(model, packs=True)
    with ExitStack() as stack:
        stack.enter_context(packed_attention(model))
        stack.enter_context(fused(model, 0))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor))
        assert loss(loss.batch(rows, np.arange(NUM_ROWS), CPU)).requires_grad
    return sum(size for size, _ in held.values())
