from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel

from funlora_hf.continual.strategy import PhaseSettings
from funlora_hf.continual.trainer import moving_average


def averaged(*, decay, warmup, start, values):
    parameter = torch.nn.Parameter(torch.tensor([10.0]))
    settings = PhaseSettings(len(values), None, 1, 0.1, 0, decay, start / len(values), warmup)
    average = moving_average([parameter], settings, len(values), foreach=False)
    for value in values:
        parameter.data.fill_(value)
        average.step([parameter])
    return average.shadow_params[0].item()


VALUES = [1.0, 4.0, 2.0, 8.0, 5.0, 7.0]


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.98])
def test_without_warm_up_the_decay_holds_from_the_first_step(decay, start):
    expected = 10.0 if start == 0 else VALUES[start - 1]
    for value in VALUES[start:]:
        expected = decay * expected + (1 - decay) * value
    assert averaged(decay=decay, warmup=False, start=start, values=VALUES) == pytest.approx(expected)


@pytest.mark.parametrize("start", [0, 2])
def test_with_warm_up_it_is_diffusers_average(start):
    parameter = torch.nn.Parameter(torch.tensor([10.0]))
    plain = EMAModel([parameter], decay=0.98, update_after_step=start)
    for value in VALUES:
        parameter.data.fill_(value)
        plain.step([parameter])
    assert averaged(decay=0.98, warmup=True, start=start, values=VALUES) == plain.shadow_params[0].item()
