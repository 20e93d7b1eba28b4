"""A base that lies with a GPU's host, beside the same base whole; here the CPU is both."""

import json
import shutil
from contextlib import ExitStack

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from qlora_core.config import AdapterConfig
from qlora_core.errors import ResourceError
from qlora_core.modeling import parts
from qlora_core.modeling.hosted import BaseNeeds, BasePlace, choose_place, load_hosted
from qlora_core.modeling.loading import load_base
from qlora_core.modeling.lora import attach_adapter, load_adapter, save_adapter
from qlora_core.modeling.memory import MemoryEstimate
from qlora_core.modeling.sharding import blocks_of
from tests.tiny import bring_own_code, make_tiny_llama
from tests.training.conftest import one_thread, write_base

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
GB = 10**9
IDS = torch.arange(3, 15)[None]
NUM_LAYERS = 4


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosted")
    tiny = make_tiny_llama(folder / "tiny", num_layers=NUM_LAYERS)
    return write_base(folder / "nf4", tiny, is_nf4=True)


@pytest.fixture(scope="module")
def adapter_folder(base_folder, tmp_path_factory):
    model = attach_adapter(load_base(base_folder), AdapterConfig(rank=4), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, folder, "base", None)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["base", "with adapter"])
def both(request, base_folder, adapter_folder):
    """The whole model, the hosted one, and what brings the latter's blocks."""
    whole = load_base(base_folder)
    hosted, base = load_hosted(base_folder, CPU, [])
    if request.param:
        whole, hosted = (load_adapter(model, adapter_folder) for model in (whole, hosted))
    return whole, hosted, base


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def answer(model) -> list[int]:
    with torch.inference_mode():
        ids = model.generate(input_ids=IDS, max_new_tokens=9, do_sample=False, eos_token_id=None)
    return ids[0, IDS.shape[1] :].tolist()


def test_a_hosted_base_says_what_the_whole_one_says_with_and_without_an_adapter(both):
    whole, hosted, base = both

    assert torch.equal(logits(hosted), logits(whole))
    assert answer(hosted) == answer(whole)
    assert base.present_bytes == 0


def present_while(act, model, base) -> list[int]:
    """Bytes of the blocks that are there whenever a 4-bit layer has computed."""
    seen = []
    with ExitStack() as undo:
        for layer in (m for m in model.modules() if isinstance(m, Linear4bit)):
            hook = layer.register_forward_hook(lambda *_: seen.append(base.present_bytes))
            undo.callback(hook.remove)
        act()
    return seen


def test_at_most_two_blocks_are_there_at_a_time_and_none_between_passes(both):
    _, hosted, base = both

    seen = present_while(lambda: answer(hosted), hosted, base)

    (size,) = {len(block.whole) for block in base._blocks}  # all are alike
    assert max(seen) == 2 * size
    assert len(seen) == 9 * NUM_LAYERS * 7, "each of 9 passes computes 7 layers of each block"
    assert base.present_bytes == 0


class TroubleError(RuntimeError):
    pass


def fail(*_):
    raise TroubleError


@pytest.mark.parametrize("number", [0, 1, NUM_LAYERS - 1])
@pytest.mark.parametrize("part", ["", "mlp.down_proj"])
def test_after_a_pass_that_failed_in_any_block_the_next_one_is_as_if_it_were_the_first(
    both, number, part
):
    whole, hosted, base = both
    expected, found = logits(whole), []

    for _ in range(2):
        failing = blocks_of(hosted)[number].get_submodule(part).register_forward_hook(fail)
        with pytest.raises(TroubleError):
            logits(hosted)
        failing.remove()
        seen = present_while(lambda: found.append(logits(hosted)), hosted, base)
        assert max(seen) == 2 * len(base._blocks[0].whole)
        assert torch.equal(found.pop(), expected)
        assert base.present_bytes == 0


def test_a_block_that_found_no_memory_comes_in_the_next_pass(both, monkeypatch):
    whole, hosted, base = both
    expected, gather, num_calls = logits(whole), base._comm.gather_parts, 0

    def fails_third(whole, part):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gather(whole, part)

    monkeypatch.setattr(base._comm, "gather_parts", fails_third)
    with pytest.raises(torch.OutOfMemoryError):
        logits(hosted)

    assert torch.equal(logits(hosted), expected)
    assert base.present_bytes == 0


def test_the_models_own_stop_tokens_are_those_of_its_generation_settings(base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "base")
    file = tmp_path / "base" / "model" / "generation_config.json"
    settings = json.loads(file.read_text()) | {"eos_token_id": [2, 7, 9]}
    file.write_text(json.dumps(settings))

    hosted, _ = load_hosted(tmp_path / "base", CPU, [])

    assert hosted.generation_config.eos_token_id == [2, 7, 9]
    expected = load_base(tmp_path / "base").generation_config
    assert hosted.generation_config.to_dict() == expected.to_dict()


def test_a_checkpoint_that_only_loads_whole_is_named_where_there_is_no_room_for_that(
    base_folder, tmp_path, monkeypatch
):
    shutil.copytree(base_folder, tmp_path / "base")
    bring_own_code(tmp_path / "base" / "model")

    def load_base(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(parts, "load_base", load_base)

    with pytest.raises(ResourceError, match="cannot be read tensor by tensor"):
        load_hosted(tmp_path / "base", CPU, [])


def estimate(weights: int, gathered: int = 0) -> MemoryEstimate:
    zero = dict.fromkeys(MemoryEstimate.model_fields, 0) | {"strategy": "qlora"}
    return MemoryEstimate.model_validate(zero | {"weights": weights, "gathered": gathered})


NEEDS = BaseNeeds(estimate(36 * GB), estimate(0, gathered=2 * GB), host_bytes=50 * GB)
DORA = BaseNeeds(estimate(36 * GB), None, obstacle="adapter.dora=true")


def test_a_base_that_fits_is_whole_on_the_gpu_and_asked_alike_however_much_is_left():
    roomy, tight = (
        choose_place(NEEDS, free * GB, 0, wants_host=False) for free in (80, 40)
    )  # of which nine tenths are usable

    assert roomy == tight == BasePlace(is_hosted=False, notes=())


def test_a_base_that_does_not_fit_lies_with_the_host_and_that_is_said():
    assert NEEDS.enough_gpu_bytes == 40 * GB

    place = choose_place(NEEDS, 40 * GB - 1, 50 * GB, wants_host=False)

    assert place.is_hosted
    (note,) = place.notes
    assert "in the host's memory (50.00 GB)" in note
    assert "whole it takes a GPU with 40.00 GB free" in note
    assert "slow" in note


def test_a_base_that_would_fit_lies_with_the_host_where_the_recipe_wants_it():
    place = choose_place(NEEDS, 80 * GB, 50 * GB, wants_host=True)

    assert place.is_hosted
    assert "cluster.offload_base" in place.notes[0]


def test_where_neither_gpu_nor_host_has_room_that_is_found_before_loading():
    with pytest.raises(ResourceError, match=r"50\.00 GB") as refused:
        choose_place(NEEDS, 24 * GB, 49 * GB, wants_host=False)

    assert "40.00 GB free" in str(refused.value)


def test_what_no_host_can_hold_is_tried_whole_unless_its_weights_alone_are_too_large():
    tight = choose_place(DORA, 37 * GB, 500 * GB, wants_host=True)

    assert not tight.is_hosted
    assert tight.notes == ("cluster.offload_base is left out: adapter.dora=true.",)
    with pytest.raises(ResourceError, match=r"(?s)35\.00 GB free.*adapter.dora=true"):
        choose_place(DORA, 35 * GB, 500 * GB, wants_host=False)
