"""The loop that trains each part of the tiny base and its judges."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel


logger = logging.getLogger(__name__)


def fit(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    loss: Callable[[], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    ema_decay: float,
) -> None:
    """Minimise a loss by AdamW with one cycle of the rate: 5 % warm-up, then a cosine to 0.

    Args:
        name: what is trained, for the log, which has a line for each twentieth of the steps.
        parameters: trained; at the end they are their moving average.
        loss: draws a batch and returns its loss.
        ema_decay: of the moving average, below 1.
    """
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    rate = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    ema = EMAModel(trained, decay=ema_decay)
    start, period, total = time.monotonic(), max(1, steps // 20), 0.0
    for step in range(1, steps + 1):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rate.step()
        ema.step(trained)
        total += value.item()
        if step % period == 0:
            seconds = time.monotonic() - start
            logger.info("%s: step %d of %d, loss %.4f, %.0f s", name, step, steps, total / period, seconds)
            total = 0.0
    ema.copy_to(trained)
