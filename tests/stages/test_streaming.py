"""Stages that read a model of several files: how much of it is ever in memory."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_core.backends.memory import SilentProgress
from qlora_core.config import AdapterConfig, MergeConfig, ModelConfig, QuantizationConfig
from qlora_core.fingerprint import file_digest, files_below
from qlora_core.modeling import weights
from qlora_core.modeling.loading import load_base
from qlora_core.modeling.lora import attach_adapter, save_adapter
from qlora_core.ports import Context
from qlora_core.sources import find_source
from qlora_core.stages import merge, quantize
from tests.stages.test_merge import adapter_facts, artifact, data_facts
from tests.tiny import make_tiny_llama, make_tiny_tokenizer, small_model
from tests.training.conftest import write_dataset

SHARD_BYTES = 200_000


class Scales(SilentProgress):
    """Weighs all tensors made since then whenever it is told something."""

    def __init__(self) -> None:
        self.most = 0

    def weigh(self) -> None:
        storages = {}
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()  # shared memory once
        self.most = max(self.most, sum(storages.values()))

    def update(self, stage: str, done: float, total: float, note: str = "") -> None:
        self.weigh()

    def say(self, stage: str, message: str) -> None:
        self.weigh()


@pytest.fixture
def scales(monkeypatch) -> Iterator[Scales]:
    """Weigh at every tensor that is read from a file, and at every report of progress."""
    found = Scales()
    read = weights.read_tensor

    def weighing(*args):
        tensor = read(*args)
        found.weigh()
        return tensor

    monkeypatch.setattr(weights, "read_tensor", weighing)
    gc.collect()
    gc.freeze()  # what is there already counts no longer, and is not looked through each time
    yield found
    gc.unfreeze()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """A tiny Llama of many layers in many files."""
    folder = make_tiny_llama(tmp_path_factory.mktemp("whole"), num_layers=10)
    out = tmp_path_factory.mktemp("sharded")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(out, max_shard_size=SHARD_BYTES)
    make_tiny_tokenizer().save_pretrained(out)
    assert len(list(out.glob("*.safetensors"))) >= 6
    return out


def context(folder: Path, progress) -> Context:
    out, scratch = folder / "out", folder / "scratch"
    out.mkdir(parents=True)
    scratch.mkdir()
    return Context(out, scratch, tracker=None, registry=None, launcher=None, progress=progress)


def largest(folder: Path) -> int:
    return max(info.size_bytes for info in weights.CheckpointWeights(folder).infos().values())


def quantise(ctx: Context, model: Path, **quantization):
    return quantize.quantize_base(
        ctx,
        ModelConfig(source=str(model)),
        QuantizationConfig(**({"compute_dtype": "float32"} | quantization)),
        find_source(str(model)),
        None,
    )


def digests(folder: Path) -> dict[str, str]:
    return {name: file_digest(folder / name) for name in files_below(folder)}


@pytest.mark.parametrize("method", ["nf4", "int8", "none"])
def test_quantising_never_holds_more_than_two_files_and_the_largest_tensor(
    method, sharded, scales, tmp_path
):
    ctx = context(tmp_path, scales)

    quantise(ctx, sharded, method=method)

    assert 0 < scales.most < 2 * SHARD_BYTES + largest(ctx.out / "model")


@pytest.mark.parametrize(
    ("method", "compute_dtype"), [("nf4", "float32"), ("int8", "bfloat16"), ("none", "bfloat16")]
)
def test_a_model_that_passes_through_leaves_the_bytes_of_one_loaded_whole(
    method, compute_dtype, sharded, tmp_path, monkeypatch
):
    first, second = (context(tmp_path / name, SilentProgress()) for name in ("streamed", "whole"))

    streamed = quantise(first, sharded, method=method, compute_dtype=compute_dtype)
    monkeypatch.setattr(quantize, "load_skeleton", lambda *_: None)
    whole = quantise(second, sharded, method=method, compute_dtype=compute_dtype)

    assert digests(first.out) == digests(second.out)
    assert streamed == whole


@pytest.mark.parametrize("kind", ["GPT2", "Qwen2", "Gemma", "Gemma4Text", "Mixtral", "OPT"])
def test_every_architecture_leaves_the_same_bytes_both_ways(kind, tmp_path, monkeypatch):
    tokenizer = make_tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "n_embd": 64, "n_layer": 2, "n_head": 4}
    sizes |= {"word_embed_proj_dim": 64, "ffn_dim": 128, "num_local_experts": 2}
    model = small_model(kind, **sizes)
    for name, buffer in model.named_buffers():  # Gemma 4 stores some
        if name in model.state_dict():
            buffer.fill_(0.7)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    first, second = (context(tmp_path / name, SilentProgress()) for name in ("streamed", "whole"))

    streamed = quantise(first, tmp_path / "model")
    monkeypatch.setattr(quantize, "load_skeleton", lambda *_: None)
    whole = quantise(second, tmp_path / "model")

    assert digests(first.out) == digests(second.out)
    assert streamed == whole


@pytest.fixture(scope="module")
def tuned(sharded, tmp_path_factory) -> dict[str, object]:
    """What merging reads: the quantised base, an adapter with DoRA, held-out rows."""
    folder = tmp_path_factory.mktemp("tuned")
    ctx = context(folder / "base", SilentProgress())
    facts = quantise(ctx, sharded)
    settings = AdapterConfig(rank=1, dora=True)
    adapted = attach_adapter(load_base(ctx.out), settings, seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    save_adapter(adapted, folder / "adapter", "base", None)
    write_dataset(folder / "data")
    return {
        "model": ModelConfig(source=str(sharded)),
        "base": artifact("quantize_base", ctx.out, facts),
        "adapter": artifact("train_adapter", folder / "adapter", adapter_facts()),
        "data": artifact("prepare_dataset", folder / "data", data_facts()),
        "source": find_source(str(sharded)),
    }


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_merging_never_holds_more_than_two_files_and_the_largest_tensor(
    onto, sharded, tuned, scales, tmp_path, monkeypatch
):
    monkeypatch.setattr(merge, "HELD_BYTES", 0)
    ctx = context(tmp_path, scales)

    settings = MergeConfig(onto=onto, max_shard_bytes=SHARD_BYTES, parity_rows=1, batch_size=1)

    merge.merge_adapter(ctx, settings, **tuned)

    assert 0 < scales.most < 2 * SHARD_BYTES + largest(ctx.out / "model")


def test_weights_that_come_and_go_give_the_same_comparison(tuned, tmp_path, monkeypatch):
    whole = merge.merge_adapter(context(tmp_path / "1", SilentProgress()), MergeConfig(), **tuned)
    monkeypatch.setattr(merge, "HELD_BYTES", 0)
    passing = merge.merge_adapter(context(tmp_path / "2", SilentProgress()), MergeConfig(), **tuned)

    assert [parity.onto for parity in passing.parity] == [parity.onto for parity in whole.parity]
    for ours, theirs in zip(passing.parity, whole.parity, strict=True):
        assert ours.kl.value == pytest.approx(theirs.kl.value, rel=1e-3, abs=1e-8)
        assert ours.loss_adapter.value == pytest.approx(theirs.loss_adapter.value, rel=1e-5)
        assert ours.loss_merged.value == pytest.approx(theirs.loss_merged.value, rel=1e-5)
