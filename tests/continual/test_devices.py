from __future__ import annotations

import os

import pytest
import torch

from funlora_hf.continual.devices import deterministic_kernels


def settings():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
    )


@pytest.mark.parametrize(
    ("device", "wanted", "inside"),
    [
        ("cuda", True, (True, True, False)),
        ("cuda", False, (False, False, True)),
        ("cpu", True, (False, False, True)),
    ],
)
def test_deterministic_kernels_are_for_a_run_on_a_gpu_alone(device, wanted, inside, monkeypatch):
    """No GPU is needed to ask for them. Set back also behind an error."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = settings()
    with pytest.raises(KeyError), deterministic_kernels(torch.device(device), wanted=wanted):
        assert settings() == inside
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == inside[0]
        raise KeyError
    assert settings() == before
