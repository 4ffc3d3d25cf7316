"""The import path before `continual.strategies.finetune`."""

from .strategies.finetune import *  # noqa: F403
