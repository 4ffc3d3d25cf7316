"""The import path before `continual.strategies.joint`."""

from .strategies.joint import *  # noqa: F403
