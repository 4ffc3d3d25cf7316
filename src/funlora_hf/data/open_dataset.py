"""Open a dataset by its name, with `datasets`: the digits, a folder, a parquet file or a dataset on the Hub."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    DownloadConfig,
    Features,
    config,
    load_dataset,
    load_dataset_builder,
)
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError, DatasetsError
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from huggingface_hub import constants
from PIL import Image

from ..utils.checks import check_not_mistyped, is_repository_name, shortened
from .image_folder import METADATA_FILES, image_folder_files, warn_of_files_in_no_split, warn_of_images_in_no_row


# Every held-out split is drawn with this seed, not the run's: all runs must be tested on the same images.
HOLD_OUT_SEED = 0


def open_splits(
    dataset_name: str,
    *,
    config_name: str | None,
    revision: str | None,
    digits_test_fraction: float,
    one_class: bool,
) -> tuple[str, DatasetDict, tuple[str, ...]]:
    """Return the dataset's name for results, all its splits, and the folders in which its rows may name files."""
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
            f"revision={revision!r} is only for datasets on the Hub, but dataset_name={dataset_name!r} is not on the Hub: "
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
        files = image_folder_files(path, dataset_name, one_class=one_class)
        name, arguments = path.resolve().name, {"path": "imagefolder", **files}
    elif path.suffix == ".parquet":
        name, arguments = path.stem, {"path": "parquet", "data_files": glob.escape(str(path))}
    else:
        raise ValueError(
            f"dataset_name={dataset_name!r} is a file of type {path.suffix!r}, expected .parquet: convert it to "
            "parquet, or give a folder of class subfolders with images."
        )
    if is_local:
        # By default, the progress bar says that it downloads them.
        arguments["download_config"] = DownloadConfig(download_desc="Finding images")
    try:
        with _without_unpickling():
            splits = load_dataset(**arguments)
            if config_name is None and is_local and "data_files" not in arguments:
                files = load_dataset_builder(**arguments).config.data_files
                warn_of_files_in_no_split(path, files)
                warn_of_images_in_no_row(path, splits, files)
            return name, splits, tuple(map(str, roots))
    except Exception as error:
        # For damaged files `datasets` raises many types of errors. Network and permission errors pass unchanged.
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
            "Expected a folder of class subfolders with images, a folder of parquet files, a .parquet file or an id on the Hub "
            "(owner/name); check --dataset_name, --dataset_config_name and --dataset_revision."
        ) from error


@contextmanager
def _without_unpickling() -> Iterator[None]:
    """Refuse `.pth` entries of tar archives, for which `datasets` would call torch's (restricted) unpickler."""

    def refuse(_: bytes) -> None:
        raise ValueError("an archive has a .pth entry, which is a pickle, expected images and labels as text or JSON")

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
