"""Image datasets by class, and their split into tasks."""

from .class_ids import assign_class_ids
from .image_data import ImageClassificationData, load_image_data
from .pixels import to_model_range
from .tasks import Task, split_into_tasks


__all__ = [
    "ImageClassificationData",
    "Task",
    "assign_class_ids",
    "load_image_data",
    "split_into_tasks",
    "to_model_range",
]
