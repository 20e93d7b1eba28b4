import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit

from qlora_core.modeling.loading import load_base
from qlora_core.modeling.parts import load_in_parts
from qlora_core.modeling.sharding import ShardedBase, blocks_of
from qlora_core.training.comm import Alone
from tests.tiny import make_tiny_llama
from tests.training.conftest import write_base

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tiny = make_tiny_llama(folder / "tiny", num_layers=4)
    return write_base(folder / "nf4", tiny, is_nf4=True)


def layers_of(model) -> dict[str, Linear4bit]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}


def test_a_base_loaded_in_parts_is_the_one_that_transformers_loads(base_folder):
    expected, notes = load_base(base_folder), []
    model, base = load_in_parts(base_folder, CPU, Alone(), notes)

    assert not notes
    with torch.no_grad():
        ids = torch.arange(12)[None]
        assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)
    found, wanted = layers_of(model), layers_of(expected)
    assert found.keys() == wanted.keys()
    for name, layer in wanted.items():
        with base.at_hand(found[name]):
            weight = dequantize_4bit(found[name].weight.data, found[name].weight.quant_state)
        assert torch.equal(weight, dequantize_4bit(layer.weight.data, layer.weight.quant_state))
        assert found[name].compute_dtype == layer.compute_dtype
    rest = {n: p for n, p in model.named_parameters() if n.removesuffix(".weight") not in found}
    for name, parameter in rest.items():
        other = expected.get_parameter(name)
        assert parameter.dtype == other.dtype
        assert torch.equal(parameter, other)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_while_it_loads_one_block_is_whole_at_a_time(base_folder, monkeypatch):
    whole, take = [], ShardedBase.take
    models = []

    def taking(base, module):
        models.append(module)
        take(base, module)
        whole.append(base.present_bytes)

    monkeypatch.setattr(ShardedBase, "take", taking)
    order = []
    from qlora_core.modeling.weights import CheckpointWeights

    read = CheckpointWeights.read_packed

    def reading(self, name):
        order.append((len(models), name))
        return read(self, name)

    monkeypatch.setattr(CheckpointWeights, "read_packed", reading)

    model, _ = load_in_parts(base_folder, CPU, Alone(), [])

    assert whole == [0] * 4
    assert len(order) == len(layers_of(model))
    assert all(f".layers.{num_taken}." in name for num_taken, name in order)
    assert models == blocks_of(model)
