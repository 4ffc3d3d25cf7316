"""Image datasets by class, and their split into tasks."""

from .image_data import (
    ImageClassificationData,
    Task,
    assign_class_ids,
    load_image_data,
    split_into_tasks,
    to_model_range,
)


__all__ = [
    "ImageClassificationData",
    "Task",
    "assign_class_ids",
    "load_image_data",
    "split_into_tasks",
    "to_model_range",
]
