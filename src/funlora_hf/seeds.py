"""The import path before `utils.seeds`."""

from .utils.seeds import *  # noqa: F403
