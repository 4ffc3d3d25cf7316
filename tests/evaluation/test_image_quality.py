"""Frechet distance, precision and recall: against their formulas, on sets whose values are known, and on digits."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from funlora_hf.classifier import ClassifierConfig
from funlora_hf.data.image_data import load_image_data
from funlora_hf.evaluation import image_quality as module
from funlora_hf.evaluation.features import FeatureExtractor, extract_features
from funlora_hf.evaluation.image_quality import (
    compare_images,
    frechet_distance,
    match_classes,
    precision_recall,
    reference_features,
)


DIGITS = ClassifierConfig(epochs=20, crop_padding=0, horizontal_flip=False)


def normal(count: int, width: int, *, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def closed_formula(mean_a, covariance_a, mean_b, covariance_b) -> float:
    """By the roots of symmetric matrices: trace((A B)^(1/2)) = trace((A^(1/2) B A^(1/2))^(1/2))."""
    root = symmetric_root(covariance_a)
    cross = symmetric_root(root @ covariance_b @ root)
    return ((mean_a - mean_b) ** 2).sum() + np.trace(covariance_a + covariance_b - 2 * cross)


def with_moments(count: int, mean: np.ndarray, covariance: np.ndarray, *, seed: int) -> torch.Tensor:
    """Points whose sample mean and (unbiased) sample covariance are exactly these."""
    points = normal(count, len(mean), seed=seed).numpy()
    points -= points.mean(axis=0)
    white = points @ np.linalg.inv(symmetric_root(np.atleast_2d(np.cov(points, rowvar=False))))
    return torch.from_numpy(white @ symmetric_root(covariance) + mean)


def some_covariance(width: int, *, seed: int) -> np.ndarray:
    factor = normal(width, width, seed=seed).numpy()
    return factor @ factor.T + 0.1 * np.eye(width)


# Frechet distance


@pytest.mark.parametrize("width", [1, 2, 9])
def test_the_distance_of_normal_distributions_is_the_closed_formula_s(width):
    moments = [(normal(1, width, seed=s).numpy()[0], some_covariance(width, seed=10 + s)) for s in (0, 1)]
    real, generated = (with_moments(n, *m, seed=20) for n, m in zip((60, 45), moments, strict=True))
    assert frechet_distance(real, generated) == pytest.approx(closed_formula(*moments[0], *moments[1]), rel=1e-9)


def test_the_distance_of_fewer_points_than_features_is_the_formula_s():
    real, generated = normal(7, 12, seed=0), 2 * normal(6, 12, seed=1) + 1
    moments = [f(x.numpy()) for x in (real, generated) for f in (lambda a: a.mean(axis=0), lambda a: np.cov(a.T))]
    assert frechet_distance(real, generated) == pytest.approx(closed_formula(*moments), rel=1e-5)


def test_a_shift_counts_by_its_squared_length_and_scaling_by_its_part_of_the_variance():
    points, shift = normal(50, 4, seed=0), torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64)
    assert frechet_distance(points, points + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)
    centred = points - points.mean(dim=0)
    variance = centred.var(dim=0).sum().item()
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * variance, rel=1e-9)
    assert frechet_distance(3 * centred, centred) == pytest.approx(4 * variance, rel=1e-9)


@pytest.mark.parametrize("count", [3, 40])
def test_equal_sets_are_at_no_distance_and_never_below(count):
    points = normal(count, 8, seed=count).float()
    assert 0 <= frechet_distance(points, points) < 1e-6


# Precision and recall


def by_brute_force(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float]:
    def share(points, centres):
        inside = 0
        for point in points:
            for i, centre in enumerate(centres):
                others = sorted(np.linalg.norm(centre - other) for j, other in enumerate(centres) if j != i)
                if np.linalg.norm(point - centre) <= others[k - 1]:
                    inside += 1
                    break
        return inside / len(points)

    return share(generated, real), share(real, generated)


@pytest.mark.parametrize("block", [1, 4, 1000])
@pytest.mark.parametrize(("k", "count", "shift"), [(1, 12, 0.5), (3, 15, 1.5), (9, 10, 2.5)])
def test_precision_and_recall_are_those_of_the_definition(k, count, shift, block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    real, generated = normal(count, 3, seed=k), normal(14, 3, seed=30 + k) + shift
    found = precision_recall(real, generated, neighbours=k)
    assert found == pytest.approx(by_brute_force(real.numpy(), generated.numpy(), k))
    assert 0 < sum(found) < 2


def test_equal_sets_cover_each_other():
    points = normal(20, 3, seed=0).float()
    assert precision_recall(points, points, neighbours=1) == (1, 1)


def test_sets_far_apart_have_nothing_in_common():
    points = normal(20, 3, seed=0)
    assert precision_recall(points, points + 1000, neighbours=5) == (0, 0)


def test_a_generator_that_knows_one_of_four_modes_is_precise_and_recalls_little():
    modes = [normal(25, 2, seed=s) + 100 * s for s in range(4)]
    found = precision_recall(torch.cat(modes), modes[2].flip(0), neighbours=3)
    assert found == (1, 0.25)


def test_a_generator_that_repeats_one_real_image_recalls_that_one_alone():
    real = normal(20, 2, seed=0)
    found = precision_recall(real, real[3].repeat(10, 1), neighbours=3)
    assert found == (1, 1 / 20)


def test_exchanging_the_sets_exchanges_precision_and_recall():
    real, generated = normal(20, 3, seed=0), 0.5 * normal(15, 3, seed=1)
    there, back = (precision_recall(*pair, neighbours=2) for pair in ((real, generated), (generated, real)))
    assert there == back[::-1]
    assert there[0] != there[1]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(3, 30), width=st.integers(1, 40), k=st.integers(1, 2))
def test_the_order_of_the_images_does_not_matter(seed, count, width, k):
    real, generated = normal(count, width, seed=seed), normal(20, width, seed=seed + 1) + 0.5
    generator = torch.Generator().manual_seed(seed)
    shuffled = [x[torch.randperm(len(x), generator=generator)] for x in (real, generated)]
    assert precision_recall(*shuffled, neighbours=k) == precision_recall(real, generated, neighbours=k)
    # Roots of the zeros of a covariance that is not of full rank keep half the digits.
    assert frechet_distance(*shuffled) == pytest.approx(frechet_distance(real, generated), rel=1e-5)


POINTS = normal(4, 3, seed=0)


# Sets of images


class Pixels(FeatureExtractor):
    """The pixels themselves."""

    name = "pixels"

    def forward(self, images):
        return images.flatten(1).double()


def pictures(count: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, 2, 2), generator=generator, dtype=torch.uint8)


def test_images_are_compared_by_their_features():
    real, generated = pictures(30), pictures(20, seed=1)
    quality = compare_images(real, generated, Pixels(), neighbours=3)
    features = real.flatten(1).double(), generated.flatten(1).double()
    assert (quality.extractor, quality.neighbours) == ("pixels", 3)
    assert (quality.num_real, quality.num_generated) == (30, 20)
    assert quality.frechet_distance == frechet_distance(*features)
    assert (quality.precision, quality.recall) == precision_recall(*features, neighbours=3)


class Broken(Pixels):
    def forward(self, images):
        return super().forward(images) / 0


def test_features_that_are_not_finite_are_named():
    with pytest.raises(ValueError, match="features of 'pixels' are not finite"):
        compare_images(pictures(3), pictures(3), Broken(), neighbours=1)


def test_few_images_are_compared_by_fewer_neighbours_which_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        quality = compare_images(pictures(30), pictures(4, seed=1), Pixels(), neighbours=5)
    assert quality.neighbours == 3
    assert "by 3 neighbours instead of 5: there are only 30 real and 4 generated images" in caplog.text
    features = [x.flatten(1).double() for x in (pictures(30), pictures(4, seed=1))]
    assert (quality.precision, quality.recall) == precision_recall(*features, neighbours=3)


def test_every_class_has_the_same_share_on_both_sides():
    real = {c: torch.full((n, 1, 1, 1), 10 * c, dtype=torch.uint8) for c, n in ((2, 3), (0, 6), (1, 0), (5, 2))}
    for c in real:
        real[c] += torch.arange(len(real[c]), dtype=torch.uint8)[:, None, None, None]
    generated = {c: torch.arange(4, dtype=torch.uint8)[:, None, None, None] + 100 + 10 * c for c in (0, 1, 2, 3)}
    chosen_real, chosen_generated = match_classes(real, generated)
    # Class 0: every 6/4-th of six; class 2: all three; the classes 1, 3 and 5 lack images of one kind.
    assert chosen_real.flatten().tolist() == [0, 1, 3, 4, 20, 21, 22]
    assert chosen_generated.flatten().tolist() == [100, 101, 102, 103, 120, 121, 122]


@pytest.mark.parametrize("measure", [frechet_distance, lambda a, b: compare_images(a, b, Pixels(), neighbours=1)])
def test_without_torchmetrics_the_extra_is_named(measure, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    given_ = (POINTS, POINTS) if measure is frechet_distance else (pictures(3), pictures(3))
    with pytest.raises(ImportError, match=r'needs torchmetrics.*pip install "funlora-hf\[demo\]"'):
        measure(*given_)


# The reference classifier


@pytest.fixture(scope="module")
def digits():
    """Training and test images of three digits, by class."""
    data = load_image_data("digits", image_size=8, channels=1)
    return [{c: data.images(c, split=split) for c in (0, 1, 7)} for split in ("train", "test")]


@pytest.fixture(scope="module")
def extractor(digits):
    return reference_features(digits[0], config=DIGITS)


def test_the_reference_depends_on_images_and_recipe_alone(digits, extractor):
    train, test = digits
    torch.manual_seed(12345)
    before = torch.random.get_rng_state()
    again = reference_features({c: train[c] for c in (7, 0, 1)}, config=DIGITS)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(extract_features(again, test[7]), extract_features(extractor, test[7]))
    other = reference_features(train, config=ClassifierConfig(epochs=1))
    assert not torch.equal(extract_features(other, test[7]), extract_features(extractor, test[7]))


def test_worse_digits_are_further_away(digits, extractor):
    train, test = digits
    real, drawn = match_classes(test, train)
    noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(0))
    found = [
        compare_images(real, (drawn + strength * noise).clamp(0, 255).to(torch.uint8), extractor, neighbours=3)
        for strength in (0, 40, 120)
    ]
    distances, precisions = [q.frechet_distance for q in found], [q.precision for q in found]
    assert distances == sorted(distances)
    assert distances[0] < distances[1] < distances[2]
    assert precisions[0] > 0.8
    assert precisions[2] < 0.5


def test_a_forgotten_class_is_seen_in_recall_and_not_in_precision(digits, extractor):
    train, test = digits
    real, _ = match_classes(test, train)
    only_two = torch.cat([train[c][: len(real) // 2] for c in (0, 1)])
    quality = compare_images(real, only_two, extractor, neighbours=3)
    assert quality.precision > 0.8
    assert quality.recall < 0.75
