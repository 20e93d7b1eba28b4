"""Fixtures of the training tests, used here too."""

from tests.training.conftest import dataset, nf4_base  # noqa: F401
