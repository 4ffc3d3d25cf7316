"""What strategies share."""

import torch

from funlora_hf.continual.strategy import Batch


def test_a_reordered_batch_has_the_same_samples():
    batch = Batch(torch.randn(4, 1, 2, 2), torch.tensor([7, 5, 7, 5]), torch.randn(4, 1, 2, 2), torch.rand(4))
    order = batch.class_ids.argsort(stable=True)
    moved = batch.reordered(order)
    assert moved.class_ids.tolist() == [5, 5, 7, 7]
    for to, origin in enumerate((1, 3, 0, 2)):
        for name in ("sample", "noise", "sigma"):
            assert torch.equal(getattr(moved, name)[to], getattr(batch, name)[origin])
