"""Numbers of images of the recipes' datasets, for a dry run, which must not download them."""

from __future__ import annotations

from dataclasses import dataclass


# Dataset on the Hub -> number of classes, training images per class, test images per class.
_KNOWN = {
    "uoft-cs/cifar10": (10, 5000, 1000),
    "uoft-cs/cifar100": (100, 500, 100),
    "ylecun/mnist": (10, 6000, 1000),  # in the mean
    "clane9/imagenet-100": (100, 1267, 50),
}


@dataclass(frozen=True)
class KnownCounts:
    """Numbers of training and test images of each class of a recipe's data set on the Hub, which is not opened."""

    class_names: dict[int, str]
    counts: dict[str, int]

    @classmethod
    def of(cls, name: str, most: int | None) -> KnownCounts | None:
        """Return the counts of a dataset, with at most `most` images per class, or None if the dataset is not known."""
        if name not in _KNOWN:
            return None
        classes, *counts = _KNOWN[name]
        train, test = (min(count, most or count) for count in counts)
        return cls({class_id: str(class_id) for class_id in range(classes)}, {"train": train, "test": test})

    def __str__(self) -> str:
        return f"{len(self.class_names)} classes of {self.counts['train']:,} training and {self.counts['test']:,} test images"

    def count(self, class_id: int, *, split: str = "train") -> int:
        """Number of images of a class."""
        return self.counts[split]
