"""Whatever rows a dataset has, they are loaded or refused with dataset, row and value: no hang, memory within the cap."""

from __future__ import annotations

import binascii
import io
import json
import os
import struct
import warnings
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hostile import bounded, examples, guarded
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from funlora_hf.data.image_data import load_image_data
from funlora_hf.data.untrusted_images import FORMATS, MOST_PIXELS


TIMES = pytest.mark.parametrize("times", [1, pytest.param(40, marks=pytest.mark.soak, id="forty-times-as-many")])
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F"]
NAMES = ["../../x", "/etc/passwd", "a\0b", "", " ", ".", "..", "x" * 10**5, "<b>&", "a\nb", "CON", "\u202e", "--seed"]
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("_guard")]


@pytest.fixture(scope="module")
def _guard(tmp_path_factory):
    with guarded(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets_cache"))
        yield


def encoded(mode: str, kind: str, size=(9, 7), **options) -> bytes | None:
    """None if the format has no such mode."""
    pixels = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)
    image = Image.fromarray(pixels)
    if mode in ("I", "I;16", "F"):
        values = np.asarray(image.convert("L")).astype({"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode])
        image = Image.fromarray(values / np.float32(255) if mode == "F" else values)
    elif mode != "LAB":
        image = image.convert(mode)
    else:
        image = Image.new("LAB", size, (100, 5, 250))
    buffer = io.BytesIO()
    try:
        image.save(buffer, kind, **options)
    except (OSError, KeyError, ValueError):
        return None
    return buffer.getvalue()


KINDS = [*FORMATS, "EPS", "ICO", "ICNS", "PDF", "SGI", "IM", "DDS", "SPIDER", "XBM"]
SOUND = {(kind, mode): content for kind in KINDS for mode in MODES if (content := encoded(mode, kind)) is not None}
SOUND["GIF", "three frames"] = encoded(
    "P", "GIF", save_all=True, append_images=[Image.new("P", (9, 7), 3), Image.new("P", (30, 40), 5)]
)
SOUND["TIFF", "two frames"] = encoded("L", "TIFF", save_all=True, append_images=[Image.new("L", (50, 4))])


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "colour"])
def one_image(request, tmp_path_factory):
    """A folder of images, the file of its only image of class "cat", and what loads it."""
    folder = tmp_path_factory.mktemp("images") / "pets"
    for name in ("cat/a.png", "dog/b.png"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(SOUND["PNG", "RGB"])
    return folder / "cat" / "a.png", load_image_data(str(folder), image_size=8, channels=request.param)


def attempt(one_image, content: bytes) -> str | None:
    """The message that an image is refused with; None if it is loaded."""
    file, found = one_image
    file.write_bytes(content)
    try:
        with bounded():
            images = found.images(0)
    except ValueError as error:
        text = str(error)
    else:
        assert (images.shape, images.dtype) == ((1, *found.image_shape), torch.uint8)
        return None
    assert "dataset 'pets', split 'train', row 0: the image of class 'cat' in column 'image'" in text
    assert "Expected an image" in text
    assert "remove this row" in text or "remove this file" in text
    assert len(text) < 1000
    return text


def test_every_mode_of_every_format(one_image):
    """Those that are not of the formats known are refused before anything is decoded, or started to."""
    texts = {key: attempt(one_image, content) for key, content in SOUND.items()}
    known = {key for key in texts if key[0] in FORMATS and key[1] != "LAB"}
    assert {kind for kind, _ in known} >= {"PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "TGA", "PCX", "WEBP"}
    # 32 bits, which have no scale of their own, are refused by their values, if at all.
    assert {key: texts[key] for key in known if texts[key]} == {}
    for kind in ("EPS", "ICO", "SGI"):
        found = {mode: text for (one, mode), text in texts.items() if one == kind}
        assert found
        assert all(text and f"of format {kind}, expected one of AVIF" in text for text in found.values())


def spoiled_images() -> st.SearchStrategy[bytes]:
    sound = st.sampled_from(list(SOUND.values()))
    magic = [
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"\xff\xd8\xff",
        b"BM",
        b"II*\0",
        b"MM\0*",
        b"RIFF\0\0\0\0WEBP",
        b"P6 ",
        b"%!PS",
    ]
    numbers = st.sampled_from([b"\0\0", b"\xff\xff", b"\0\0\0\0", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\x01\0\0"])

    def put(content: bytes, place: int, piece: bytes) -> bytes:
        place %= max(len(content), 1)
        return content[:place] + piece + content[place + len(piece) :]

    return st.one_of(
        st.binary(max_size=200),
        st.tuples(st.sampled_from(magic), st.binary(max_size=100)).map(b"".join),
        st.builds(lambda content, end: content[: end % len(content)], sound, st.integers(0, 10**4)),
        st.builds(put, sound, st.integers(0, 63), numbers),
        st.builds(put, sound, st.integers(0, 10**4), st.binary(min_size=1, max_size=8)),
        st.builds(lambda one, other, at: one[:at] + other[at:], sound, sound, st.integers(0, 200)),
    ).map(sound_checksums)


def sound_checksums(content: bytes) -> bytes:
    """A PNG with spoiled chunks is refused for their checksums alone, unless these are made anew."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    place, found = 8, content[:8]
    while len(content) >= place + 12:
        (size,) = struct.unpack(">I", content[place : place + 4])
        chunk = content[place + 4 : place + 8 + size]
        found += struct.pack(">I", size) + chunk + struct.pack(">I", binascii.crc32(chunk))
        place += 12 + size
    return found + content[place:]


@TIMES
def test_spoiled_images(times, one_image):
    loaded = refused = 0

    @examples(250 * times)
    @given(spoiled_images())
    def check(content):
        nonlocal loaded, refused
        text = attempt(one_image, content)
        loaded, refused = loaded + (text is None), refused + (text is not None)

    check()
    assert loaded > 5
    assert refused > 50


def png(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return sound_checksums(
        SOUND["PNG", "RGB"][:8] + struct.pack(">I", 13) + header + bytes(4) + SOUND["PNG", "RGB"][33:]
    )


def replaced(key, old: bytes, new: bytes) -> bytes:
    assert old in SOUND[key]
    return SOUND[key].replace(old, new, 1)


BOMBS = {
    "PNG": png(60_000, 60_000),
    "PNG, a line": png(2**31 - 1, 1),
    "PNG, just too large": png(2**13, 2**12 + 1),
    "GIF": replaced(("GIF", "L"), struct.pack("<HH", 9, 7), b"\xff" * 4),
    "BMP": replaced(("BMP", "RGB"), struct.pack("<ii", 9, 7), struct.pack("<ii", 2**30, 2**30)),
    "JPEG": replaced(("JPEG", "RGB"), struct.pack(">HH", 7, 9), b"\xff" * 4),
    "PPM": replaced(("PPM", "RGB"), b"9 7", b"99999 99999"),
    "TGA": replaced(("TGA", "RGB"), struct.pack("<HH", 9, 7), b"\xff" * 4),
    "TIFF": replaced(("TIFF", "RGB"), struct.pack("<HHII", 256, 4, 1, 9), struct.pack("<HHII", 256, 4, 1, 2**31 - 1)),
    "JPEG2000": SOUND["JPEG2000", "RGB"].replace(struct.pack(">II", 7, 9), b"\x00\x0f\xff\xff" * 2),
}


@pytest.mark.parametrize("name", BOMBS)
def test_sizes_are_looked_at_before_anything_is_decoded(name, one_image, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("it was decoded"))
    text = attempt(one_image, BOMBS[name])
    assert "pixels" in text
    assert str(MOST_PIXELS) in text or "DecompressionBombError" in text, text


@pytest.mark.parametrize("mode", ["LA", "I;16"])
def test_the_largest_image_is_within_the_cap(mode, one_image):
    """Those that take most bytes a pixel."""
    image = Image.new(mode, (2**13, 2**12))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    del image
    assert attempt(one_image, buffer.getvalue()) is None


def test_images_elsewhere_are_not_asked_for(tmp_path):
    """Neither from a server nor from what is no file, which a row may name."""
    os.mkfifo(tmp_path / "pipe")
    places = ["http://127.0.0.1:9/a.png", "hf://datasets/a/b/c.png", "/dev/zero", str(tmp_path / "pipe"), "\0", ""]
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
    rows = {
        "image": [{"bytes": None, "path": place} for place in places],
        "label": [f"c{i}" for i in range(len(places))],
    }
    table = datasets.Dataset.from_dict(rows, features=features).data.table
    metadata = {"info": {"features": {"image": {"_type": "Image"}, "label": {"dtype": "string", "_type": "Value"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(metadata)}), tmp_path / "train.parquet")
    found = load_image_data(str(tmp_path / "train.parquet"), image_size=8, channels=1)
    for class_id in found.class_names:
        with bounded(), pytest.raises(ValueError, match=r"no file on this machine|the row holds no image"):
            found.images(class_id)


COLUMN_TYPES = [
    pa.int64(),
    pa.uint64(),
    pa.int8(),
    pa.string(),
    pa.float64(),
    pa.bool_(),
    pa.binary(),
    pa.list_(pa.int64()),
]
ANY = st.none() | st.sampled_from([0, 1, 2, 5, -1, 127, 2**31, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 0.5, True, *NAMES])
IMAGES = st.sampled_from([None, {"bytes": SOUND["PNG", "L"]}, {"bytes": b""}, {"bytes": None, "path": "/etc/passwd"}])
CASES = st.one_of(
    st.tuples(st.sampled_from([[0, 1], [0, 1, 5, 2**62], [2**63 - 1, 0]]), st.sampled_from([pa.int64(), pa.uint64()])),
    st.tuples(st.just(NAMES), st.just(pa.string())),
    st.tuples(st.none(), st.sampled_from(COLUMN_TYPES)),
)
LABELLED = CASES.flatmap(
    lambda case: st.tuples(
        st.lists(st.tuples(ANY if case[0] is None else st.sampled_from(case[0]), IMAGES), max_size=4), st.just(case[1])
    )
)
FEATURES = [
    None,
    *["sound"] * 12,
    {"_type": "ClassLabel", "names": ["a", "b"]},
    {"_type": "ClassLabel", "names": NAMES},
    {"_type": "ClassLabel", "names": ["a", "a"]},
    {"_type": "ClassLabel", "names": []},
    {"_type": "ClassLabel", "names": 3},
    {"_type": "ClassLabel"},
    {"_type": "os.system"},
    {"dtype": "float32", "_type": "Value"},
    {"dtype": "x", "_type": "Value"},
    {},
    3,
]


def write_rows(file: Path, rows, column_type, feature, columns) -> bool:
    """False if the labels do not fit the column's type."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    labels, images = [label for label, _ in rows], [one and {"path": None, **one} for _, one in rows]
    try:
        arrays = {"image": pa.array(images, image), "label": pa.array(labels, column_type)}
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return False
    table = pa.table({name: arrays[name] for name in columns})
    if feature == "sound":
        feature = {"dtype": {pa.float64(): "float64"}.get(column_type, str(column_type)), "_type": "Value"}
    if feature is not None:
        described = {"image": {"_type": "Image"}, "label": feature}
        metadata = {"info": {"features": {name: described[name] for name in columns}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, file)
    return True


@TIMES
def test_any_rows(times, tmp_path):
    """Labels, columns and what the file says of them; then each class's images."""
    file = tmp_path / "train.parquet"
    counts = {"loaded": 0, "refused": 0}

    @examples(60 * times)
    @given(
        LABELLED,
        st.sampled_from(FEATURES),
        st.sampled_from([("image", "label")] * 4 + [("image",), ("label",), ()]),
        st.sampled_from([None, "image"]),
        st.sampled_from([None, "label"]),
    )
    def check(labelled, feature, columns, image_column, label_column):
        rows, column_type = labelled
        if not write_rows(file, rows, column_type, feature, columns):
            return
        text = None
        try:
            with bounded():
                found = load_image_data(
                    str(file), image_size=8, channels=1, image_column=image_column, label_column=label_column
                )
        except ValueError as error:
            text = str(error)
        if text is not None:
            counts["refused"] += 1
            assert any(f"{name}=" in text for name in ("dataset_name", "image_column", "label_column", "train_split"))
            assert len(text) < 20_000
            return
        counts["loaded"] += 1
        assert sum(found.count(one) + found.count(one, split="test") for one in found.class_names) == len(rows)
        for class_id, name in found.class_names.items():
            assert 0 <= class_id < 2**63
            assert isinstance(name, str)
            try:
                with bounded():
                    found.images(class_id)
            except ValueError as error:
                text = str(error)
            assert text is None or ("row" in text and len(text) < 2000)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check()
    assert min(counts.values()) > 3, counts
