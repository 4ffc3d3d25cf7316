"""Image datasets by class, and their split into tasks.

`datasets` reads the dataset: its label column once, and its images only when a class is requested. A continual
learner must not hold the images of earlier tasks, so nothing here keeps decoded images.
"""

import hashlib
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature

from ..utils.checks import one_form, shortened
from .class_ids import check_unique
from .open_dataset import HOLD_OUT_SEED, open_splits
from .pixels import to_array
from .untrusted_images import check_inside, decode_image


logger = logging.getLogger(__name__)

TEST_SPLIT_NAMES = ("test", "validation", "valid", "val")
LABEL_COLUMN_NAMES = ("label", "labels", "class", "class_label", "category", "target", "fine_label", "y")
_COLUMN_TYPES = {
    "image_column": "Image, binary or a struct with 'bytes'",
    "label_column": "ClassLabel, integers or strings",
    "caption_column": "strings",
}


@dataclass(frozen=True)
class _Part:
    """Images of one split: undecoded rows of a dataset's split, and the rows of each class."""

    source: str  # the dataset's own name of the split, for error texts: a held-out part comes from "train" too
    encoded: Dataset
    rows: dict[int, np.ndarray]
    roots: tuple[str, ...] = ()  # folders in which a row may name a file


@dataclass(kw_only=True, eq=False, repr=False)
class ImageClassificationData:
    """Real images of a dataset, by class; only requested classes are decoded.

    Made by `load_image_data`.

    Attributes:
        name: dataset name, for results (for a local dataset the last part of its path).
        class_names: class id -> name, in the dataset's own order.
        image_shape: (channels, height, width) of the images that `images` returns.
        image_column: the dataset's column of the images.
        parts: "train" and "test", undecoded.
    """

    name: str
    class_names: dict[int, str]
    image_shape: tuple[int, int, int]
    image_column: str
    parts: dict[str, _Part]
    # Shared by the copies that `with_class_ids` makes, so that each warning is given once per dataset.
    _warned: set[str] = field(default_factory=set)

    def count(self, class_id: int, *, split: str = "train") -> int:
        """Number of images of a class, without decoding any.

        Args:
            class_id: a key of `class_names`.
            split: "train" or "test".

        Raises:
            ValueError: class_id or split is unknown.
        """
        return len(self._rows(class_id, split))

    def images(self, class_id: int, *, split: str = "train") -> torch.Tensor:
        """Decode the images of one class.

        Nothing is cached: the caller keeps what it needs.

        Args:
            class_id: a key of `class_names`.
            split: "train" or "test".

        Returns:
            uint8 tensor (N, C, H, W), values 0..255, in the dataset's row order; N is 0 for a class without test
            images.

        Raises:
            ValueError: class_id or split is unknown, or an image cannot be read.
        """
        rows = self._rows(class_id, split)
        part = self.parts[split]
        channels, size, _ = self.image_shape
        pixels = np.empty((len(rows), channels, size, size), dtype=np.uint8)
        name, several = shortened(repr(self.class_names[class_id]), 100), 0
        for index, (row, example) in enumerate(zip(rows, part.encoded.select(rows), strict=True)):
            try:
                if example[self.image_column] is None:
                    raise ValueError("the row holds no image")
                image = decode_image(example[self.image_column], roots=part.roots)
                mode, several = image.mode, several + image.info["has_more_frames"]
                pixels[index] = to_array(image, size=size, channels=channels)
            except Exception as error:  # PIL's decoders raise many types, several of them not OSError
                path = (example[self.image_column] or {}).get("path")
                file = f", file {shortened(repr(path), 300)}," if path else ""
                raise ValueError(
                    f"dataset {self.name!r}, split {part.source!r}, row {row}: the image of class "
                    f"{name} in column {self.image_column!r}{file} cannot be read "
                    f"({type(error).__name__}: {shortened(str(error), 300)}). Expected an image that "
                    f"Pillow can open and convert to 8 bits; remove this {'file' if path else 'row from the dataset'} or replace its image."
                ) from error
            self._warn_of_conversion(mode)
        if several and "frames" not in self._warned:
            self._warned.add("frames")
            warnings.warn(
                f"dataset {self.name!r}, split {part.source!r}: {several} of {len(rows)} images of class {name} have several frames, of "
                "which only the first is read. (Other classes like it are not reported.)",
                stacklevel=2,
            )
        return torch.from_numpy(pixels)

    def digests(self) -> dict[str, dict[str, str | int]]:
        """Name, number of images and a hash of their files for each class, without decoding any.

        Raises:
            ValueError: the file of an image cannot be read.
        """
        found: dict[str, dict[str, str | int]] = {}
        for class_id, name in self.class_names.items():
            digest = hashlib.sha256()
            for split, part in self.parts.items():
                for example in part.encoded.select(self._rows(class_id, split)):
                    encoded = example[self.image_column] or {}
                    content = encoded.get("bytes")
                    if content is None and encoded.get("path") is not None:
                        content = check_inside(encoded["path"], part.roots).read_bytes()
                    digest.update(hashlib.sha256(content or b"").digest())
            counts = {f"{split}_images": self.count(class_id, split=split) for split in self.parts}
            found[f"class {class_id}"] = {"name": name, **counts, "sha256": digest.hexdigest()[:16]}
        return found

    def with_class_ids(self, ids: Sequence[int]) -> "ImageClassificationData":
        """The same data under new class ids.

        Args:
            ids: the new ids, one for each entry of `class_names` and in its order.

        Raises:
            ValueError: ids has the wrong length or holds an id twice.
        """
        ids = [int(class_id) for class_id in ids]
        if len(ids) != len(self.class_names):
            raise ValueError(
                f"ids={ids} has {len(ids)} entries, expected {len(self.class_names)}: give one id for each class of "
                f"dataset {self.name!r}, in the order of class_names."
            )
        check_unique("ids", ids)
        new_id = dict(zip(self.class_names, ids, strict=True))
        class_names = {new_id[old]: name for old, name in self.class_names.items()}
        parts = {
            split: replace(part, rows={new_id[old]: rows for old, rows in part.rows.items()})
            for split, part in self.parts.items()
        }
        return replace(self, class_names=class_names, parts=parts)

    def _rows(self, class_id: int, split: str) -> np.ndarray:
        if split not in self.parts:
            raise ValueError(f"split={split!r} is unknown: expected one of {sorted(self.parts)}.")
        if class_id not in self.class_names:
            raise ValueError(
                f"class_id={class_id!r} is not a class of dataset {self.name!r}: use one of {list(self.class_names)}."
            )
        return self.parts[split].rows.get(class_id, np.empty(0, dtype=np.int64))

    def _warn_of_conversion(self, mode: str) -> None:
        grey = mode in ("1", "L", "LA", "La", "I", "F") or mode.startswith("I;16")
        channels = self.image_shape[0]
        if grey == (channels == 1) or "conversion" in self._warned:
            return
        self._warned.add("conversion")
        kinds = ("colour", "grey (1 channel)") if channels == 1 else ("grey", "RGB (3 channels)")
        warnings.warn(
            f"dataset {self.name!r} holds {kinds[0]} images; they are converted to {kinds[1]}, as the model expects.",
            stacklevel=3,
        )


def load_image_data(
    dataset_name: str = "digits",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    image_size: int,
    channels: int,
    test_fraction: float = 0.2,
    validation_fraction: float | None = None,
    dataset_config_name: str | None = None,
    revision: str | None = None,
    max_images_per_class: int | None = None,
    hold_out: bool = True,
    one_class: bool = False,
) -> ImageClassificationData:
    """Open an image-classification dataset; only its labels are read here.

    Args:
        dataset_name: "digits" (scikit-learn's 8x8 digits), a folder of class subfolders (with or without train and
            test folders above them), a folder of parquet files, a single .parquet file, or a dataset id on the Hub.
        image_column: column of the images; None: the only `Image` column.
        label_column: column of the labels (`ClassLabel`, integers >= 0 or strings); None: the only `ClassLabel`
            column, else the only column with a usual name such as "label".
        train_split: the dataset's split to train on.
        test_split: the dataset's split to test on; None: "test", else "validation", "valid" or "val", else
            `test_fraction` of the training split is held out. The name of `train_split` also means this hold-out.
        image_size: height and width of the images returned. The shorter side is resized, the centre kept.
        channels: 1 (grey) or 3 (RGB).
        test_fraction: fraction of each class held out if the dataset has no test split (for "digits": the size of
            its test split). Every class keeps at least one training image and, if it has two, has one test image.
        validation_fraction: None, or the fraction of each class's training images that becomes the "test" split
            instead. The real test images are not read, so that settings can be chosen without them.
        dataset_config_name: configuration of a Hub dataset or of a folder of parquet files.
        revision: revision of a Hub dataset.
        max_images_per_class: keep only the first images of each class, up to this number, in both splits; None: all.
        hold_out: False: use all images of a dataset without a test split for training, and have no test images.
        one_class: read a folder of images without subfolders as one class, named after the folder.

    Returns:
        The classes that have training images, under the dataset's own ids: the index in `ClassLabel`, the rank of a
        string among the sorted names, or an integer itself.

    Raises:
        FileNotFoundError: dataset_name is a local path that does not exist, almost the name of a folder that does, or a folder
            without images.
        ImportError: "digits" without scikit-learn.
        ValueError: an argument does not fit the dataset, or rows are unlabelled.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels={channels!r} must be 1 (grey) or 3 (RGB): use a model with 1 or 3 input channels.")
    most = 1 if max_images_per_class is None else max_images_per_class
    for name, count in (("image_size", image_size), ("max_images_per_class", most)):
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
            raise ValueError(f"{name}={count!r} must be a whole number >= 1: set --{name} accordingly.")
    held = test_fraction if validation_fraction is None else validation_fraction
    for name, fraction in (("test_fraction", test_fraction), ("validation_fraction", held)):
        if not 0 < fraction < 1:
            raise ValueError(f"{name}={fraction!r} must be between 0 and 1, both excluded: set --{name} to e.g. 0.2.")
    name, splits, roots = open_splits(
        dataset_name,
        config_name=dataset_config_name,
        revision=revision,
        digits_test_fraction=test_fraction,
        one_class=one_class,
    )
    test_split = _find_splits(splits, train_split=train_split, test_split=test_split)
    train = splits[train_split]
    warn_of_other_splits(name, splits, {train_split, test_split if hold_out else train_split})
    image_column, label_column = _find_columns(train.features, image_column, label_column)
    logger.info("dataset %s: images in column %r, labels in column %r", name, image_column, label_column)

    # With a validation split the dataset's own test split is not even opened.
    sources = [train_split] if test_split is None or validation_fraction else [train_split, test_split]
    class_names, ids = _read_labels({source: splits[source] for source in sources}, label_column)
    rows = [_rows_by_class(ids[source]) for source in sources]
    if test_split is None:
        rows = list(_hold_out(rows[0], test_fraction)) if hold_out else [rows[0], {}]
    if validation_fraction:
        rows = list(_hold_out(rows[0], validation_fraction))
        sources = [train_split]
    train_rows, test_rows = rows

    trained = {class_id: class_name for class_id, class_name in class_names.items() if class_id in train_rows}
    if not trained:
        raise ValueError(
            f"train_split={train_split!r} of dataset {name!r} has no rows, expected training images: choose another "
            "split with --train_split."
        )
    check_unique("class_names", [one_form(class_name) for class_name in trained.values()])
    if any(not class_name.strip() for class_name in trained.values()):
        raise ValueError(f"label_column={label_column!r} of dataset {name!r} has an empty label, expected names.")
    dropped = [class_name for class_id, class_name in class_names.items() if class_id not in trained]
    if dropped:
        warnings.warn(
            f"dataset {name!r}: these classes have no image in split {train_split!r} and are left out: "
            f"{shortened(', '.join(dropped), 1000)}.",
            stacklevel=2,
        )
    parts = {}
    for split, source, split_rows in (("train", sources[0], train_rows), ("test", sources[-1], test_rows)):
        # Undecoded, so that a broken image fails under its row index, when its class is asked for.
        encoded = splits[source].select_columns([image_column]).cast_column(image_column, ImageFeature(decode=False))
        kept = {
            class_id: split_rows[class_id][:max_images_per_class] for class_id in trained if class_id in split_rows
        }
        parts[split] = _Part(source=source, encoded=encoded, rows=kept, roots=roots)
    return ImageClassificationData(
        name=name,
        class_names=trained,
        image_shape=(channels, image_size, image_size),
        image_column=image_column,
        parts=parts,
    )


def _find_splits(splits: DatasetDict, *, train_split: str, test_split: str | None) -> str | None:
    """Name of the test split, None for a hold-out of the training split."""
    for name, value in (("train_split", train_split), ("test_split", test_split)):
        if value is not None and value not in splits:
            raise ValueError(
                f"{name}={value!r} is not a split of the dataset, which has {list(splits)}: set --{name} to one of these."
            )
    if test_split is None:
        return next((name for name in TEST_SPLIT_NAMES if name in splits and name != train_split), None)
    return None if test_split == train_split else test_split


def warn_of_other_splits(name: str, splits: DatasetDict, used: set[str | None]) -> None:
    """Warn of splits that are not used."""
    others = [f"{split!r} ({split_rows.num_rows} rows)" for split, split_rows in splits.items() if split not in used]
    if others:
        warnings.warn(
            f"dataset {name!r}: these splits are not used: {shortened(', '.join(others), 1000)}. --train_split and --test_split choose.",
            stacklevel=3,
        )


def find_image_column(features: Features, image_column: str | None) -> str:
    """Return the column of the images: the one given, or the only one of type Image. Raise a ValueError if there is none."""
    images = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    encoded = [
        name
        for name, feature in features.items()
        if getattr(feature, "dtype", "") in ("binary", "large_binary")
        or (isinstance(feature, dict) and "bytes" in feature)
    ]
    return _find_column("image_column", image_column, features, images, [*images, *encoded])


def find_caption_column(features: Features, caption_column: str) -> str:
    """Return the column of the captions. Raise a ValueError if it is not there or has no text."""
    texts = [name for name, feature in features.items() if _is_string(feature)]
    return _find_column("caption_column", caption_column, features, [], texts)


def _find_columns(features: Features, image_column: str | None, label_column: str | None) -> tuple[str, str]:
    image_column = find_image_column(features, image_column)
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    values = [name for name, feature in features.items() if _is_integer(feature) or _is_string(feature)]
    usual = [name for name in values if name.lower() in LABEL_COLUMN_NAMES]
    accepted = [name for name in (*labels, *values) if name != image_column]
    return image_column, _find_column("label_column", label_column, features, labels or usual, accepted)


def _find_column(field: str, column: str | None, features: Features, found: list[str], accepted: list[str]) -> str:
    """The column given, which must be one of `accepted`, or the only one of `found`."""
    if column is None:
        if len(found) == 1:
            return found[0]
        more = "; a folder of images needs one subfolder for each class" * (field == "label_column")
        raise ValueError(
            f"{field}=None finds {found or 'none'} among the columns {list(features)}, expected exactly one: name the "
            f"column with --{field}{more}."
        )
    _check_column(field, column, features)
    if column not in accepted:
        raise ValueError(
            f"{field}={column!r} is of type {features[column]}, expected {_COLUMN_TYPES[field]}: name another of the "
            f"columns {list(features)} with --{field}."
        )
    return column


def _check_column(field: str, column: str, features: Features) -> None:
    if column not in features:
        raise ValueError(
            f"{field}={column!r} is not a column of the dataset, which has {list(features)}: set --{field} to one of "
            "these."
        )


def _is_integer(feature: object) -> bool:
    return isinstance(feature, Value) and feature.dtype.startswith(("int", "uint"))


def _is_string(feature: object) -> bool:
    return isinstance(feature, Value) and "string" in feature.dtype


def _read_labels(splits: Mapping[str, Dataset], column: str) -> tuple[dict[int, str], dict[str, np.ndarray]]:
    """Class id -> name in the dataset's order, and for each split the class id of every row (int64)."""
    values = {}
    for split, dataset in splits.items():
        _check_column("label_column", column, dataset.features)
        values[split] = dataset.select_columns([column])[:][column]
    first, *others = (set(of_split) - {None} for of_split in values.values())
    feature = next(iter(splits.values())).features[column]
    expected = "a class (integers from 0 to 2**63 - 1, or text)"
    if isinstance(feature, ClassLabel):
        names = dict(enumerate(feature.names))
        expected = f"0..{len(names) - 1}"
    elif _is_integer(feature):
        names = {value: str(value) for value in sorted(first.union(*others)) if 0 <= value < 2**63}
    else:
        # Names of the training split first: the ids must not depend on which test split is chosen.
        names = dict(enumerate([*sorted(first), *sorted(set().union(*others) - first)]))
    id_of = {name: class_id for class_id, name in names.items()} if _is_string(feature) else {i: i for i in names}
    ids = {}
    for split, of_split in values.items():
        row = next((row for row, value in enumerate(of_split) if value not in id_of), None)
        if row is not None:
            raise ValueError(
                f"label_column={column!r}: row {row} of split {split!r} has the label "
                f"{shortened(repr(of_split[row]), 100)}, expected {expected}. Remove the unlabelled rows, or choose a "
                f"labelled split with --train_split or --test_split (--test_split {next(iter(splits))} holds out a part "
                "of the training split)."
            )
        ids[split] = np.array([id_of[value] for value in of_split], dtype=np.int64)
    return names, ids


def _rows_by_class(ids: np.ndarray) -> dict[int, np.ndarray]:
    """Class id -> its row indices (int64, ascending); ids is int64 (rows,)."""
    order = np.argsort(ids, kind="stable")
    present, starts = np.unique(ids[order], return_index=True)
    return dict(zip(present.tolist(), np.split(order, starts[1:]), strict=True)) if len(present) else {}


def _hold_out(rows: Mapping[int, np.ndarray], fraction: float) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Split the rows of every class into (kept, held out), the same in every run."""
    kept, held = {}, {}
    for class_id, class_rows in rows.items():
        count = len(class_rows)
        held_count = min(max(1, round(fraction * count)), count - 1)
        # One generator per class: a class's split does not depend on the other classes. RandomState's stream is
        # frozen across numpy versions.
        order = np.random.RandomState(HOLD_OUT_SEED).permutation(count)
        held[class_id] = class_rows[np.sort(order[:held_count])]
        kept[class_id] = class_rows[np.sort(order[held_count:])]
    return kept, held
