"""What a driver's process is started with."""

import pytest

from qlora_core.backends.ray_process import _environment
from qlora_core.config import ClusterConfig


@pytest.mark.parametrize("address", [None, "auto", "head:6379"])
def test_a_driver_goes_to_the_ray_it_is_given_whatever_the_environment_names(address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "https://elsewhere:8265")

    assert "RAY_ADDRESS" not in _environment(ClusterConfig(address=address))
