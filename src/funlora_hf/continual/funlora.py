"""The import path before `continual.strategies.funlora`."""

from .strategies.funlora import *  # noqa: F403
