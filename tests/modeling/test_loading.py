import contextlib
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel
from transformers import logging as transformers_logging

from qlora_core.config import ModelConfig
from qlora_core.errors import ArtifactError, ModelError
from qlora_core.modeling.loading import (
    UNLIMITED_CONTEXT,
    context_length,
    load_base,
    load_merged,
    load_original,
    load_saved_tokenizer,
    load_skeleton,
    load_tokenizer,
    quiet,
)
from qlora_core.sources import Source, find_source
from tests.tiny import bring_own_code

CHAT = [{"role": "user", "content": "day"}]


def named(folder: Path) -> tuple[ModelConfig, Source]:
    return ModelConfig(source=str(folder)), find_source(str(folder))


def opened(folder: Path):
    return load_original(*named(folder), torch.float32)


def edited(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def copy(tiny_llama, tmp_path) -> Path:
    """A tiny Llama to spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def test_a_folder_opens_with_the_weights_it_holds(tiny_llama):
    expected = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()

    model = opened(tiny_llama)

    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_the_stored_dtype_is_kept_unless_another_is_asked_for(tiny_llama):
    assert load_original(*named(tiny_llama), None).dtype is torch.float32
    assert load_original(*named(tiny_llama), torch.bfloat16).dtype is torch.bfloat16


def test_the_context_length_is_the_model_s(tiny_llama):
    assert context_length(*named(tiny_llama)) == 256


def test_a_model_that_states_no_context_length_has_no_limit(copy):
    edited(copy / "config.json", model_type="bloom", max_position_embeddings=None)

    assert context_length(*named(copy)) == UNLIMITED_CONTEXT


def test_a_chat_template_file_replaces_the_tokenizer_s(tiny_llama, tmp_path):
    template = tmp_path / "shout.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}")

    plain = load_tokenizer(*named(tiny_llama), None)
    shouting = load_tokenizer(*named(tiny_llama), find_source(str(template)))

    assert plain.apply_chat_template(CHAT, tokenize=False).startswith("<|im_start|>user\nday")
    assert shouting.apply_chat_template(CHAT, tokenize=False) == "DAY"


def test_pickled_weights_are_refused_without_being_opened(copy, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "canary",))

    (copy / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Bomb()}, copy / "pytorch_model.bin")

    with pytest.raises(ModelError, match=r"pytorch_model\.bin"):
        opened(copy)
    assert not (tmp_path / "canary").exists()


def test_code_that_comes_with_a_model_is_refused_and_not_run(copy, tmp_path):
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    edited(copy / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})

    with pytest.raises(ModelError, match="auto_map"):
        opened(copy)
    with pytest.raises(ModelError, match="auto_map"):
        context_length(*named(copy))
    assert not (tmp_path / "canary").exists()


def test_trusted_code_is_run_for_the_original_and_for_the_base_made_from_it(
    copy, tmp_path, monkeypatch
):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    bring_own_code(copy)
    trusting = ModelConfig(source=str(copy), trust_remote_code=True, revision="abc")

    original = load_original(trusting, find_source(str(copy)), torch.float32)
    original.save_pretrained(tmp_path / "base" / "model")
    base = load_base(tmp_path / "base")

    assert type(original).__name__ == type(base).__name__ == "MineForCausalLM"


def test_a_merged_model_is_float32_on_a_cpu_and_frozen(tiny_llama, tmp_path):
    load_original(*named(tiny_llama), torch.bfloat16).save_pretrained(tmp_path / "model")

    merged = load_merged(tmp_path)

    assert merged.dtype is torch.float32
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_code_that_comes_with_a_tokenizer_is_refused(copy):
    edited(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})

    with pytest.raises(ModelError, match=r"tokenizer_config\.json has auto_map"):
        load_tokenizer(*named(copy), None)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_from_a_hub_is_refused(copy, key):
    edited(copy / "config.json", text_config={key: "someone/kernel"})

    with pytest.raises(ModelError, match="someone/kernel"):
        opened(copy)


def test_an_encoder_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    BertModel(config).save_pretrained(tmp_path)

    with pytest.raises(ModelError, match=r"not a causal language model \(BertModel\)"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        {"model_type": "bart", "architectures": None, "is_encoder_decoder": True},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "no-such-model", "architectures": None},
    ],
    ids=lambda changes: str(changes.get("model_type", "classifier")),
)
def test_other_architectures_are_refused(copy, changes):
    edited(copy / "config.json", **changes)

    with pytest.raises(ModelError, match="not a causal language model"):
        opened(copy)


def test_a_model_that_is_quantised_already_is_refused(copy):
    edited(copy / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})

    with pytest.raises(ModelError, match="quant_method=gptq"):
        opened(copy)


def test_a_truncated_checkpoint_is_refused(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    with pytest.raises(ModelError, match="cannot be loaded"):
        opened(copy)


def test_a_checkpoint_without_a_layer_is_refused_by_the_layer_s_name(copy):
    edited(copy / "config.json", num_hidden_layers=3)

    with pytest.raises(ModelError, match=r"incomplete: 9 weights .*model\.layers\.2\."):
        opened(copy)


def test_a_checkpoint_of_other_shapes_is_refused(copy):
    edited(copy / "config.json", vocab_size=300)

    with pytest.raises(ModelError):
        opened(copy)


def test_a_folder_without_weights_or_configuration_is_refused(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        opened(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        opened(copy)


def test_a_configuration_that_is_not_json_is_refused(copy):
    (copy / "config.json").write_text("{")

    with pytest.raises(ModelError, match="not JSON"):
        opened(copy)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")

    with pytest.raises(ModelError, match=r"\.bin file"):
        opened(tmp_path / "a.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        opened(tmp_path / "a.gguf")
    with pytest.raises(ModelError, match="cannot be loaded"):
        context_length(*named(tmp_path / "a.gguf"))


def test_a_hub_model_that_cannot_be_fetched_says_what_to_check():
    source = find_source("nobody/no-such-model", "0" * 40)

    with pytest.raises(ModelError, match="cannot be loaded") as raised:
        load_tokenizer(ModelConfig(source="nobody/no-such-model"), source, None)
    assert "network" in raised.value.fix


def test_a_damaged_base_is_an_artefact_error(copy, tmp_path):
    shutil.move(copy, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    with pytest.raises(ArtifactError):
        load_base(tmp_path)
    with pytest.raises(ArtifactError):
        load_saved_tokenizer(tmp_path / "elsewhere")


def test_quiet_puts_everything_back():
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled

    with quiet(), contextlib.suppress(KeyError), quiet():
        assert transformers_logging.get_verbosity() == logging.ERROR
        assert not bars()
        raise KeyError

    assert transformers_logging.get_verbosity() == level
    assert bars()


def test_loading_prints_nothing(tiny_llama, capfd):
    opened(tiny_llama)
    load_tokenizer(*named(tiny_llama), None)

    assert capfd.readouterr() == ("", "")


@pytest.mark.e2e
def test_a_gguf_file_opens_quietly_and_can_be_saved_like_any_other_model(
    smollm2_gguf, tmp_path, capfd
):
    where = named(smollm2_gguf)

    model, tokenizer = load_original(*where, torch.float32), load_tokenizer(*where, None)

    assert capfd.readouterr() == ("", "")
    assert context_length(*where) == model.config.max_position_embeddings == 8192
    ids = tokenizer.apply_chat_template(CHAT, return_tensors="pt", add_generation_prompt=True)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert_close(again(**ids).logits, model(**ids).logits)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(tokenizer)


def test_a_model_whose_sizes_are_not_those_of_its_weights_is_refused_with_the_weight(copy):
    edited(copy / "config.json", vocab_size=400)

    with pytest.raises(ModelError, match=r"wrong shape, the first 'model.embed_tokens.weight'"):
        opened(copy)


@pytest.mark.e2e
def test_a_gguf_s_tokenizer_that_somebody_changed_is_unchanged_for_the_next(smollm2_gguf):
    first = load_tokenizer(*named(smollm2_gguf), None)
    first.chat_template = "nothing"
    first.add_tokens(["<|extra|>"])

    second = load_tokenizer(*named(smollm2_gguf), None)

    assert "<|im_start|>" in second.chat_template
    assert len(second) == len(first) - 1


def test_a_skeleton_has_the_shapes_and_dtypes_of_the_model_and_none_of_its_memory(copy):
    found = load_skeleton(*named(copy))
    whole = load_original(*named(copy), None)

    assert found is not None
    skeleton, weights = found
    ours, theirs = dict(skeleton.named_parameters()), dict(whole.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(parameter.is_meta for parameter in ours.values())
    for name, parameter in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (parameter.shape, parameter.dtype)
        assert torch.equal(weights.read(name), parameter)
    assert skeleton.generation_config.to_dict() == whole.generation_config.to_dict()


def test_a_model_with_code_of_its_own_has_no_skeleton(copy):
    bring_own_code(copy)
    pinned = ModelConfig(source=str(copy), trust_remote_code=True, revision="0" * 40)

    assert load_skeleton(pinned, find_source(str(copy))) is None
