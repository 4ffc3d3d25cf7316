"""Distances of means and covariances, against numpy, and what a classifier finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from funlora_hf.evaluation.drift import class_drift


class Larger(nn.Module):
    """Finds the class whose feature is the largest."""

    def forward(self, features):
        return features


def points(count, *, seed):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def test_the_distances_are_relative_to_the_real_images():
    real, drawn = points(40, seed=0), 2 * points(30, seed=1) + torch.tensor([0.0, 3.0, 0.0])
    found = class_drift(real, drawn, Larger(), 1)
    of_real, of_drawn = (np.cov(one.double().numpy(), rowvar=False) for one in (real, drawn))
    distance = np.linalg.norm(real.double().numpy().mean(axis=0) - drawn.double().numpy().mean(axis=0))
    assert found["mean"] == pytest.approx(distance / np.sqrt(np.trace(of_real)), rel=1e-6)
    assert found["covariance"] == pytest.approx(np.linalg.norm(of_drawn - of_real) / np.linalg.norm(of_real), rel=1e-6)
    assert found["accuracy"] == pytest.approx(100 * np.mean(drawn.numpy().argmax(axis=1) == 1))


def test_equal_sets_are_at_a_distance_of_zero_and_one_image_repeated_has_lost_all_variety():
    real = points(20, seed=0)
    same = class_drift(real, real, Larger(), 0)
    assert (same["mean"], same["covariance"]) == (0, 0)
    assert class_drift(real, real[:1].repeat(9, 1), Larger(), 0)["covariance"] == pytest.approx(1)


@pytest.mark.parametrize(("real", "drawn"), [(1, 5), (5, 1), (0, 5)])
def test_what_one_image_or_equal_images_do_not_have_is_none(real, drawn):
    found = class_drift(points(real, seed=0) if real else torch.ones(5, 3), points(drawn, seed=1), Larger(), 2)
    assert (found["mean"], found["covariance"]) == (None, None)
    assert 0 <= found["accuracy"] <= 100
