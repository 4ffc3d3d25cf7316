"""The import path before `continual.strategies.sequential`."""

from .strategies.sequential import *  # noqa: F403
