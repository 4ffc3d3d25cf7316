"""The import path before `continual.strategies.replay`."""

from .strategies.replay import *  # noqa: F403
