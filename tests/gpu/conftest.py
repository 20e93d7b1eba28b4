"""The tiny base and rows of the training tests; everything here skips without a GPU."""

import pytest
import torch

from tests.training.conftest import dataset, float_base, make_job, nf4_base

__all__ = ["dataset", "float_base", "make_job", "nf4_base"]


@pytest.fixture(autouse=True, scope="session")
def _needs_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
