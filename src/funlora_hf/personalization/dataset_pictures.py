"""Pictures of a concept in a data set of the Hub or of this machine, which `datasets` reads."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

from datasets import ClassLabel, config
from datasets import Image as ImageFeature

from ..data.image_data import find_caption_column, find_image_column, warn_of_other_splits
from ..data.open_dataset import open_splits
from ..data.untrusted_images import check_inside
from ..utils.files import whole_file


# A concept has a few.
MOST_PICTURES = 1000


def dataset_pictures(
    dataset_name: str,
    *,
    dataset_config_name: str | None = None,
    dataset_revision: str | None = None,
    train_split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> tuple[tuple[Path, ...], dict[str, str]]:
    """Put the pictures of a data set into files in the cache of `datasets`, undecoded.

    Args:
        dataset_name, dataset_config_name, dataset_revision, image_column: as for [`load_image_data`]; a folder of pictures
            without subfolders, too.
        train_split: the split that is read; None: "train".
        caption_column: column of the captions; None: there are none.

    Returns:
        The files in the order of the rows, and captions, which are not empty, by the files' names.

    Raises:
        FileNotFoundError: no such data set.
        ValueError: an argument does not fit the data set, or a row has no picture.
    """
    name, splits, roots = open_splits(
        dataset_name,
        config_name=dataset_config_name,
        revision=dataset_revision,
        digits_test_fraction=0.2,
        one_class=True,
    )
    split = train_split or "train"
    if split not in splits:
        raise ValueError(
            f"`train_split` is {split!r}, expected a split of the data set {name!r}: {', '.join(splits)}."
        )
    warn_of_other_splits(name, splits, {split})
    rows = splits[split]
    if not 1 <= len(rows) <= MOST_PICTURES:
        raise ValueError(
            f"the split {split!r} of the data set {name!r} has {len(rows)} rows, expected 1 to {MOST_PICTURES} pictures of one concept: "
            "choose another one."
        )
    column = find_image_column(rows.features, image_column)
    columns = [column]
    if caption_column is not None:
        columns.append(find_caption_column(rows.features, caption_column))
    for other, feature in rows.features.items():
        if isinstance(feature, ClassLabel) and feature.num_classes > 1:
            warnings.warn(
                f"data set {name!r}: the classes in its column {other!r} are not read; all its pictures are of one concept.",
                stacklevel=2,
            )
    contents, texts = [], []
    for number, row in enumerate(rows.select_columns(columns).cast_column(column, ImageFeature(decode=False))):
        encoded = row[column] or {}
        content = encoded.get("bytes")
        if content is None:
            try:
                content = check_inside(encoded.get("path"), roots).read_bytes()
            except ValueError as error:
                raise ValueError(f"row {number} of the data set {name!r} has no picture: {error}.") from error
        contents.append(content)
        texts.append(row[caption_column] if caption_column else None)
    digest = hashlib.sha256(b"".join(hashlib.sha256(one).digest() for one in contents)).hexdigest()[:16]
    folder = Path(config.HF_DATASETS_CACHE) / "funlora_concepts" / digest
    files = tuple(folder / f"{number:04}" for number in range(len(contents)))
    for file, content in zip(files, contents, strict=True):
        if not file.is_file():
            with whole_file(file) as temporary:
                temporary.write_bytes(content)
    return files, {file.name: text for file, text in zip(files, texts, strict=True) if text}
