"""Image datasets by class, and their split into tasks.

`datasets` reads the dataset: its label column once, and its images only when a class is requested. A continual
learner must not hold the images of earlier tasks, so nothing here keeps decoded images.
"""

import glob
import hashlib
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    DownloadConfig,
    Features,
    Value,
    config,
    load_dataset,
    load_dataset_builder,
)
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError, DatasetsError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from huggingface_hub import constants
from PIL import Image, ImageOps

from ..utils.checks import check_not_mistyped, is_repository_name, one_form, shortened
from .class_ids import check_unique
from .untrusted_images import check_inside, decode_image


logger = logging.getLogger(__name__)

# Every held-out split is drawn with this seed, not the run's: all runs must be tested on the same images.
HOLD_OUT_SEED = 0
TEST_SPLIT_NAMES = ("test", "validation", "valid", "val")
LABEL_COLUMN_NAMES = ("label", "labels", "class", "class_label", "category", "target", "fine_label", "y")
_COLUMN_TYPES = {
    "image_column": "Image, binary or a struct with 'bytes'",
    "label_column": "ClassLabel, integers or strings",
}
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


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
                    "Pillow can open and convert to 8 bits; remove this row from the dataset or replace its image."
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
        FileNotFoundError: dataset_name is a local path that does not exist, or almost the name of a folder that does.
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
    name, splits, roots = _open_splits(
        dataset_name,
        config_name=dataset_config_name,
        revision=revision,
        digits_test_fraction=test_fraction,
        one_class=one_class,
    )
    test_split = _find_splits(splits, train_split=train_split, test_split=test_split)
    train = splits[train_split]
    _warn_of_other_splits(name, splits, {train_split, test_split if hold_out else train_split})
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


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 0..255 of any shape to float32 in [-1, 1], the range of generator and classifier."""
    return images.float() / 127.5 - 1


def _open_splits(
    dataset_name: str,
    *,
    config_name: str | None,
    revision: str | None,
    digits_test_fraction: float,
    one_class: bool,
) -> tuple[str, DatasetDict, tuple[str, ...]]:
    """Name for results, all splits of the dataset, and the folders in which its rows may name files."""
    path = Path(os.path.expanduser(dataset_name))
    is_digits = dataset_name == "digits"
    is_local = not is_digits and (path.exists() or path.suffix == ".parquet" or not is_repository_name(dataset_name))
    if not is_digits:
        check_not_mistyped(f"dataset_name={dataset_name!r}", str(path), revision=revision)
    if is_local and not path.exists():
        raise FileNotFoundError(
            f"dataset_name={dataset_name!r} looks like a local path, but there is no such file or folder: expected a "
            "folder of images or parquet files, or a .parquet file. Correct --dataset_name, or give an id on the Hub "
            "(owner/name)."
        )
    parquet = [*path.glob("*.parquet"), *path.glob("*/*.parquet")] if is_local and path.is_dir() else []
    is_parquet_folder = any(file.name not in METADATA_FILES for file in parquet)
    if revision is not None and (is_digits or is_local):
        raise ValueError(
            f"revision={revision!r} is only for datasets on the Hub, but dataset_name={dataset_name!r} is not one: "
            "leave --dataset_revision out."
        )
    if config_name is not None and (is_digits or (is_local and not is_parquet_folder)):
        raise ValueError(
            f"dataset_config_name={config_name!r} has no meaning for dataset_name={dataset_name!r}, expected None: "
            "leave --dataset_config_name out."
        )
    if is_digits:
        return "digits", _load_digits(digits_test_fraction), ()
    roots = [path if path.is_dir() else path.parent, config.EXTRACTED_DATASETS_PATH]
    if not is_local:
        roots = [constants.HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH]
        name, arguments = dataset_name, {"path": dataset_name, "name": config_name, "revision": revision}
    elif is_parquet_folder:
        name, arguments = path.resolve().name, {"path": str(path), "name": config_name}
    elif path.is_dir():
        files = _image_folder_files(path, dataset_name, one_class=one_class)
        name, arguments = path.resolve().name, {"path": "imagefolder", **files}
    elif path.suffix == ".parquet":
        name, arguments = path.stem, {"path": "parquet", "data_files": glob.escape(str(path))}
    else:
        raise ValueError(
            f"dataset_name={dataset_name!r} is a file of type {path.suffix!r}, expected .parquet: convert it to "
            "parquet, or give a folder of class subfolders with images."
        )
    if is_local:
        # By default, its bar says that it downloads them.
        arguments["download_config"] = DownloadConfig(download_desc="Finding images")
    try:
        with _without_unpickling():
            splits = load_dataset(**arguments)
            if config_name is None and is_local and "data_files" not in arguments:
                _warn_of_files_in_no_split(path, load_dataset_builder(**arguments).config.data_files)
            return name, splits, tuple(map(str, roots))
    except Exception as error:
        # For damaged files `datasets` raises many types. Errors of the network and of permissions pass unchanged.
        here = "" if is_local else ", which is no file or folder here,"
        of_files = (FileNotFoundError, ValueError, DatasetsError)
        if isinstance(error, (ImportError, OSError)) and not isinstance(error, of_files):
            if is_local or isinstance(error, ImportError):
                raise
            raise OSError(
                f"dataset_name={dataset_name!r}{here} could not be loaded from the Hub, where names look like owner/name: {error}"
            ) from error
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        # A DatasetGenerationError only wraps the error that names the cause.
        told = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise kind(
            f"dataset_name={dataset_name!r}{here} could not be loaded ({type(told).__name__}: {shortened(str(told), 1000)}). "
            "Expected a folder of class subfolders with images, a folder of parquet files, a .parquet file or a hub id (owner/name); "
            "check --dataset_name, --dataset_config_name and --dataset_revision."
        ) from error


@contextmanager
def _without_unpickling() -> Iterator[None]:
    """Refuse entries `.pth` of tar archives, for which `datasets` would call torch's (restricted) unpickler."""

    def refuse(_: bytes) -> None:
        raise ValueError("an archive has an entry .pth, which is a pickle, expected images and labels as text or JSON")

    before = WebDataset.DECODERS
    WebDataset.DECODERS = {**before, "pth": refuse}
    try:
        yield
    finally:
        WebDataset.DECODERS = before


def _load_digits(test_fraction: float) -> DatasetDict:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "dataset_name='digits' needs scikit-learn, which is not installed: run "
            'pip install "funlora-hf[demo]", or choose another --dataset_name.'
        ) from error
    digits = load_digits()
    pixels = np.round(digits.images * 255 / 16).astype(np.uint8)
    train, test = train_test_split(
        np.arange(len(pixels)), test_size=test_fraction, stratify=digits.target, random_state=HOLD_OUT_SEED
    )
    rows = {"image": [Image.fromarray(image) for image in pixels], "label": digits.target}
    dataset = Dataset.from_dict(
        rows, features=Features({"image": ImageFeature(), "label": ClassLabel(num_classes=10)})
    )
    return DatasetDict(train=dataset.select(train), test=dataset.select(test))


def _image_folder_files(folder: Path, dataset_name: str, *, one_class: bool) -> dict:
    """Arguments of `load_dataset` for class subfolders, for split folders that hold class subfolders, or for one class.

    Left to itself, `datasets` finds splits by words in any part of a path: a class called "train" or "bullet_train"
    would become the training split and the other classes would be lost. It also gives a single class no label.
    """
    top = _subfolders(folder)
    has_metadata = any((place / file).exists() for place in (folder, *top) for file in METADATA_FILES)
    is_flat = not (top or has_metadata) and any(_is_image(file) and file.is_file() for file in folder.iterdir())
    if is_flat and not one_class:
        raise ValueError(
            f"dataset_name={dataset_name!r}: give the folder above it, {os.path.normpath(folder / os.pardir)!r}, if that has one "
            f"subfolder for each class. {dataset_name!r} itself has images and no subfolders, expected one for each class."
        )
    is_class = one_class and is_flat
    if has_metadata or not (top or is_class):
        # Labels in a metadata file, or archives: datasets knows these.
        return {"data_dir": str(folder)}
    split_folders = [place for place in top if _subfolders(place)]
    class_folders = [place for split in split_folders for place in _subfolders(split)] if split_folders else top
    class_folders = [folder] if is_class else class_folders
    deeper = [place for place in class_folders if _subfolders(place)]
    if deeper or len(split_folders) not in (0, len(top)):
        odd = deeper or [place for place in top if place not in split_folders]
        raise ValueError(
            f"dataset_name={dataset_name!r} mixes folder depths (see {odd[0].relative_to(folder)}): expected "
            "<class>/<image> for every image, or <split>/<class>/<image> for every image. Move the images or remove "
            "the odd folders."
        )
    _warn_of_other_files(class_folders, folder)
    # Links to files outside of the folder are read as images: somebody else may have packed them.
    root = folder.resolve()
    places = [one for place in class_folders for one in (place, *place.iterdir()) if one.is_symlink()]
    leading = [(one, target) for one in places if not (target := one.resolve()).is_relative_to(root)]
    if leading:
        link, target = leading[0]
        warnings.warn(
            f"dataset {root.name!r}: {len(leading)} links lead out of the folder and are followed, such as "
            f"{shortened(str(link.relative_to(folder)), 300)!r} to {shortened(str(target), 300)!r}.",
            stacklevel=4,
        )
    # A pattern for each class, since those with several * leave linked folders out.
    patterns: dict[str, list[str]] = {}
    for place in class_folders:
        if place.is_symlink() and glob.has_magic(str(place)):
            raise ValueError(
                f"dataset_name={dataset_name!r} has the linked folder {str(place.relative_to(folder))!r}, which `datasets` cannot "
                "follow for one of the characters *?[ in its path: rename it, or put the images themselves there."
            )
        split = place.parent.name if split_folders else "train"
        patterns.setdefault(split, []).append(f"{glob.escape(str(place))}/*")
    return {"data_files": patterns, "drop_labels": False}


def _warn_of_other_files(class_folders: Sequence[Path], folder: Path) -> None:
    """Warn of what is left out: visible files without the extension of an image, images beside the folders of the classes,
    folders whose name begins with "__", and folders without images."""
    left_out: Counter[tuple[str, str]] = Counter()
    beside, empty = [], []
    # A folder of images that is one class has nothing above it.
    for above in sorted({folder, *(place.parent for place in class_folders if place != folder)} - {*class_folders}):
        beside += [one for one in above.iterdir() if one.name.startswith("__") or (_is_image(one) and one.is_file())]
    for place in class_folders:
        files = list(place.iterdir())
        if not any(map(_is_image, files)):
            empty.append(place)
        for file in files:
            if not _is_image(file) and not file.name.startswith((".", "__")):
                left_out[place.relative_to(folder).as_posix(), file.suffix or "none"] += 1
    counted = [f"{count} in {place!r} (extension {suffix})" for (place, suffix), count in left_out.items()]
    for problem, found in (
        ("these files do not have the extension of an image", counted),
        ("these are outside of the folders of the classes, or are folders with names that begin with '__',", beside),
        ("these folders have no image", empty),
    ):
        if found:
            names = ", ".join(one if isinstance(one, str) else repr(str(one.relative_to(folder))) for one in found)
            warnings.warn(
                f"dataset {folder.resolve().name!r}: {problem} and are left out: {shortened(names, 1000)}.",
                stacklevel=5,
            )


def _is_image(file: Path) -> bool:
    # datasets skips names that start with "." or "__".
    return file.suffix.lower() in ImageFolder.EXTENSIONS and not file.name.startswith((".", "__"))


def _warn_of_files_in_no_split(folder: Path, splits: Mapping[str, Sequence[str]]) -> None:
    """Warn of files like those of the splits that `datasets`, which finds splits by words such as "test" in names, takes for none."""
    taken = {Path(os.path.abspath(file)) for files in splits.values() for file in files}
    suffixes = {file.suffix for file in taken}
    found = (Path(os.path.abspath(file)) for file in folder.rglob("*") if file.suffix in suffixes)
    others = sorted(
        os.path.relpath(file, folder)
        for file in found
        if file not in taken
        and not any(part.startswith((".", "__")) for part in file.relative_to(os.path.abspath(folder)).parts)
    )
    if others:
        warnings.warn(
            f"dataset {folder.resolve().name!r}: {len(others)} of {len(taken) + len(others)} files are in no split and are left out, since "
            f"others have the name of one, such as 'test', in theirs: {shortened(', '.join(others), 1000)}.",
            stacklevel=4,
        )


def _subfolders(folder: Path) -> list[Path]:
    # datasets skips names that start with "." or "__", too.
    return sorted(place for place in folder.iterdir() if place.is_dir() and not place.name.startswith((".", "__")))


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


def _warn_of_other_splits(name: str, splits: DatasetDict, used: set[str | None]) -> None:
    others = [f"{split!r} ({split_rows.num_rows} rows)" for split, split_rows in splits.items() if split not in used]
    if others:
        warnings.warn(
            f"dataset {name!r}: these splits are not used: {shortened(', '.join(others), 1000)}. --train_split and --test_split choose.",
            stacklevel=3,
        )


def _find_columns(features: Features, image_column: str | None, label_column: str | None) -> tuple[str, str]:
    images, encoded, labels, values = [], [], [], []
    for name, feature in features.items():
        if isinstance(feature, ImageFeature):
            images.append(name)
        elif isinstance(feature, ClassLabel):
            labels.append(name)
        elif _is_integer(feature) or _is_string(feature):
            values.append(name)
        elif getattr(feature, "dtype", "") in ("binary", "large_binary") or (
            isinstance(feature, dict) and "bytes" in feature
        ):
            encoded.append(name)
    image_column = _find_column("image_column", image_column, features, images, [*images, *encoded])
    usual = [name for name in values if name.lower() in LABEL_COLUMN_NAMES]
    accepted = [name for name in (*labels, *values) if name != image_column]
    return image_column, _find_column("label_column", label_column, features, labels or usual, accepted)


def _find_column(field: str, column: str | None, features: Features, found: list[str], accepted: list[str]) -> str:
    """The column given, which must be one of `accepted`, or the only one of `found`."""
    if column is None:
        if len(found) == 1:
            return found[0]
        raise ValueError(
            f"{field}=None finds {found or 'none'} among the columns {list(features)}, expected exactly one: name the "
            f"column with --{field}; a folder of images needs one subfolder for each class."
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


def to_array(image: Image.Image, *, size: int, channels: int) -> np.ndarray:
    """One image as uint8 (channels, size, size), values 0..255."""
    image = _to_eight_bits(image)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        # Dropping the alpha channel instead would show the colours under transparent pixels.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image = image.convert("L" if channels == 1 else "RGB")
    # Scales the shorter side to size and keeps the centre; an image that fits is copied unchanged.
    image = ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale a grey image of more than 8 bits to 0..255; convert("L") would clip it at 255.

    The scale must not depend on the single image, so it follows from the mode alone: "I;16" and "I" (in which Pillow
    may open a 16-bit file) hold 0..65535, "F" holds 0..1.
    """
    if not (image.mode in ("I", "F") or image.mode.startswith("I;16")):
        return image
    values = np.array(image, dtype=np.float64)
    limit = 1 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= limit):
        raise ValueError(
            f"its values are in {values.min()}..{values.max()}, but an image of mode {image.mode!r} must hold "
            f"0..{limit}"
        )
    # In place: a large image takes 8 bytes per pixel here.
    values *= 255 / limit
    return Image.fromarray(np.round(values, out=values).astype(np.uint8))
