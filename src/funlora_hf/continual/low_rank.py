"""The import path before `continual.strategies.low_rank`."""

from .strategies.low_rank import *  # noqa: F403
