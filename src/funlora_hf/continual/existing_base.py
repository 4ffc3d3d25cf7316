"""The import path of existing bases before `continual.base`."""

from .base import ExistingBase, find_base


__all__ = ["ExistingBase", "find_base"]
