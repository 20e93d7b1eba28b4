"""Fixtures of the training tests, used here too."""

from tests.training.conftest import broken_base, dataset, make_job, nf4_base, one_thread  # noqa: F401
