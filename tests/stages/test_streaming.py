"""Stages that read a model of several files: how much of it is ever in memory."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_core.backends.memory import SilentProgress
from qlora_core.config import ModelConfig, QuantizationConfig
from qlora_core.fingerprint import file_digest, files_below
from qlora_core.modeling import weights
from qlora_core.ports import Context
from qlora_core.sources import find_source
from qlora_core.stages import quantize
from tests.tiny import make_tiny_llama, make_tiny_tokenizer, small_model

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


@pytest.mark.parametrize("kind", ["GPT2", "Qwen2", "Gemma", "Mixtral", "OPT"])
def test_every_architecture_leaves_the_same_bytes_both_ways(kind, tmp_path, monkeypatch):
    tokenizer = make_tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "n_embd": 64, "n_layer": 2, "n_head": 4}
    sizes |= {"word_embed_proj_dim": 64, "ffn_dim": 128, "num_local_experts": 2}
    model = small_model(kind, **sizes)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    first, second = (context(tmp_path / name, SilentProgress()) for name in ("streamed", "whole"))

    streamed = quantise(first, tmp_path / "model")
    monkeypatch.setattr(quantize, "load_skeleton", lambda *_: None)
    whole = quantise(second, tmp_path / "model")

    assert digests(first.out) == digests(second.out)
    assert streamed == whole
