import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from qlora_core.config import AdapterConfig
from qlora_core.errors import ArtifactError, ModelError
from qlora_core.modeling.loading import load_base
from qlora_core.modeling.lora import attach_adapter, load_adapter, save_adapter
from qlora_core.modeling.merge import (
    LayerUpdate,
    copy_companions,
    merge_lora,
    normalize_dora,
    read_updates,
    write_merged,
)
from qlora_core.modeling.spool import open_spool
from qlora_core.modeling.weights import (
    CheckpointWeights,
    ModelWeights,
    TensorInfo,
    Written,
    write_checkpoint,
)

BIG = 10**9
IDS_BL = torch.arange(24).reshape(2, 12) + 5


def randn64(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def quietly(done: int, total: int) -> None:
    pass


def trained(model: PreTrainedModel, folder: Path, **settings: object) -> PeftModel:
    """An adapter with weights that change the answers, saved to ``folder``."""
    adapted = attach_adapter(model, AdapterConfig(rank=4, alpha=8.0, **settings), seed=3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            if "magnitude" in name:
                parameter.mul_(1.1)
    save_adapter(adapted, folder, "base", None)
    return adapted.eval()


def merge_to(
    base: Path, adapter: Path, out: Path, dtype=torch.float32, max_shard_bytes=BIG
) -> Written:
    out.mkdir()
    written = write_merged(
        CheckpointWeights(base),
        read_updates(adapter),
        out,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        on_tensor=quietly,
    )
    copy_companions(base, out, dtype=dtype)
    return written


def load(folder: Path, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def quantized(tiny: Path, out: Path, **settings: object) -> Path:
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **settings)
    model = AutoModelForCausalLM.from_pretrained(
        tiny, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    model.save_pretrained(out / "model")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(out / "model")
    return out


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=IDS_BL).logits


def test_merged_layer_answers_like_base_plus_adapter():
    base_OI, a_RI, b_OR, x_BI = randn64(6, 5), randn64(2, 5), randn64(6, 2), randn64(3, 5)

    merged_OI = merge_lora(base_OI, a_RI, b_OR, scaling=2.0)

    expected_BO = x_BI @ base_OI.T + 2.0 * (x_BI @ a_RI.T) @ b_OR.T
    assert_close(x_BI @ merged_OI.double().T, expected_BO, rtol=1e-5, atol=1e-5)


def test_merging_16_bit_weights_sums_in_float32_and_leaves_the_base_alone():
    base_OI = torch.full((2, 2), 256.0, dtype=torch.bfloat16)  # its neighbours are 2 apart
    a_RI, b_OR = torch.ones(1, 2), torch.full((2, 1), 0.25)

    merged_OI = merge_lora(base_OI, a_RI, b_OR, scaling=1.0)

    assert merged_OI.dtype == torch.float32
    assert torch.equal(merged_OI, torch.full((2, 2), 256.25))
    assert torch.equal(base_OI, torch.full((2, 2), 256.0, dtype=torch.bfloat16))


def test_dora_rows_have_the_learned_length_and_the_merged_direction():
    merged_OI, magnitude_O = randn64(6, 5).float(), torch.rand(6) + 0.5

    scaled_OI = normalize_dora(merged_OI, magnitude_O)

    assert_close(scaled_OI.double().square().sum(1).sqrt(), magnitude_O.double())
    assert_close(torch.cosine_similarity(scaled_OI, merged_OI), torch.ones(6))


def test_an_adapter_of_another_shape_is_refused():
    with pytest.raises(ArtifactError, match="another base"):
        merge_lora(torch.zeros(6, 5), torch.zeros(2, 4), torch.zeros(6, 2), scaling=1.0)


@pytest.mark.parametrize(
    "settings",
    [{}, {"rslora": True}, {"dora": True}, {"rslora": True, "dora": True}, {"init": "orthogonal"}],
    ids=str,
)
def test_merging_gives_what_peft_merges_on_an_unquantised_model(tiny_llama, tmp_path, settings):
    adapted = trained(load(tiny_llama), tmp_path / "adapter", **settings)

    merge_to(tiny_llama, tmp_path / "adapter", tmp_path / "merged")

    theirs = adapted.merge_and_unload().state_dict()
    ours = load(tmp_path / "merged").state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_close(ours[name], tensor, rtol=0, atol=1e-6, msg=name)
    base = load(tiny_llama).state_dict()
    assert not torch.allclose(
        ours["model.layers.1.mlp.up_proj.weight"],
        base["model.layers.1.mlp.up_proj.weight"],
        atol=1e-3,
    )


@pytest.mark.parametrize(
    "quantization",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    ],
    ids=["nf4-double", "nf4", "fp4"],
)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_onto_dequantised_weights_answers_like_adapter_on_4_bit(
    tiny_llama, tmp_path, quantization, dora
):
    base = quantized(tiny_llama, tmp_path / "base", **quantization)
    adapted = trained(load_base(base), tmp_path / "adapter", dora=dora)

    merge_to(base / "model", tmp_path / "adapter", tmp_path / "merged")

    merged = load(tmp_path / "merged")
    assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(merged), logits(load(tiny_llama)), atol=1e-2)


def test_int8_weights_are_dequantised_by_their_row_scales(tiny_llama, tmp_path):
    base = quantized(tiny_llama, tmp_path / "base", load_in_8bit=True)

    weights = CheckpointWeights(base / "model")

    original = load(tiny_llama).state_dict()
    assert weights.infos().keys() == original.keys() - {"lm_head.weight"}
    for name, tensor_OI in original.items():
        if not name.endswith("_proj.weight"):
            continue
        # half a step of rounding, and bitsandbytes quantises what float16 left of the weight
        step_O1 = tensor_OI.abs().amax(1, keepdim=True) / 127
        error_OI = (weights.read(name) - tensor_OI).abs()
        assert bool((error_OI <= 0.75 * step_O1).all()), name


def test_a_model_that_stores_its_weights_transposed_merges_like_peft(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    adapted = get_peft_model(
        load(tmp_path / "gpt2"),
        LoraConfig(
            r=2,
            target_modules=["c_attn", "c_proj"],
            fan_in_fan_out=True,
            use_dora=True,
            init_lora_weights=False,
        ),
    ).eval()
    adapted.save_pretrained(tmp_path / "adapter")

    merge_to(tmp_path / "gpt2", tmp_path / "adapter", tmp_path / "merged")

    assert_close(logits(load(tmp_path / "merged")), logits(adapted), rtol=1e-4, atol=1e-5)


def test_tied_embeddings_stay_tied(tiny_llama, tmp_path):
    trained(load(tiny_llama), tmp_path / "adapter")

    written = merge_to(tiny_llama, tmp_path / "adapter", tmp_path / "merged")

    merged = load(tmp_path / "merged")
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    stored = CheckpointWeights(tmp_path / "merged").infos()
    assert "lm_head.weight" not in stored
    assert written.num_tensors == len(stored) == len(list(merged.parameters()))


def test_weights_of_a_loaded_model_name_tied_tensors_once(tiny_llama):
    infos = ModelWeights(load(tiny_llama)).infos()

    assert infos.keys() == CheckpointWeights(tiny_llama).infos().keys()


def test_small_shards_load_as_the_same_model(tiny_llama, tmp_path):
    trained(load(tiny_llama), tmp_path / "adapter")

    merge_to(tiny_llama, tmp_path / "adapter", tmp_path / "one")
    written = merge_to(tiny_llama, tmp_path / "adapter", tmp_path / "many", max_shard_bytes=50_000)

    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) == written.num_shards > 3
    largest = max(info.size_bytes for info in CheckpointWeights(tiny_llama).infos().values())
    assert all(file.stat().st_size < max(50_000, largest) + 8_000 for file in files)
    one, many = load(tmp_path / "one").state_dict(), load(tmp_path / "many").state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == written.size_bytes


def test_the_same_merge_gives_the_same_bytes(tiny_llama, tmp_path):
    trained(load(tiny_llama), tmp_path / "adapter")

    for out in ("a", "b"):
        merge_to(tiny_llama, tmp_path / "adapter", tmp_path / out, torch.bfloat16, 50_000)

    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_safetensors_itself_reads_what_is_streamed(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "sliced": torch.arange(12, dtype=torch.int64).reshape(3, 4).T,
    }
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}

    write_checkpoint(tmp_path, infos, tensors.__getitem__, max_shard_bytes=BIG)

    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_the_merged_folder_is_a_plain_model_with_tokenizer_and_chat_template(tiny_llama, tmp_path):
    base = quantized(tiny_llama, tmp_path / "base", load_in_4bit=True)
    trained(load_base(base), tmp_path / "adapter")

    merge_to(base / "model", tmp_path / "adapter", tmp_path / "merged", torch.bfloat16)

    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert {p.dtype for p in load(tmp_path / "merged", dtype="auto").parameters()} == {
        torch.bfloat16
    }
    chat = [{"role": "user", "content": "at noon"}]
    ours = AutoTokenizer.from_pretrained(tmp_path / "merged").apply_chat_template(chat)
    assert ours == AutoTokenizer.from_pretrained(tiny_llama).apply_chat_template(chat)
    assert (tmp_path / "merged" / "generation_config.json").is_file()


class WatchedWeights:
    """Weights that note how many of the tensors handed out are still alive at each read."""

    def __init__(self, weights: CheckpointWeights) -> None:
        self._weights = weights
        self._given: list[int] = []
        self.most_alive = 0

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._weights.infos()

    def read(self, name: str) -> Tensor:
        import weakref

        tensor = self._weights.read(name)
        alive = [ref for ref in self._given if ref() is not None] + [weakref.ref(tensor)]
        self._given = alive
        self.most_alive = max(self.most_alive, len(alive))
        return tensor


def test_no_more_than_two_tensors_are_ever_alive(tiny_llama, tmp_path):
    trained(load(tiny_llama), tmp_path / "adapter")
    watched = WatchedWeights(CheckpointWeights(tiny_llama))
    (tmp_path / "merged").mkdir()

    write_merged(
        watched,
        read_updates(tmp_path / "adapter"),
        tmp_path / "merged",
        dtype=torch.bfloat16,
        max_shard_bytes=BIG,
        on_tensor=quietly,
    )

    assert 1 <= watched.most_alive <= 2
    assert len(watched.infos()) > 10


def test_a_layer_that_the_base_lacks_is_refused(tiny_llama, tmp_path):
    trained(load(tiny_llama), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    renamed = {name.replace("layers.1", "layers.7"): t for name, t in load_file(path).items()}
    save_file(renamed, path)

    with pytest.raises(ArtifactError, match=r"layers\.7.*7 such layers"):
        merge_to(tiny_llama, tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("damage", ["drop", "stray"])
def test_an_incomplete_adapter_is_refused(tiny_llama, tmp_path, damage):
    trained(load(tiny_llama), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    if damage == "drop":
        del tensors[next(name for name in tensors if "lora_B" in name)]
    else:
        tensors["base_model.model.model.norm.weight"] = torch.ones(64)
    save_file(tensors, path)

    with pytest.raises(ArtifactError, match=r"lora_B|no part of a LoRA layer"):
        read_updates(tmp_path / "adapter")


def test_what_cannot_be_folded_is_refused_by_name(tiny_llama, tmp_path):
    trained(load(tiny_llama), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {"q_proj": 2}}))

    with pytest.raises(ModelError, match="rank_pattern"):
        read_updates(tmp_path / "adapter")


def test_values_outside_float16_are_an_error_and_not_infinity(tiny_llama, tmp_path):
    trained(load(tiny_llama), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: 1e3 * t for name, t in load_file(path).items()}, path)

    with pytest.raises(ArtifactError, match=r"not finite[\s\S]*bfloat16"):
        merge_to(tiny_llama, tmp_path / "adapter", tmp_path / "merged", torch.float16)


def test_the_written_adapter_is_the_one_that_reloads(tiny_llama, tmp_path):
    adapted = trained(load(tiny_llama), tmp_path / "adapter")

    merge_to(tiny_llama, tmp_path / "adapter", tmp_path / "merged")

    reloaded = load_adapter(load(tiny_llama), tmp_path / "adapter")
    assert_close(logits(reloaded), logits(adapted))
    assert_close(logits(load(tmp_path / "merged")), logits(reloaded), rtol=1e-4, atol=1e-5)


def test_rank_comes_from_the_weights_and_updates_leave_other_layers_alone(tiny_llama, tmp_path):
    trained(load(tiny_llama), tmp_path / "adapter", targets=("q_proj",))

    updates = read_updates(tmp_path / "adapter")

    assert sorted(updates.layers) == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    assert isinstance(updates.layers["model.layers.0.self_attn.q_proj.weight"], LayerUpdate)
    untouched_H = torch.ones(4)
    assert updates.apply("model.norm.weight", untouched_H) is untouched_H


def test_a_checkpoint_without_one_of_its_shards_is_refused(tiny_llama, tmp_path):
    trained(load(tiny_llama), tmp_path / "adapter")
    merge_to(tiny_llama, tmp_path / "adapter", tmp_path / "many", max_shard_bytes=50_000)
    next((tmp_path / "many").glob("model-00002*")).unlink()

    with pytest.raises(ArtifactError, match="model-00002"):
        CheckpointWeights(tmp_path / "many")


def test_the_header_is_padded_so_that_tensors_are_aligned(tmp_path):
    infos = {"x": TensorInfo((4,), torch.float32)}

    write_checkpoint(tmp_path, infos, lambda _: torch.zeros(4), max_shard_bytes=BIG)

    header_bytes = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert header_bytes % 8 == 0
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_an_index_that_names_what_its_file_lacks_is_refused(tiny_llama, tmp_path):
    trained(load(tiny_llama), tmp_path / "adapter")
    many = tmp_path / "many"
    merge_to(tiny_llama, tmp_path / "adapter", many, max_shard_bytes=50_000)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.nothing.weight"] = next(iter(index["weight_map"].values()))
    (many / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(ArtifactError, match=r"lacks 'model\.nothing\.weight'"):
        CheckpointWeights(many)


def test_a_file_cut_short_after_it_was_opened_is_told(tmp_path):
    save_file({"a": torch.ones(4), "b": torch.ones(1000)}, tmp_path / "model.safetensors")
    weights = CheckpointWeights(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-400])

    assert torch.equal(weights.read("a"), torch.ones(4))
    with pytest.raises(ArtifactError, match="ends 400 bytes before"):
        weights.read("b")


def test_a_type_that_is_not_known_is_named_when_it_is_asked_for(tmp_path):
    eight_bits = torch.ones(4).to(torch.float8_e4m3fn)
    save_file({"a": eight_bits}, tmp_path / "model.safetensors")

    with pytest.raises(ArtifactError, match="stores a as F8_E4M3"):
        CheckpointWeights(tmp_path).infos()


def test_what_is_spooled_becomes_the_bytes_that_safetensors_itself_writes(tmp_path):
    dtypes = (torch.float32, torch.uint8, torch.bfloat16, torch.int64, torch.bool, torch.int8)
    tensors = {f"{n}.weight": torch.ones(n + 1, 3).to(dtype) for n, dtype in enumerate(dtypes)}
    (tmp_path / "spooled").mkdir()

    with open_spool(tmp_path) as spool:
        for name in sorted(tensors, reverse=True):
            spool.add(name, tensors[name])
        spool.write(tmp_path / "spooled")

    save_file(tensors, tmp_path / "whole.safetensors", metadata={"format": "pt"})
    spooled = (tmp_path / "spooled" / "model.safetensors").read_bytes()
    assert spooled == (tmp_path / "whole.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spooled", "whole.safetensors"]
