"""The import path before `continual.strategies.guide`."""

from .strategies.guide import *  # noqa: F403
