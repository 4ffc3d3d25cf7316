"""The import path before `utils.files`."""

from .utils.files import *  # noqa: F403
