"""Measure how far the samples of a class are from its real images, to see how this changes from task to task.

A generator that learns past classes from its own samples drifts: its samples lose their place (the mean) and their variety (the
covariance). Both are compared in the features of a classifier of real images, whose answers are counted, too. Like the Frechet
distance there, values of different classifiers cannot be compared, and fewer images give larger distances.

Source: bias and variance over generations of bootstrapped generators, arXiv 2512.11867 [text]; these measures are [ours].
"""

from __future__ import annotations

import torch
from torch import nn

from ..classifier import percentage


def class_drift(real: torch.Tensor, drawn: torch.Tensor, head: nn.Module, label: int) -> dict[str, float | None]:
    """Compare the samples of a class with its real images.

    Args:
        real: features of real images, float `(N, D)`, N >= 1.
        drawn: features of samples, float `(M, D)`, M >= 1, on the same device as `head`.
        head: last layer of the classifier, from features to logits.
        label: row of the class in the logits.

    Returns:
        "mean": the distance of the means, in units of the real images' spread `sqrt(trace S)`, S their covariance;
        "covariance": `|S' - S| / |S|`, with S' of the samples and Frobenius norms; "accuracy": % of the samples that the classifier
        finds to be of the class. The first two are None if a side has one image, or if all real images are equal.
    """
    with torch.no_grad():
        found = {"accuracy": percentage(head(drawn).argmax(dim=1) == label)}
    if min(len(real), len(drawn)) < 2:
        return {"mean": None, "covariance": None, **found}
    real, drawn = real.double().cpu(), drawn.double().cpu()
    of_real, of_drawn = torch.cov(real.T), torch.cov(drawn.T)
    spread = of_real.trace().sqrt().item()
    if not spread:
        return {"mean": None, "covariance": None, **found}
    distance = (drawn.mean(dim=0) - real.mean(dim=0)).norm().item()
    return {"mean": distance / spread, "covariance": ((of_drawn - of_real).norm() / of_real.norm()).item(), **found}
