from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_core.config import EvaluationConfig
from qlora_core.data.prepared import (
    IGNORED,
    Prompt,
    Rows,
    TokenRow,
    read_split,
    write_prompts,
    write_split,
)
from qlora_core.evaluation.questions import read_questions
from qlora_core.modeling.loading import load_base
from qlora_core.ports import AskJob
from tests.training.conftest import write_dataset


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products are quicker on one thread, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def tokenizer(tiny_llama: Path):
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="package")
def lively_llama(tiny_llama: Path):
    """The tiny Llama with larger weights: its answers differ from prompt to prompt."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6.0)
    return model.requires_grad_(False)


@pytest.fixture(scope="package")
def nf4_base(lively_llama, tmp_path_factory) -> Path:
    """Files of a QuantizedBase made from the lively Llama."""
    folder = tmp_path_factory.mktemp("nf4-base")
    lively_llama.save_pretrained(folder / "full")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder / "full", quantization_config=nf4, dtype=torch.float32
    )
    model.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def nf4_model(nf4_base: Path):
    return load_base(nf4_base)


@pytest.fixture(scope="package")
def rows(tmp_path_factory) -> Rows:
    """Held-out rows of 5 to 40 tokens; the last two share a prompt."""
    generator = np.random.default_rng(0)
    made = []
    for length in (5, 40, 12, 23, 8, 31, 17):
        ids = generator.integers(3, 290, length).tolist()
        made.append(TokenRow(ids, [IGNORED] * 4 + ids[4:]))
    made.append(TokenRow([*made[-1].input_ids[:4], 9, 10], [*made[-1].labels[:4], 9, 10]))
    folder = tmp_path_factory.mktemp("rows")
    write_split(folder, "heldout", made)
    return read_split(folder, "heldout")


@pytest.fixture(scope="package")
def prompts() -> list[Prompt]:
    generator = np.random.default_rng(1)
    lengths = (4, 30, 9, 16, 5, 12, 27)
    return [Prompt("?", tuple(generator.integers(3, 290, n).tolist()), ("!",)) for n in lengths]


@pytest.fixture
def job(tmp_path, nf4_base, tokenizer, prompts) -> AskJob:
    """The losses of 8 rows and answers of 5 tokens, asked of the base."""
    tokenizer.save_pretrained(nf4_base / "model")
    data = write_dataset(tmp_path / "data", num_heldout=8)
    write_prompts(data, prompts)
    settings = EvaluationConfig(batch_size=3, max_new_tokens=5)
    return AskJob(
        model=nf4_base,
        is_merged=False,
        adapter=None,
        data=data,
        evaluation=settings,
        questions=read_questions(settings, data).digest(),
        scratch=tmp_path,
    )
