import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_core.artifacts import (
    AdapterCheckpoint,
    Artifact,
    MergedModel,
    PreparedDataset,
    QuantizedBase,
    SplitFacts,
)
from qlora_core.config import AdapterConfig, MergeConfig, ModelConfig
from qlora_core.data.prepared import IGNORED, TokenRow, write_split
from qlora_core.errors import ArtifactError
from qlora_core.modeling.loading import load_base
from qlora_core.modeling.lora import attach_adapter, save_adapter
from qlora_core.ports import Context
from qlora_core.sources import find_source
from qlora_core.stages.merge import merge_adapter
from tests.tiny import bring_own_code, make_tiny_llama


class Heard:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.updates: list[tuple[float, float, str]] = []
        self.said: list[str] = []

    def update(self, stage: str, done: float, total: float, note: str = "") -> None:
        self.updates.append((done, total, note))

    def say(self, stage: str, message: str) -> None:
        self.said.append(message)


def context(folder: Path) -> Context:
    out, scratch = folder / "out", folder / "scratch"
    out.mkdir(parents=True)
    scratch.mkdir(exist_ok=True)
    return Context(out, scratch, tracker=None, registry=None, launcher=None, progress=Heard())


def artifact(stage: str, path: Path, facts) -> Artifact:
    return Artifact(stage=stage, key="k" * 64, digest="d" * 64, path=path, facts=facts)


@pytest.fixture(scope="module")
def inputs(tiny_llama, tmp_path_factory):
    """A quantised base, an adapter far enough from zero to matter, and held-out rows."""
    folder = tmp_path_factory.mktemp("inputs")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"}
    )
    base.save_pretrained(folder / "base" / "model")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder / "base" / "model")
    adapted = attach_adapter(load_base(folder / "base"), AdapterConfig(rank=4), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    save_adapter(adapted, folder / "adapter", "base", None)
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, 290, 12).tolist() for _ in range(9)]
    (folder / "data").mkdir()
    write_split(folder / "data", "heldout", [TokenRow(row, [IGNORED] * 6 + row[6:]) for row in ids])
    return {
        "model": ModelConfig(source=str(tiny_llama)),
        "base": artifact("quantize_base", folder / "base", base_facts("nf4")),
        "adapter": artifact("train_adapter", folder / "adapter", adapter_facts()),
        "data": artifact("prepare_dataset", folder / "data", data_facts()),
        "source": find_source(str(tiny_llama)),
    }


def base_facts(method: str) -> QuantizedBase:
    return QuantizedBase(
        method=method, architecture="LlamaForCausalLM", source="tiny", compute_dtype="float32",
        num_parameters=1, num_quantized_parameters=1, size_bytes=1, bits_per_parameter=4.1,
        context_length=256, mean_relative_error=0.1, layer_errors={}, tied_embeddings=True,
    )  # fmt: skip


def adapter_facts() -> AdapterCheckpoint:
    return AdapterCheckpoint(
        num_trainable_parameters=1, num_target_layers=14, num_steps=1, num_steps_run=1,
        num_steps_planned=1, num_tokens=1, num_supervised_tokens=1, train_loss=1.0,
        heldout_loss=1.0, stopped_early=False, seconds=1.0, tokens_per_s=1.0,
        supervised_tokens_per_s=1.0, peak_memory_bytes=1, num_workers=1, num_attempts=1,
    )  # fmt: skip


def data_facts() -> PreparedDataset:
    split = SplitFacts(
        num_rows=9, num_tokens=108, num_supervised_tokens=54, length_quantiles={"max": 12}
    )
    return PreparedDataset(
        num_rows_read=9, dropped={}, train=split, heldout=split, num_prompts=9, format="messages",
        sample="",
    )  # fmt: skip


def run(folder: Path, inputs, ctx=None, **settings) -> MergedModel:
    merge = MergeConfig(batch_size=4, **settings)
    return merge_adapter(ctx or context(folder), merge, **inputs)


def test_auto_measures_both_ways_and_keeps_the_nearer(tmp_path, inputs):
    facts = run(tmp_path, inputs, dtype="float32")

    assert [parity.onto for parity in facts.parity] == ["dequantized", "original"]
    nearer, farther = facts.parity
    assert facts.onto == "dequantized"
    assert nearer.kl.value < 1e-6 < 1e-5 < farther.kl.value
    assert nearer.agreement.value == 1.0
    assert nearer.loss_adapter == farther.loss_adapter
    assert len(facts.notes) == 2
    assert "Merging onto dequantized weights" in facts.notes[0]


def test_auto_keeps_the_original_where_that_is_nearer(tmp_path, inputs):
    ctx = context(tmp_path)
    stranger = make_tiny_llama(tmp_path / "stranger", seed=9)
    stranger.rename(ctx.scratch / "dequantized")  # as if an earlier attempt had left it
    (ctx.scratch / "dequantized.notes").write_text("")

    facts = run(tmp_path, inputs, ctx=ctx)

    assert facts.onto == "original"
    assert [parity.onto for parity in facts.parity] == ["original", "dequantized"]
    assert facts.parity[0].kl.value < 0.01 < facts.parity[1].kl.value


def test_the_kept_model_loads_plainly_and_is_the_one_that_was_measured(tmp_path, inputs):
    ctx = context(tmp_path)

    facts = run(tmp_path, inputs, ctx=ctx, onto="dequantized", max_shard_bytes=50_000)

    merged, report = AutoModelForCausalLM.from_pretrained(
        ctx.out / "model", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert merged.dtype == torch.bfloat16 == getattr(torch, facts.dtype)
    assert facts.num_shards == len(list((ctx.out / "model").glob("*.safetensors"))) > 1
    assert facts.size_bytes == sum(p.numel() * 2 for p in merged.parameters())
    assert AutoTokenizer.from_pretrained(ctx.out / "model").chat_template
    assert [path.name for path in ctx.out.iterdir()] == ["model"]


def test_parity_includes_the_rounding_to_16_bits(tmp_path, inputs):
    rounded = run(tmp_path / "16", inputs, onto="dequantized", dtype="bfloat16").parity[0]
    exact = run(tmp_path / "32", inputs, onto="dequantized", dtype="float32").parity[0]

    assert exact.kl.value < rounded.kl.value < 1e-2


def test_a_killed_attempt_is_not_built_twice(tmp_path, inputs):
    first = context(tmp_path / "first")
    run(tmp_path, inputs, ctx=first, onto="dequantized")
    scratch = tmp_path / "second" / "scratch"
    scratch.mkdir(parents=True)
    (first.out / "model").rename(scratch / "dequantized")
    (scratch / "dequantized.notes").write_text("said before\n")
    (scratch / "original.partial").mkdir()
    (scratch / "original.partial" / "torso").write_bytes(b"half a file")
    second = context(tmp_path / "second")

    facts = run(tmp_path, inputs, ctx=second, onto="auto")

    notes = [note for _, _, note in second.progress.updates]
    assert "folding into dequantized weights" not in notes
    assert "folding into original weights" in notes
    assert "said before" in facts.notes
    assert not list((tmp_path / "second").rglob("torso"))


def test_a_base_that_is_not_quantised_is_merged_one_way_and_says_so(tmp_path, inputs):
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "model").symlink_to(inputs["source"].path)
    base = artifact("quantize_base", plain, base_facts("none"))

    facts = run(tmp_path, inputs | {"base": base}, dtype="float32")

    assert [parity.onto for parity in facts.parity] == ["dequantized"]
    assert any("not quantised" in note for note in facts.notes)
    assert facts.parity[0].kl.value < 1e-6


def test_originals_that_cannot_be_streamed_are_read_whole_and_counted(tmp_path, inputs):
    tied = AutoModelForCausalLM.from_pretrained(inputs["source"].path)
    state = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    tied.save_pretrained(tmp_path / "spare")
    save_file(state, tmp_path / "spare" / "model.safetensors", metadata={"format": "pt"})
    source = find_source(str(tmp_path / "spare"))  # names lm_head although it is tied
    ctx = context(tmp_path)

    facts = run(tmp_path, inputs | {"source": source}, ctx=ctx, onto="original")

    assert any("loaded whole" in note for note in facts.notes)
    assert any("loaded whole" in said for said in ctx.progress.said)
    plain = run(tmp_path / "plain", inputs, onto="original")
    assert facts.parity == plain.parity


def test_an_original_that_is_another_model_is_refused(tmp_path, inputs):
    other = find_source(str(make_tiny_llama(tmp_path / "other", num_layers=3)))

    with pytest.raises(ArtifactError, match=r"layers\.2[\s\S]*merge.onto=dequantized"):
        run(tmp_path, inputs | {"source": other}, onto="original")


def test_progress_runs_from_start_to_end(tmp_path, inputs):
    ctx = context(tmp_path)

    run(tmp_path, inputs, ctx=ctx)

    shares = [done / total for done, total, _ in ctx.progress.updates]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert shares[0] < 0.1


def test_a_model_that_brings_its_own_trusted_code_is_merged(tmp_path, inputs, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(inputs["base"].path, tmp_path / "mine")
    bring_own_code(tmp_path / "mine" / "model")
    base = artifact("quantize_base", tmp_path / "mine", base_facts("nf4"))
    trusting = inputs["model"].model_copy(update={"trust_remote_code": True, "revision": "abc"})

    facts = run(tmp_path, inputs | {"base": base, "model": trusting}, onto="dequantized")

    assert facts.parity == run(tmp_path / "plain", inputs, onto="dequantized").parity
