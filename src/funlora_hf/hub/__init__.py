"""Share bases and classes on the Hub: push, pull, describe, verify, delete."""

from .delete import delete_class, delete_class_from_hub
from .push import push_adapter, push_all, push_base


__all__ = ["delete_class", "delete_class_from_hub", "push_adapter", "push_all", "push_base"]
