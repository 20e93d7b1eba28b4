"""A tiny quantised base, a few rows, and jobs on them."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_core.config import AdapterConfig, QuantizationConfig, TrainingConfig
from qlora_core.data.prepared import IGNORED, TokenRow, write_split
from qlora_core.ports import TrainJob


def make_rows(num_rows: int, seed: int, vocabulary: int = 300) -> list[TokenRow]:
    """Rows of 5 to 30 tokens that repeat a pattern, so there is something to learn."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        length, period = int(random.integers(5, 30)), int(random.integers(1, 4))
        pattern = random.integers(10, 40, period)
        tokens = np.resize(pattern, length).astype(int)
        prompt = int(random.integers(1, length - 1))
        labels = np.where(np.arange(length) < prompt, IGNORED, tokens)
        rows.append(TokenRow(tokens.tolist(), labels.tolist()))
    return rows


def write_dataset(folder: Path, num_train: int = 22, num_heldout: int = 6) -> Path:
    folder.mkdir(parents=True)
    write_split(folder, "train", make_rows(num_train, seed=1))
    write_split(folder, "heldout", make_rows(num_heldout, seed=2))
    return folder


def write_base(folder: Path, tiny: Path, *, is_nf4: bool) -> Path:
    """Write a checkpoint as quantize_base does: NF4, or plain float32."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    options = {"quantization_config": nf4} if is_nf4 else {}
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, **options)
    model.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def one_thread():
    """Tiny products are quicker on one thread, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _always_one_thread(one_thread):
    """Here, for every test."""


@pytest.fixture(scope="session")
def nf4_base(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("nf4"), tiny_llama, is_nf4=True)


@pytest.fixture(scope="session")
def float_base(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("float"), tiny_llama, is_nf4=False)


@pytest.fixture(scope="session")
def broken_base(nf4_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a weight that is no number, so that no loss is one either."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(nf4_base, folder, dirs_exist_ok=True)
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "rows")


SMALL: dict[str, Any] = {
    "epochs": 2.0,
    "global_batch": 8,
    "micro_batch": 4,
    "learning_rate": 1e-2,
    "warmup": 0.2,
    "heldout_every": 2,
}


@pytest.fixture
def make_job(nf4_base: Path, dataset: Path, tmp_path: Path):
    """Make a job of 6 steps; keywords replace training settings, a name keeps jobs apart."""

    def make(
        name: str = "job", *, dropout: float = 0.0, rank: int = 4, **training: Any
    ) -> TrainJob:
        folder = tmp_path / name
        (folder / "out").mkdir(parents=True, exist_ok=True)
        (folder / "scratch").mkdir(exist_ok=True)
        return TrainJob(
            base=nf4_base,
            data=dataset,
            out=folder / "out",
            scratch=folder / "scratch",
            quantization=QuantizationConfig(),
            adapter=AdapterConfig(rank=rank, dropout=dropout),
            training=TrainingConfig(**(SMALL | training)),
            seed=3,
            base_name="tiny",
        )

    return make
