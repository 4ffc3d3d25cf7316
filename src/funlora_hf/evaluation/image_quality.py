"""Measure how near generated images are to real ones: Frechet distance, precision, recall.

All three compare two sets of images in the feature space of an extractor.

- The Frechet distance [text: Heusel et al. 2017, arXiv 1706.08500] is that of the two normal distributions with the
  sets' means m and covariances S:

      |m_r - m_g|^2 + trace(S_r + S_g - 2 (S_r S_g)^(1/2))

  It is FID only in the features of Inception. In those of a classifier [ours], values of different classifiers cannot be
  compared.
- Precision and recall [text: Kynkaanniemi et al. 2019, arXiv 1904.06991]. Every image of a set has a ball whose radius
  is the distance to its k-th nearest neighbour in the set. Precision is the share of generated images that lie in the
  ball of a real one, recall the share of real images that lie in the ball of a generated one.

Compare only values of the same extractor (a classifier trained on the same classes and images with the same settings),
of the same numbers of images (all three are biased, the Frechet distance by about D / N) and of the same k. A set of fewer
images than features has a covariance that is not of full rank: the distance is still defined, but says less.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..classifier import ClassifierConfig, train_classifier
from .features import ClassifierFeatures, FeatureExtractor, extract_features


logger = logging.getLogger(__name__)

# Not the run's seed: the distances of two runs can be compared only if the same network measures both.
REFERENCE_SEED = 0
# Rows of a matrix of distances that are in memory at once.
_BLOCK = 1000


@dataclass(frozen=True)
class ImageQuality:
    """How near generated images are to real ones; see the module.

    Args:
        frechet_distance: 0 for equal means and covariances; FID if, and only if, `extractor` is "inception".
        precision: share of the generated images that look real.
        recall: share of the real images that the generator covers.
        neighbours: the k of precision and recall.
    """

    extractor: str
    frechet_distance: float
    precision: float
    recall: float
    neighbours: int
    num_real: int
    num_generated: int


def frechet_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """Compute the Frechet distance of two sets of features, in float64, by torchmetrics.

    Args:
        real: float `(N, D)`, N >= 2.
        generated: float `(M, D)`, M >= 2.

    Returns:
        A number >= 0, in squared units of the features.

    Raises:
        ImportError: torchmetrics is not installed.

    Source: arXiv 1706.08500, equation 6 [text].
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError(
            f'the Frechet distance needs torchmetrics ({error}); install it with: pip install "funlora-hf[demo]"'
        ) from error
    # Only the main process measures: a metric that synchronizes would wait for the others forever.
    metric = FrechetInceptionDistance(feature=_Given(real.shape[1]), sync_on_compute=False)
    metric.update(real.cpu().double(), real=True)
    metric.update(generated.cpu().double(), real=False)
    # For equal sets, rounding can make it negative.
    return max(0.0, metric.compute().item())


@torch.no_grad()
def precision_recall(real: torch.Tensor, generated: torch.Tensor, *, neighbours: int) -> tuple[float, float]:
    """Compute precision and recall, both in [0, 1], of two sets of features, by balls to the k-th nearest neighbour.

    Memory grows with N + M, not with their product.

    Args:
        real: float `(N, D)`, on any device.
        generated: float `(M, D)`, on the same device.
        neighbours: k, at least 1 and less than N and M.

    Source: arXiv 1904.06991, equations 1 and 2 [text]: a ball includes its surface, so equal images are in each other's
        ball, even if a generator repeats one image and all its radii are 0.
    """
    return (
        _share_inside(generated, real, _radii(real, neighbours)),
        _share_inside(real, generated, _radii(generated, neighbours)),
    )


def compare_images(
    real: torch.Tensor, generated: torch.Tensor, extractor: FeatureExtractor, *, neighbours: int
) -> ImageQuality:
    """Compute all measures of two sets of images.

    Args:
        real: uint8 `(N, C, H, W)`, N >= 2.
        generated: uint8 `(M, C, H, W)`, M >= 2.
        neighbours: k of precision and recall. For sets of k images or fewer it is lowered, with a warning; the result says
            to which number.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: features that are not finite.
    """
    features = extract_features(extractor, real), extract_features(extractor, generated)
    if not all(of_set.isfinite().all() for of_set in features):
        raise ValueError(f"The features of {extractor.name!r} are not finite: check the extractor's weights.")
    distance = frechet_distance(*features)
    most = min(len(real), len(generated)) - 1
    if neighbours > most:
        text = "Precision and recall by %d neighbours instead of %d: there are only %d real and %d generated images."
        logger.warning(text, most, neighbours, len(real), len(generated))
        neighbours = most
    shares = precision_recall(*features, neighbours=neighbours)
    return ImageQuality(extractor.name, distance, *shares, neighbours, len(real), len(generated))


def match_classes(
    real: Mapping[int, torch.Tensor], generated: Mapping[int, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose two sets of images in which every class has the same share.

    Of each class that both sides have, the same number of real and generated images is taken, as many as the side with fewer
    has: real ones evenly spaced in their order, generated ones from the first on. Otherwise a class that is rare on one side
    would count as a fault of the generator.

    Args:
        real: class id -> uint8 `(n, C, H, W)`, n >= 0.
        generated: class id -> uint8 `(m, C, H, W)`, m >= 0; for at least one class, n and m are more than 0.

    Returns:
        Real and generated images, uint8 `(N, C, H, W)` each, in the order of the class ids.

    Source: [ours].
    """
    pairs = []
    for class_id in sorted(real.keys() & generated.keys()):
        available, drawn = real[class_id], generated[class_id]
        count = min(len(available), len(drawn))
        if count:
            spaced = torch.arange(count) * len(available) // count
            pairs.append((available[spaced], drawn[:count]))
    real_parts, drawn_parts = zip(*pairs, strict=True)
    return torch.cat(real_parts), torch.cat(drawn_parts)


def reference_features(
    images: Mapping[int, torch.Tensor], *, config: ClassifierConfig, device: str | torch.device = "cpu"
) -> ClassifierFeatures:
    """Train a classifier on real images of all classes, with a seed of its own, and return its features.

    The same images and recipe give the same features, whatever the run's seed, strategy and order of classes.

    Args:
        images: class id -> uint8 `(n, C, H, W)`, for at least two classes.
        device: where to train; the result stays there.

    Raises:
        RuntimeError: the training's loss is not finite.

    Source: [ours].
    """
    parts = [images[class_id] for class_id in sorted(images)]
    classifier = train_classifier(
        torch.cat(parts),
        torch.cat([torch.full((len(part),), label) for label, part in enumerate(parts)]),
        num_classes=len(parts),
        config=config,
        seed=REFERENCE_SEED,
        device=device,
        description="classifier of image quality",
    )
    return ClassifierFeatures(classifier)


class _Given(nn.Identity):
    """Takes the place of the extractor that torchmetrics expects: its "images" are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def _radii(features: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Return the distance of each point to its k-th nearest neighbour; `(N, D)` -> `(N,)`."""
    # The nearest is the point itself.
    blocks = (_distances(block, features) for block in features.split(_BLOCK))
    return torch.cat([block.topk(neighbours + 1, largest=False).values[:, -1] for block in blocks])


def _share_inside(points: torch.Tensor, centres: torch.Tensor, radii: torch.Tensor) -> float:
    """Return the share of the points that are in the ball of at least one centre."""
    inside = [(_distances(block, centres) <= radii).any(dim=1) for block in points.split(_BLOCK)]
    return torch.cat(inside).double().mean().item()


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # By differences: the faster way, by a matrix product, does not give exactly zero for equal points.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
