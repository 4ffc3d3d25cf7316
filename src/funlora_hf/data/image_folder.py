"""Find the splits and classes in a folder of images, and warn about files that are left out."""

from __future__ import annotations

import glob
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from datasets import DatasetDict
from datasets import Image as ImageFeature
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from ..utils.checks import shortened


METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_ARCHIVES = tuple(suffix for _, suffixes, _ in shutil.get_unpack_formats() for suffix in suffixes)


def image_folder_files(folder: Path, dataset_name: str, *, one_class: bool) -> dict:
    """Return the arguments of `load_dataset` for class subfolders, for split folders with class subfolders, or for one class.

    By default, `datasets` finds splits by words in any part of a path: a class called "train" or "bullet_train" would
    become the training split and the other classes would be lost. It also gives a single class no label.
    """
    top = _subfolders(folder)
    has_metadata = any((place / file).exists() for place in (folder, *top) for file in METADATA_FILES)
    is_flat = not (top or has_metadata) and any(is_image(file) and file.is_file() for file in folder.iterdir())
    if is_flat and not one_class:
        raise ValueError(
            f"dataset_name={dataset_name!r}: give the folder above it, {os.path.normpath(folder / os.pardir)!r}, if that has one "
            f"subfolder for each class. {dataset_name!r} itself has images and no subfolders, expected one subfolder for each class."
        )
    is_class = one_class and is_flat
    has_archive = any(file.name.lower().endswith(_ARCHIVES) for file in folder.iterdir())
    if not (top or is_class or has_metadata or has_archive):
        files = Counter(file.suffix or "none" for file in folder.iterdir() if file.is_file())
        found = ", ".join(f"{count} (extension {suffix})" for suffix, count in files.items())
        raise FileNotFoundError(
            f"dataset_name={dataset_name!r} has no image and no subfolder{f', but {found}' if found else ''}: expected "
            f"{'images of one class, or ' if one_class else ''}one subfolder with images for each class."
        )
    if has_metadata or not (top or is_class):
        # Labels in a metadata file, or archives: `datasets` reads these itself.
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
    warn_of_links(folder, [one for place in class_folders for one in (place, *place.iterdir())])
    # One pattern for each class, since a pattern with several * leaves linked folders out.
    patterns: dict[str, list[str]] = {}
    for place in class_folders:
        if place.is_symlink() and glob.has_magic(str(place)):
            raise ValueError(
                f"dataset_name={dataset_name!r} has the linked folder {str(place.relative_to(folder))!r}, which `datasets` cannot "
                "follow because of a character *, ? or [ in its path: rename it, or put the images themselves there."
            )
        split = place.parent.name if split_folders else "train"
        # Not of other files: `datasets` would unpack an archive among the images, into classes by the folders in it.
        suffixes = sorted({file.suffix for file in place.iterdir() if is_image(file)})
        patterns.setdefault(split, []).extend(f"{glob.escape(str(place))}/*{glob.escape(one)}" for one in suffixes)
    return {"data_files": patterns, "drop_labels": False}


def _warn_of_other_files(class_folders: Sequence[Path], folder: Path) -> None:
    """Warn about files and folders that are left out.

    These are visible files without the extension of an image, images and archives outside of the folders of the classes, folders
    whose name begins with "__", and folders without images.
    """
    left_out: Counter[tuple[str, str]] = Counter()
    beside, empty = [], []
    # If the folder itself is the one class, no folder above it is read.
    for above in sorted({folder, *(place.parent for place in class_folders if place != folder)} - {*class_folders}):
        beside += [
            one
            for one in above.iterdir()
            if one.name.startswith("__") or (one.is_file() and (is_image(one) or one.name.lower().endswith(_ARCHIVES)))
        ]
    for place in class_folders:
        files = list(place.iterdir())
        if not any(map(is_image, files)):
            empty.append(place)
        for file in files:
            if not is_image(file) and not file.name.startswith((".", "__")):
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


def is_image(file: Path) -> bool:
    """Return whether a file has the name of an image."""
    # `datasets` skips names that start with "." or "__".
    return file.suffix.lower() in ImageFolder.EXTENSIONS and not file.name.startswith((".", "__"))


def warn_of_links(folder: Path, places: Iterable[Path]) -> None:
    """Warn about links among files and folders, which are read, that lead out of a folder: another person may have made them."""
    root = folder.resolve()
    links = [one for one in places if one.is_symlink()]
    leading = [(one, target) for one in links if not (target := one.resolve()).is_relative_to(root)]
    if leading:
        link, target = leading[0]
        warnings.warn(
            f"dataset {root.name!r}: {len(leading)} links lead out of the folder and are followed, such as "
            f"{shortened(str(link.relative_to(folder)), 300)!r} to {shortened(str(target), 300)!r}.",
            stacklevel=5,
        )


def warn_of_files_in_no_split(folder: Path, splits: Mapping[str, Sequence[str]]) -> None:
    """Warn about images, parquet files and files of the types that were read which are in no split.

    `datasets` finds splits by words such as "test" in names, and reads files of one type only.
    """
    taken = {Path(os.path.abspath(file)) for files in splits.values() for file in files}
    suffixes = {file.suffix for file in taken} | {".parquet", *ImageFolder.EXTENSIONS}
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
            f"the names of other files contain the name of a split, such as 'test', or they are of another type: "
            f"{shortened(', '.join(others), 1000)}.",
            stacklevel=4,
        )


def warn_of_images_in_no_row(folder: Path, splits: DatasetDict, files: Mapping[str, Sequence[str]]) -> None:
    """Warn about images among the files of the splits that are in no row, since a metadata file does not list them."""
    images = {os.path.abspath(file) for several in files.values() for file in several if is_image(Path(file))}
    for split in splits.values() if images else ():
        for column in [name for name, kind in split.features.items() if isinstance(kind, ImageFeature)]:
            rows = split.select_columns([column]).cast_column(column, ImageFeature(decode=False))
            images -= {os.path.abspath(row[column]["path"]) for row in rows if row[column] and row[column]["path"]}
    if images:
        names = ", ".join(sorted(os.path.relpath(file, folder) for file in images))
        warnings.warn(
            f"dataset {folder.resolve().name!r}: {len(images)} images are not in the metadata file and are left out: "
            f"{shortened(names, 1000)}.",
            stacklevel=4,
        )


def _subfolders(folder: Path) -> list[Path]:
    # `datasets` also skips names that start with "." or "__".
    return sorted(place for place in folder.iterdir() if place.is_dir() and not place.name.startswith((".", "__")))
