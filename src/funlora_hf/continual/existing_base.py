"""The import path of existing bases before `continual.base`."""

from .base import *  # noqa: F403
