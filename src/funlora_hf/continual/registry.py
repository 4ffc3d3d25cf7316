"""The import path before `continual.strategies.registry`."""

from .strategies.registry import *  # noqa: F403
