from __future__ import annotations

import numpy as np
import torch

from funlora_hf.held_out import held_out_loss


class Perfect:
    """Predicts the velocity of one image exactly, up to an error of a known size."""

    device = torch.device("cpu")

    def __init__(self, image: torch.Tensor, error: float) -> None:
        self.data = image.float() / 127.5 - 1
        self.error = error
        self.sigmas: list[float] = []

    unet = torch.nn.Identity()

    def predict_velocity(self, noisy, sigma, class_labels):
        self.sigmas += sigma.tolist()
        noise = (noisy - (1 - sigma[:, None, None, None]) * self.data) / sigma[:, None, None, None]
        return noise - self.data + self.error


def test_the_loss_is_the_mean_squared_error_of_the_velocity():
    image = torch.randint(0, 256, (1, 4, 4), dtype=torch.uint8)
    model = Perfect(image, error=0.5)
    loss = held_out_loss(model, 3, image.repeat(7, 1, 1, 1), num_sigmas=4, seed=0, batch_size=3)
    np.testing.assert_allclose(loss, 0.25, rtol=1e-4)
    assert sorted(set(model.sigmas)) == [0.125, 0.375, 0.625, 0.875]
    assert len(model.sigmas) == 7 * 4


def test_the_batch_size_does_not_change_the_noise(tiny_pipe):
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    losses = [held_out_loss(tiny_pipe, 3, images, num_sigmas=3, seed=1, batch_size=size) for size in (5, 5, 2)]
    assert losses[0] == losses[1]
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)
    assert held_out_loss(tiny_pipe, 3, images, num_sigmas=3, seed=2) != losses[0]
