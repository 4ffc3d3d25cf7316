"""What is around a module, also after the model has changed, and in copies of it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from funlora_hf.tuner_base.places import around, remember_place


@pytest.fixture
def model() -> nn.Module:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    remember_place(model[0][0], model, "0.0")
    return model


def test_what_is_around(model):
    linear = model[0][0]
    assert around(linear) == [linear, model[0], model]
    model[0][0] = wrapper = nn.Sequential(linear)
    assert around(linear) == [wrapper, model[0], model]
    model[0] = nn.Identity()
    assert around(linear) == [model[0], model]
    assert around(nn.Linear(2, 2)) == []


def test_copies_and_pickles_are_in_no_model(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert b"funlora" not in buffer.getvalue().replace(b"_funlora_place", b"")  # it loads without this package
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert around(other[0][0]) == []
        torch.testing.assert_close(other(torch.ones(1, 2)), model(torch.ones(1, 2)))
