from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import save_file

from funlora_hf.layer_selection import adapter_importance, layer_importance


def state(A, B, layer="up.conv"):
    return {
        f"base_model.model.{layer}.funlora_A": torch.tensor(A)[:, None],
        f"base_model.model.{layer}.funlora_B": torch.tensor(B)[None],
        f"base_model.model.{layer}.funlora_alpha": torch.zeros(3),
        "base_model.model.class_embedding.funlora_class_vector": torch.zeros(4),
    }


def test_importance_is_equation_20():
    A, B = np.array([1.5, 0.0, 1.0]), np.array([1.0, -1.0])
    expected = (np.abs(A - 1).sum() + np.abs(B - 1).sum()) / 5
    result = adapter_importance(state(A.tolist(), B.tolist()))
    assert list(result) == ["up.conv"]
    np.testing.assert_allclose(result["up.conv"], expected)


def test_importance_over_classes_is_equation_21_in_the_order_given(tmp_path):
    for class_id, value in ((1, 2.0), (2, 4.0)):
        (tmp_path / str(class_id)).mkdir()
        tensors = state([value], [value]) | state([1.0], [value], layer="down.conv")
        save_file(tensors, tmp_path / str(class_id) / "adapter_model.safetensors")
    result = layer_importance([tmp_path / "1", tmp_path / "2"], ["down.conv", "no.such", "up.conv"])
    assert list(result) == ["down.conv", "up.conv"]
    np.testing.assert_allclose(result["up.conv"], (np.mean([1, 3]), np.std([1, 3])))
    np.testing.assert_allclose(result["down.conv"], (np.mean([0.5, 1.5]), np.std([0.5, 1.5])))
