from __future__ import annotations

import torch

from funlora_hf.continual.guarded_steps import Outcome
from funlora_hf.continual.losses import PendingLosses


def test_what_is_read_is_what_was_added_in_its_order():
    losses = PendingLosses(every=3)
    for step in range(5, 8):
        assert not losses.due
        losses.add(step, [torch.tensor(float(step)), torch.tensor(step + 0.5)], torch.tensor(step % 3))
    assert losses.due
    assert losses.read() == [
        (5, [5, 5.5], Outcome.NO_LOSS),
        (6, [6, 6.5], Outcome.DONE),
        (7, [7, 7.5], Outcome.NO_GRADIENT),
    ]
    assert len(losses) == 0
    assert losses.read() == []


def test_the_loss_of_a_step_is_the_mean_over_its_batches():
    losses = PendingLosses(every=1)
    losses.add(0, [torch.tensor(1.0), torch.tensor(4.0)], torch.tensor(0))
    assert losses.read()[0].mean == 2.5
