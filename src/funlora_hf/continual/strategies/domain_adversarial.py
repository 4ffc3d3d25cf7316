"""A classifier that is kept from telling drawn images from real ones, by a second head behind a reversed gradient.

Source: DANN (Ganin and Lempitsky 2015, arXiv 1409.7495) [text]; two outputs, real and drawn, as in DiffClass's figure [fig].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class ReversedGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by `-strength`."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradients[0], None


class DomainAdversarial(nn.Module):
    """A classifier and a linear domain head on the features that its last linear layer reads.

    Args:
        classifier: as from `build_classifier`, used, not copied; its logits do not change.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        *_, head = (module for module in classifier.modules() if isinstance(module, nn.Linear))
        self.classifier, self.domain = classifier, nn.Linear(head.in_features, 2).to(head.weight.device)
        head.register_forward_pre_hook(self._read)

    def forward(self, images: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        """Classify images `(batch, channels, height, width)` in [-1, 1].

        Returns:
            Logits of the classes, `(batch, classes)`, and of real (0) and drawn (1), `(batch, 2)`, of whose loss the classifier's
            features get the gradient times `-strength`.
        """
        logits = self.classifier(images)
        return logits, self.domain(ReversedGradient.apply(self._features, strength))

    def _read(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0]


def strength_at(progress: float, most: float) -> float:
    """Return the strength of the reversal after a share of the training: it rises from 0 to nearly `most`.

    Source: DANN, `2 / (1 + exp(-10 p)) - 1` [text].
    """
    return most * (2 / (1 + math.exp(-10 * progress)) - 1)
