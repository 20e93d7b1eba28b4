import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_core.artifacts import QuantizedBase
from qlora_core.config import ModelConfig, QuantizationConfig
from qlora_core.errors import ConfigError, ModelError, StoreError
from qlora_core.fingerprint import file_digest, files_below
from qlora_core.modeling.loading import load_base, load_saved_tokenizer
from qlora_core.ports import Context
from qlora_core.sources import find_source
from qlora_core.stages.quantize import quantize_base


class Heard:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.updates: list[tuple[float, float]] = []

    def update(self, stage: str, done: float, total: float, note: str = "") -> None:
        self.updates.append((done, total))

    def say(self, stage: str, message: str) -> None:
        pass


def context(folder: Path) -> Context:
    out, scratch = folder / "out", folder / "scratch"
    out.mkdir(parents=True)
    scratch.mkdir()
    return Context(out, scratch, tracker=None, registry=None, launcher=None, progress=Heard())


def quantised(
    ctx: Context, model: Path, template: Path | None = None, **quantization
) -> QuantizedBase:
    return quantize_base(
        ctx,
        ModelConfig(source=str(model)),
        QuantizationConfig(**({"compute_dtype": "float32"} | quantization)),
        find_source(str(model)),
        find_source(str(template)) if template else None,
    )


def digests(folder: Path) -> dict[str, str]:
    return {name: file_digest(folder / name) for name in files_below(folder)}


def test_facts_say_what_was_stored_and_what_it_cost(tiny_llama, tmp_path):
    ctx = context(tmp_path)
    original = AutoModelForCausalLM.from_pretrained(tiny_llama)
    total = sum(p.numel() for p in original.parameters())
    linear = sum(
        m.weight.numel() for n, m in original.named_modules() if "proj" in n.rpartition(".")[2]
    )

    facts = quantised(ctx, tiny_llama)

    assert (facts.num_parameters, facts.num_quantized_parameters) == (total, linear)
    assert (facts.method, facts.architecture) == ("nf4", "LlamaForCausalLM")
    assert (facts.compute_dtype, facts.context_length) == ("float32", 256)
    assert facts.tied_embeddings
    assert facts.source == str(tiny_llama)
    assert len(facts.layer_errors) == 14
    mean = sum(facts.layer_errors.values()) / 14
    assert facts.mean_relative_error == pytest.approx(mean)
    assert 0.05 < mean < 0.15
    on_disk = (ctx.out / "model" / "model.safetensors").stat().st_size
    assert on_disk - 30_000 < facts.size_bytes < on_disk
    assert facts.bits_per_parameter == pytest.approx(8 * facts.size_bytes / total)
    assert ctx.progress.updates[-1] == (14, 14)


def test_the_checkpoint_stands_alone_with_tokenizer_and_template(tiny_llama, tmp_path):
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}!{% endfor %}")
    ctx = context(tmp_path)

    quantised(ctx, tiny_llama, template)

    tokenizer = load_saved_tokenizer(ctx.out)
    chat = [{"role": "user", "content": "noon"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "noon!"
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(tiny_llama))
    ids = torch.tensor([tokenizer("the answer is").input_ids])
    base = load_base(ctx.out)
    assert base.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    assert files_below(ctx.scratch) == []


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8", "none"])
def test_the_same_inputs_make_the_same_bytes_wherever_they_lie(method, tiny_llama, tmp_path):
    moved = shutil.copytree(tiny_llama, tmp_path / "moved")
    first, second = context(tmp_path / "1"), context(tmp_path / "2")

    quantised(first, tiny_llama, method=method)
    quantised(second, moved, method=method)

    assert digests(first.out) == digests(second.out)


def test_auto_computes_in_float32_on_a_cpu(tiny_llama, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("asks what happens without a GPU")

    facts = quantised(context(tmp_path), tiny_llama, compute_dtype="auto")

    assert facts.compute_dtype == "float32"


def test_16_bit_weights_are_16_bits(tiny_llama, tmp_path):
    facts = quantised(context(tmp_path), tiny_llama, method="none", compute_dtype="bfloat16")

    assert facts.bits_per_parameter == 16
    assert facts.layer_errors == {}
    assert facts.mean_relative_error == 0


def test_int8_says_that_it_rounds_activations(tiny_llama, tmp_path):
    facts = quantised(context(tmp_path), tiny_llama, method="int8")

    assert any("activations" in note for note in facts.notes)


def test_a_tokenizer_larger_than_the_embeddings_is_refused(tiny_llama, tmp_path):
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.save_pretrained(copy)
    rows = json.loads((copy / "config.json").read_text())["vocab_size"]

    with pytest.raises(ModelError, match=f"{rows + 1} tokens, but the model embeds only {rows}"):
        quantised(context(tmp_path), copy)


def test_a_skip_that_matches_nothing_is_refused_before_anything_is_written(tiny_llama, tmp_path):
    ctx = context(tmp_path)

    with pytest.raises(ConfigError, match="nothing_like_it"):
        quantised(ctx, tiny_llama, skip=("nothing_like_it",))

    assert files_below(ctx.out) == []


def test_a_refused_model_leaves_nothing_behind(tiny_llama, tmp_path):
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    ctx = context(tmp_path)

    with pytest.raises(ModelError, match="no weights"):
        quantised(ctx, copy)

    assert files_below(ctx.out) == []


@pytest.mark.e2e
def test_smollm2_in_4_bits_still_knows_the_capital_of_france(smollm2_gguf, tmp_path):
    ctx = context(tmp_path)

    facts = quantised(ctx, smollm2_gguf)

    assert facts.num_parameters == 134_515_008
    assert 0.08 < facts.mean_relative_error < 0.1
    base, tokenizer = load_base(ctx.out), load_saved_tokenizer(ctx.out)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, return_tensors="pt", add_generation_prompt=True)
    answer = base.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


def test_a_disk_that_is_full_is_told_as_such(tiny_llama, tmp_path):
    """By a limit on the size of files, which safetensors reports as it reports a full disk."""
    ctx = context(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(StoreError, match="cannot write") as caught:
            quantised(ctx, tiny_llama)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert "earlier artefacts are intact" in caught.value.fix


def test_experts_in_one_tensor_are_left_whole_and_it_is_said(tiny_llama, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=len(tokenizer), **sizes, **heads)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    tokenizer.save_pretrained(tmp_path / "experts")

    facts = quantised(context(tmp_path), tmp_path / "experts")

    stacked = 4 * 3 * 64 * 64
    assert facts.num_quantized_parameters < facts.num_parameters - stacked
    assert f"{stacked / facts.num_parameters:.0%} of the parameters are experts" in facts.notes[0]
