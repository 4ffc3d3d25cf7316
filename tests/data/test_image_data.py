"""Tests of the datasets by class and the task split; each result is checked against sklearn, PIL, numpy or pyarrow."""

import io
import os
import re
import shutil
import sys
import tarfile
import warnings
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from funlora_hf.data import open_dataset
from funlora_hf.data.class_ids import assign_class_ids
from funlora_hf.data.image_data import load_image_data
from funlora_hf.data.tasks import Task, split_into_tasks


CIFAR10 = Path(
    os.environ.get("FUNLORA_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10")
)
needs_cifar10 = pytest.mark.skipif(
    not (CIFAR10 / "train.parquet").exists(), reason="no CIFAR-10 parquet files; set FUNLORA_TEST_DATA to their folder"
)


@pytest.fixture(autouse=True, scope="module")
def _private_cache(tmp_path_factory):
    """Keep what `datasets` caches out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets_cache"))
        yield


def grey(value, size=8):
    return Image.fromarray(np.full((size, size), value, dtype=np.uint8))


def colour(value, size=8):
    return Image.fromarray(np.full((size, size, 3), value, dtype=np.uint8))


def encode(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def table(labels, label_feature, *, images=None, start=0):
    """A dataset whose row r shows the grey value start + r everywhere, so that an image tells its row."""
    images = images or [grey((start + row) % 256) for row in range(len(labels))]
    features = datasets.Features({"image": datasets.Image(), "label": label_feature})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def write(folder, **splits):
    folder.mkdir(exist_ok=True)
    for split, dataset in splits.items():
        dataset.to_parquet(folder / f"{split}.parquet")
    return str(folder)


def values(images):
    """The grey value of each image made by `table`, in order."""
    return images[:, 0, 0, 0].tolist()


def load(name, **options):
    return load_image_data(name, **{"image_size": 8, "channels": 1, **options})


CAT_DOG = datasets.ClassLabel(names=["dog", "cat"])


# Digits


def test_digits_equal_sklearns_arrays_and_split():
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    from sklearn.model_selection import train_test_split

    digits = sklearn_datasets.load_digits()
    split = train_test_split(digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    x_train, x_test, y_train, y_test = split

    found = load_image_data(image_size=8, channels=1)

    assert found.name == "digits"
    assert found.class_names == {digit: str(digit) for digit in range(10)}
    assert found.image_shape == (1, 8, 8)
    for name, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        for digit in range(10):
            expected = np.round(x[y == digit] * 255 / 16).astype(np.uint8)[:, None]
            images = found.images(digit, split=name)
            assert images.dtype == torch.uint8
            assert np.array_equal(images.numpy(), expected)
            assert found.count(digit, split=name) == len(expected)


def test_digits_without_sklearn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "funlora-hf\[demo\]"'):
        load("digits")


def test_digits_at_another_size_and_in_colour():
    pytest.importorskip("sklearn")
    native = load("digits")
    with pytest.warns(UserWarning, match="converted to RGB"):
        images = load("digits", image_size=16, channels=3).images(3)
    assert images.shape[1:] == (3, 16, 16)
    expected = Image.fromarray(native.images(3)[0, 0].numpy()).resize((16, 16), Image.Resampling.BICUBIC)
    assert all(np.array_equal(channel.numpy(), np.asarray(expected)) for channel in images[0])


# CIFAR-10


@needs_cifar10
def test_cifar10_counts_and_images():
    found = load(str(CIFAR10), image_size=32, channels=3)
    assert list(found.class_names.values())[:3] == ["airplane", "automobile", "bird"]
    assert {found.count(class_id) for class_id in found.class_names} == {5000}
    assert {found.count(class_id, split="test") for class_id in found.class_names} == {1000}

    raw = pq.read_table(CIFAR10 / "test.parquet")
    labels = raw.column("label").to_numpy()
    images = found.images(4, split="test")
    assert images.shape == (1000, 3, 32, 32)
    for place in (0, 999):
        row = int(np.flatnonzero(labels == 4)[place])
        direct = Image.open(io.BytesIO(raw.column("image")[row].as_py()["bytes"]))
        assert np.array_equal(images[place].permute(1, 2, 0).numpy(), np.asarray(direct))


# Where a dataset is


def image_folder(root, *files):
    for value, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        grey(10 * value).save(root / file)
    return str(root)


def test_image_folder_with_train_and_test(tmp_path):
    folder = image_folder(tmp_path / "pets", "train/dog/a.png", "train/cat/b.png", "test/cat/c.png", "train/cat/d.png")
    found = load(folder)
    assert found.name == "pets"
    assert found.class_names == {0: "cat", 1: "dog"}
    assert values(found.images(0)) == [10, 30]
    assert values(found.images(1)) == [0]
    assert values(found.images(0, split="test")) == [20]
    assert found.images(1, split="test").shape == (0, 1, 8, 8)


def test_image_folder_classes_named_like_splits(tmp_path):
    folder = image_folder(tmp_path / "a[b]", "train/a.png", "bullet_test/b.png", "car/c.png")
    assert load(folder).class_names == {0: "bullet_test", 1: "car", 2: "train"}


def test_image_folder_of_one_class(tmp_path):
    found = load(image_folder(tmp_path / "one", *(f"cat/{index}.png" for index in range(10))))
    assert found.class_names == {0: "cat"}
    assert (found.count(0), found.count(0, split="test")) == (8, 2)


def test_a_folder_of_images_as_one_class(tmp_path, recwarn):
    folder = image_folder(tmp_path / "my cat[s]", *(f"{index}.png" for index in range(5)))
    for name in (folder, f"{folder}/"):
        found = load(name, one_class=True, hold_out=False)
        assert (found.name, found.class_names) == ("my cat[s]", {0: "my cat[s]"})
        assert (found.count(0), found.count(0, split="test"), len(found.images(0))) == (5, 0, 5)
    assert load(folder, one_class=True).count(0, split="test") == 1
    assert not list(recwarn)


def test_images_beside_class_folders_are_named(tmp_path):
    folder = image_folder(tmp_path / "mixed", "cat/a.png", "b.png")
    with pytest.warns(
        UserWarning, match=r"'mixed': these are outside of the folders of the classes.* left out: 'b.png'"
    ):
        assert load(folder, one_class=True).count(0) == 1


def test_image_folder_with_metadata(tmp_path):
    folder = image_folder(tmp_path / "meta", "a.png", "b.png")
    (tmp_path / "meta" / "metadata.csv").write_text("file_name,label\na.png,z\nb.png,y\n")
    assert load(folder).class_names == {0: "y", 1: "z"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["cat/a.png", "dog/x/b.png"], "mixes folder depths"),
        (["train/cat/images/a.png"], "mixes folder depths"),
        (["a.png"], "one subfolder for each class"),
    ],
)
def test_image_folder_of_an_odd_layout(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        load(image_folder(tmp_path / "odd", *files))


@pytest.mark.parametrize("one_class", [False, True])
def test_a_folder_without_images_names_what_it_has(tmp_path, one_class):
    for name in ("a.txt", "b.txt", "c"):
        (tmp_path / name).write_text("no image")
    found = r"no image and no subfolder, but 2 \(extension .txt\), 1 \(extension none\): expected "
    with pytest.raises(
        FileNotFoundError, match=found + ("images of one class, or one" if one_class else "one subfolder")
    ):
        load_image_data(str(tmp_path), image_size=8, channels=1, one_class=one_class)


def test_the_bar_over_local_files_does_not_say_that_it_downloads_them(tmp_path, capsys):
    """There is one from 16 files on."""
    write_images(tmp_path / "a", 20)
    write_images(tmp_path / "b", 20)
    load(str(tmp_path))
    assert "Finding images: 100%" in (shown := capsys.readouterr().err)
    assert "Downloading" not in shown


def test_single_parquet_file(tmp_path):
    write(tmp_path / "p", cats=table(["b", "a", "b"], datasets.Value("string")))
    found = load(str(tmp_path / "p" / "cats.parquet"))
    assert found.name == "cats"
    assert found.class_names == {0: "a", 1: "b"}
    assert found.count(1) == found.count(1, split="test") == 1


@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "~/missing-folder", "missing.parquet", "a/b/c"])
def test_missing_local_path_never_asks_the_hub(monkeypatch, name):
    monkeypatch.setattr(open_dataset, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(FileNotFoundError, match=r"dataset_name=.*looks like a local path.*--dataset_name"):
        load(name)


@pytest.mark.parametrize(
    ("name", "folder"), [("phtos", "photos"), ("data/phtos", "data/photos"), ("./phtos", "photos"), ("mnist", None)]
)
def test_a_name_that_is_almost_a_folder_s_never_asks_the_hub(name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for other in ("photos", "data/photos", "mnist_runs"):
        (tmp_path / other).mkdir(parents=True)
    asked = []
    monkeypatch.setattr(open_dataset, "load_dataset", lambda **given: asked.append(given["path"]) or 1 / 0)
    text = "'mnist', which is no file" if folder is None else f"nothing here has this name; did you mean '{folder}'"
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(text)):
        load(name)
    assert asked == ([name] if folder is None else [])


def test_hub_id_is_passed_on(monkeypatch):
    calls = []

    def fake(**arguments):
        calls.append(arguments)
        return datasets.DatasetDict(train=table([0, 1], CAT_DOG))

    monkeypatch.setattr(open_dataset, "load_dataset", fake)
    found = load("owner/pets", dataset_config_name="small", revision="abc")
    assert calls == [{"path": "owner/pets", "name": "small", "revision": "abc"}]
    assert found.name == "owner/pets"


@pytest.mark.parametrize("last", [0, 40])
def test_archives_are_read_but_not_their_pickles(last, tmp_path, monkeypatch):
    """As of the Hub, in the first entries that tell the columns and in later ones."""
    entries = {
        f"{row:03}.{kind}": body for row in range(30) for kind, body in (("png", None), ("cls", b"%d" % (row % 2)))
    }
    pickled = io.BytesIO()
    torch.save([1], pickled)
    for name, spoiled in (("sound", False), ("spoiled", True)):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            pickles = {f"{last:03}.pth": pickled.getvalue()} if spoiled else {}
            for entry, body in sorted({**entries, **pickles}.items()):
                body = body or encode(grey(int(entry[:3])))["bytes"]
                header = tarfile.TarInfo(entry)
                header.size = len(body)
                archive.addfile(header, io.BytesIO(body))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("something was unpickled"))

    def open_archive(path, **_):
        return datasets.load_dataset("webdataset", data_files={"train": str(tmp_path / path)})

    monkeypatch.setattr(open_dataset, "load_dataset", open_archive)
    found = load("sound.tar", label_column="cls")
    assert found.count(0) + found.count(0, split="test") == 15
    decoders = WebDataset.DECODERS
    with pytest.raises(ValueError, match=r"'spoiled\.tar'.* could not be loaded.*a \.pth entry, which is a pickle"):
        load("spoiled.tar", label_column="cls")
    assert WebDataset.DECODERS is decoders
    assert "pth" in decoders


def test_unloadable_datasets(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.parquet").write_text("x")
    (tmp_path / "empty" / ".hidden").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no image and no subfolder: expected one"):
        load(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"type '\.txt', expected \.parquet"):
        load(str(tmp_path / "notes.txt"))
    with pytest.raises(ValueError, match=r"dataset_name=.*could not be loaded.*check --dataset_name"):
        load(str(tmp_path / "broken.parquet"))

    def fail(**_):
        raise ConnectionError("Couldn't reach 'nothere' on the Hub")

    monkeypatch.setattr(open_dataset, "load_dataset", fail)
    with pytest.raises(
        OSError, match=r"'nothere', which is no file or folder here, could not .*owner/name: Couldn't reach"
    ):
        load("nothere")


def test_hub_options_on_local_data(tmp_path):
    folder = image_folder(tmp_path / "one", "cat/a.png")
    with pytest.raises(ValueError, match=r"revision='x'.*leave --dataset_revision out"):
        load(folder, revision="x")
    with pytest.raises(ValueError, match=r"dataset_config_name='x'.*leave --dataset_config_name out"):
        load("digits", dataset_config_name="x")


# Columns and labels


def two_columns(tmp_path, **columns):
    features = datasets.Features({name: feature for name, (feature, _) in columns.items()})
    content = {name: content for name, (_, content) in columns.items()}
    return write(tmp_path / "p", train=datasets.Dataset.from_dict(content, features=features))


def test_columns_are_found_or_named(tmp_path):
    folder = two_columns(
        tmp_path,
        photo=(datasets.Image(), [grey(1), grey(2)]),
        mask=(datasets.Image(), [grey(3), grey(4)]),
        fine=(datasets.ClassLabel(names=["a", "b"]), [0, 1]),
        coarse=(datasets.ClassLabel(names=["x"]), [0, 0]),
        score=(datasets.Value("float32"), [0.5, 0.5]),
    )
    with pytest.raises(ValueError, match=r"image_column=None.*\['photo', 'mask'\].*--image_column"):
        load(folder)
    with pytest.raises(ValueError, match=r"label_column=None.*\['fine', 'coarse'\].*--label_column"):
        load(folder, image_column="mask")
    with pytest.raises(ValueError, match=r"image_column='picture' is not a column.*photo.*score"):
        load(folder, image_column="picture")
    with pytest.raises(ValueError, match=r"label_column='kind' is not a column.*photo.*--label_column"):
        load(folder, image_column="mask", label_column="kind")
    with pytest.raises(ValueError, match=r"image_column='fine' is of type.*--image_column"):
        load(folder, image_column="fine")
    with pytest.raises(ValueError, match=r"label_column='score' is of type.*expected ClassLabel"):
        load(folder, image_column="mask", label_column="score")
    found = load(folder, image_column="mask", label_column="coarse")
    assert found.class_names == {0: "x"}
    assert sorted(values(found.images(0)) + values(found.images(0, split="test"))) == [3, 4]


def test_images_as_plain_bytes(tmp_path):
    pictures = [encode(grey(5)), encode(grey(6))]
    folder = two_columns(
        tmp_path,
        raw=(datasets.Value("binary"), [picture["bytes"] for picture in pictures]),
        struct=({"bytes": datasets.Value("binary"), "path": datasets.Value("string")}, pictures),
        label=(datasets.Value("int64"), [0, 1]),
    )
    with pytest.raises(ValueError, match=r"image_column=None finds none among the columns"):
        load(folder)
    for column in ("raw", "struct"):
        found = load(folder, image_column=column)
        assert [values(found.images(class_id)) for class_id in (0, 1)] == [[5], [6]]


def test_class_label_order_and_dropped_classes(tmp_path):
    names = datasets.ClassLabel(names=["zebra", "unseen", "ant"])
    folder = write(tmp_path / "p", train=table([2, 0, 2], names), test=table([1, 2], names, start=100))
    with pytest.warns(UserWarning, match=r"no image in split 'train'.*unseen"):
        found = load(folder)
    assert list(found.class_names.items()) == [(0, "zebra"), (2, "ant")]
    assert values(found.images(2)) == [0, 2]
    assert values(found.images(2, split="test")) == [101]
    assert found.count(0, split="test") == 0


def test_ten_thousand_classes_of_one_image(tmp_path):
    """All are there, none gives its only image to the test, and no class costs more than another."""
    count = 10_000
    shades = [encode(grey(value)) for value in range(256)]
    names = datasets.ClassLabel(names=[f"kind {class_id}" for class_id in range(count + 1)])
    labels = np.random.default_rng(0).permutation(count).tolist()
    folder = write(tmp_path / "p", train=table(labels, names, images=[shades[label % 251] for label in labels]))
    with pytest.warns(UserWarning, match=rf"no image in split 'train' and are left out: kind {count}\."):
        found = load(folder)
    assert found.class_names == {class_id: f"kind {class_id}" for class_id in range(count)}
    assert {found.count(class_id) for class_id in range(count)} == {1}
    assert {found.count(class_id, split="test") for class_id in range(count)} == {0}
    for class_id in (0, 1234, count - 1):
        assert values(found.images(class_id)) == [class_id % 251]
    known = {7 * class_id: f"kind {class_id + 9000}" for class_id in range(2000)}
    ids = assign_class_ids(list(found.class_names.values()), known)
    assert ids[9000] == 0
    assert sorted(ids[:9000]) == list(range(7 * 1999 + 1, 7 * 1999 + 9001))
    beside = found.with_class_ids(ids)
    assert values(beside.images(ids[1234])) == [1234 % 251]
    tasks = split_into_tasks(list(beside.class_names), 3, class_order_seed=1, first_task=list(known))
    assert tasks[0].class_ids == tuple(known)
    assert sorted(class_id for task in tasks[1:] for class_id in task.class_ids) == sorted(ids[:9000])


def test_a_split_of_very_many_classes_ends():
    """It would not for a long time if each class were looked for among all others."""
    tasks = split_into_tasks(range(200_000), 1, first_task=range(100_000, 300_000))
    assert len(tasks) == 1 + 100_000
    assert tasks[-1] == Task(100_000, (99_999,))


def test_integer_labels_keep_their_value(tmp_path):
    folder = write(tmp_path / "p", train=table([7, 3, 7], datasets.Value("int32")))
    found = load(folder)
    assert list(found.class_names.items()) == [(3, "3"), (7, "7")]
    assert values(found.images(3)) == [1]


def test_string_ids_do_not_depend_on_the_test_split(tmp_path):
    text = datasets.Value("string")
    folder = write(tmp_path / "p", train=table(["b", "c"], text), test=table(["a", "c"], text))
    with pytest.warns(UserWarning, match="left out: a"):
        found = load(folder)
    assert found.class_names == {0: "b", 1: "c"}
    assert found.count(1, split="test") == 1


@pytest.mark.parametrize(
    ("feature", "good", "bad"),
    [
        (CAT_DOG, 0, None),
        (CAT_DOG, 0, -1),
        (datasets.Value("int64"), 0, -1),
        (datasets.Value("int64"), 0, None),
        (datasets.Value("string"), "a", None),
    ],
)
def test_unlabelled_rows(tmp_path, feature, good, bad):
    folder = write(tmp_path / "p", train=table([good, good, bad], feature))
    with pytest.raises(ValueError, match=f"label_column='label': row 2 of split 'train' has the label {bad}"):
        load(folder)


def test_unlabelled_test_split_can_be_passed_over(tmp_path):
    folder = write(tmp_path / "p", train=table([0, 1, 0, 1], CAT_DOG), test=table([-1, -1], CAT_DOG))
    with pytest.raises(ValueError, match=r"row 0 of split 'test'.*--test_split train"):
        load(folder)
    found = load(folder, test_split="train")
    assert found.count(0) == found.count(0, split="test") == 1


def test_class_label_beyond_its_names(tmp_path):
    dataset = table([0, 5], datasets.Value("int64"))
    # A file may say more than its metadata does: from_dict would refuse this label.
    dataset.info.features["label"] = CAT_DOG
    with pytest.raises(ValueError, match=r"row 1 of split 'train' has the label 5, expected 0\.\.1"):
        load(write(tmp_path / "p", train=dataset))


# Splits


def test_splits_are_named_or_found(tmp_path):
    folder = write(
        tmp_path / "p",
        train=table([0, 1], CAT_DOG),
        validation=table([0, 1], CAT_DOG, start=100),
        test=table([0, 1], CAT_DOG, start=200),
    )
    assert values(load(folder).images(1, split="test")) == [201]
    assert values(load(folder, test_split="validation").images(1, split="test")) == [101]
    assert values(load(folder, train_split="test").images(1, split="test")) == [101]
    with pytest.raises(ValueError, match=r"train_split='training' is not a split.*train.*test.*--train_split"):
        load(folder, train_split="training")
    with pytest.raises(ValueError, match=r"test_split='dev' is not a split.*--test_split"):
        load(folder, test_split="dev")


def test_empty_training_split(monkeypatch):
    splits = datasets.DatasetDict(train=table([0], CAT_DOG).select([]), test=table([0], CAT_DOG))
    monkeypatch.setattr(open_dataset, "load_dataset", lambda **_: splits)
    with pytest.raises(ValueError, match=r"train_split='train' of dataset 'owner/name' has no rows.*--train_split"):
        load("owner/name")


@settings(deadline=None, max_examples=30)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    test_fraction=st.floats(0.01, 0.99),
    validation_fraction=st.none() | st.floats(0.01, 0.99),
)
def test_hold_outs_are_stratified_disjoint_and_repeatable(counts, test_fraction, validation_fraction):
    labels = [class_id for class_id, count in enumerate(counts) for _ in range(count)]
    names = datasets.ClassLabel(names=[str(class_id) for class_id in range(len(counts))])
    splits = datasets.DatasetDict(train=table(labels, names))

    def parts(**options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(open_dataset, "load_dataset", lambda **_: splits)
            found = load("owner/name", test_fraction=test_fraction, **options)
            return [[values(found.images(c, split=s)) for c in found.class_names] for s in ("train", "test")]

    train, test = parts()
    assert parts() == [train, test]
    for class_id, count in enumerate(counts):
        rows = [row for row, label in enumerate(labels) if label == class_id]
        assert sorted(train[class_id] + test[class_id]) == rows
        assert train[class_id] == sorted(train[class_id])
        expected = np.clip(round(test_fraction * count), 1, count - 1) if count > 1 else 0
        assert len(test[class_id]) == expected
    if validation_fraction is not None:
        chosen, validation = parts(validation_fraction=validation_fraction)
        for class_id in range(len(counts)):
            assert sorted(chosen[class_id] + validation[class_id]) == train[class_id]
            assert not set(validation[class_id]) & set(test[class_id])


def test_hold_out_reaches_beyond_the_first_rows(tmp_path):
    # A shuffle, not the first or last rows: datasets are often ordered within a class.
    found = load(write(tmp_path / "p", train=table([0] * 100, datasets.Value("int64"))), test_fraction=0.3)
    held = values(found.images(0, split="test"))
    assert len(held) == 30
    assert min(held) < 30
    assert max(held) > 70


@pytest.mark.parametrize(
    ("options", "unused"),
    [
        ({}, r"'validation' \(2 rows\)\."),
        ({"test_split": "validation"}, r"'test' \(3 rows\)\."),
        ({"test_split": "train"}, r"'validation' \(2 rows\), 'test' \(3 rows\)\."),
        ({"hold_out": False}, r"'validation' \(2 rows\), 'test' \(3 rows\)\."),
        ({"validation_fraction": 0.5}, r"'validation' \(2 rows\)\."),
    ],
    ids=str,
)
def test_splits_that_are_not_used_are_named_with_their_counts(options, unused, tmp_path):
    rows = {"train": [0, 1, 0, 1], "validation": [0, 1], "test": [0, 1, 0]}
    for name, labels in rows.items():
        write(tmp_path / "p", **{name: table(labels, CAT_DOG)})
    with pytest.warns(UserWarning, match=f"dataset 'p': these splits are not used: {unused}") as caught:
        load(str(tmp_path / "p"), **options)
    assert len(caught) == 1


def test_files_that_are_in_no_split_are_named(tmp_path):
    """`datasets` reads all files as one split, or only those that are named like one."""
    write(tmp_path / "p", a=table([0, 1], CAT_DOG), b=table([0, 1], CAT_DOG))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(str(tmp_path / "p"), hold_out=False).count(0) == 2
    write(tmp_path / "p", train=table([0, 1], CAT_DOG))
    with pytest.warns(UserWarning, match=r"dataset 'p': 2 of 3 files are in no split.*: a.parquet, b.parquet\."):
        assert load(str(tmp_path / "p"), hold_out=False).count(0) == 1


def test_validation_fraction_leaves_the_test_split_unread(tmp_path):
    # The test split has no labels: reading it would raise.
    folder = write(tmp_path / "p", train=table([0] * 10, CAT_DOG), test=table([-1] * 5, CAT_DOG, start=200))
    with pytest.warns(UserWarning, match="left out: cat"):
        found = load(folder, validation_fraction=0.3)
    train, validation = values(found.images(0)), values(found.images(0, split="test"))
    assert len(validation) == 3
    assert sorted(train + validation) == list(range(10))


def test_max_images_per_class_keeps_the_first(tmp_path):
    folder = write(tmp_path / "p", train=table([0, 1] * 5, CAT_DOG), test=table([1, 0] * 5, CAT_DOG, start=100))
    found = load(folder, max_images_per_class=2)
    assert values(found.images(0)) == [0, 2]
    assert values(found.images(0, split="test")) == [101, 103]
    assert found.count(1) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 4}, r"channels=4 must be 1 \(grey\) or 3 \(RGB\)"),
        ({"image_size": True}, "image_size=True must be a whole number"),
        ({"image_size": 0}, "image_size=0 must be a whole number.*--image_size"),
        ({"max_images_per_class": 0}, "max_images_per_class=0.*--max_images_per_class"),
        ({"test_fraction": 1.0}, "test_fraction=1.0 must be between 0 and 1.*--test_fraction"),
        ({"validation_fraction": 0}, "validation_fraction=0 must be between 0 and 1.*--validation_fraction"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        load("digits", **options)


# Images


def one_class(tmp_path, *images):
    """The images as class 0, all in the training split."""
    test = table([0], CAT_DOG)
    return write(tmp_path / "p", train=table([0] * len(images) + [1], CAT_DOG, images=[*images, grey(0)]), test=test)


@pytest.mark.parametrize("size", [(8, 8), (20, 10), (10, 30), (5, 7), (33, 16)])
def test_resize_of_the_shorter_side_and_centre_crop(tmp_path, size):
    width, height = size
    # Brightness rises along the longer side only, so a crop off the centre shows.
    ramp = np.tile(np.linspace(0, 255, max(size)), (min(size), 1))
    ramp = Image.fromarray(np.round(ramp if width >= height else ramp.T).astype(np.uint8))
    image = load(one_class(tmp_path, ramp)).images(0)[0, 0].numpy()
    scale = 8 / min(size)
    resized = ramp.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 8) / 2, (resized.height - 8) / 2
    expected = resized.transform(
        (8, 8), Image.Transform.AFFINE, (1, 0, left, 0, 1, top), resample=Image.Resampling.BILINEAR
    )
    # Equal up to the rounding of the resized length.
    assert np.abs(image.astype(int) - np.asarray(expected).astype(int)).max() <= (0 if size == (8, 8) else 8)


def test_image_that_fits_is_unchanged(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = load(one_class(tmp_path, Image.fromarray(noise)), channels=3).images(0)[0]
    assert np.array_equal(image.permute(1, 2, 0).numpy(), noise)


def test_grey_to_rgb_warns_once_per_dataset(tmp_path):
    found = load(one_class(tmp_path, grey(7), grey(8)), channels=3)
    with pytest.warns(UserWarning, match=r"dataset 'p' holds grey images.*RGB") as caught:
        images = found.images(0)
    assert len(caught) == 1
    assert images.unique().tolist() == [7, 8]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.images(1)
        found.with_class_ids([5, 6]).images(5)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP", "MPO"])
def test_images_of_which_frames_are_left_out_are_counted(kind, tmp_path):
    for index, several in enumerate([True, False, True]):
        more = {"save_all": True, "append_images": [grey(200), grey(90)]} if several else {}
        (tmp_path / "a").mkdir(exist_ok=True)
        name = f"{index}.{'jpg' if kind == 'MPO' else kind.lower()}"
        grey(20).save(tmp_path / "a" / name, "JPEG" if kind == "MPO" and not several else kind, **more)
    (tmp_path / "b").mkdir()
    grey(20).save(tmp_path / "b" / "0.png")
    found = load(str(tmp_path), hold_out=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images = [found.images(class_id) for class_id in (0, 1, 0)]
    assert abs(images[0].float() - 20).max() < 4  # the first frame
    texts = [str(one.message) for one in caught if "several frames" in str(one.message)]
    # What a phone puts into an MPO beside its photo is none of the data.
    assert len(texts) == (kind != "MPO")
    assert all("split 'train': 2 of 3 images of class 'a' have several frames" in text for text in texts)


def test_colour_to_grey_uses_luma_and_warns(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    with pytest.warns(UserWarning, match=r"holds colour images.*grey"):
        image = load(one_class(tmp_path, noise)).images(0)[0, 0].numpy()
    luma = np.asarray(noise) @ [0.299, 0.587, 0.114]
    assert np.abs(image - luma).max() <= 0.51


def test_matching_images_do_not_warn(tmp_path):
    found = load(one_class(tmp_path, grey(7)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.images(0)


def test_sixteen_bits_are_scaled(tmp_path):
    wide = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    pictures = [
        encode(Image.fromarray(wide), "PNG"),
        encode(Image.fromarray(wide.astype(np.int32)), "TIFF"),
        encode(Image.fromarray((wide / 65535).astype(np.float32)), "TIFF"),
    ]
    images = load(one_class(tmp_path, *pictures)).images(0)[:, 0].numpy()
    for image in images:
        assert np.array_equal(image, np.round(wide / 257).astype(np.uint8))


def test_values_without_a_known_scale(tmp_path):
    wild = encode(Image.fromarray(np.full((8, 8), 300, dtype=np.float32)), "TIFF")
    with pytest.raises(ValueError, match=r"row 0.*300\.0\.\.300\.0.*mode 'F' must hold 0\.\.1"):
        load(one_class(tmp_path, wild)).images(0)


def test_transparency_is_composited_on_white(tmp_path):
    clear = np.zeros((8, 8, 4), dtype=np.uint8)
    clear[:, 4:] = (200, 100, 0, 255)
    clear[0, 4] = (200, 100, 0, 128)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    pictures = [
        encode(Image.fromarray(clear)),
        encode(Image.fromarray(clear).convert("LA")),
        encode(palette, transparency=0),
    ]
    with pytest.warns(UserWarning, match="holds grey images"):  # the LA image
        images = load(one_class(tmp_path, *pictures), channels=3).images(0).permute(0, 2, 3, 1).numpy()
    alpha = clear[..., 3:] / 255
    expected = clear[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(images[0] - expected).max() <= 1
    assert (images[1, :, :4] == 255).all()
    assert (images[1, 1:, 4:] == round(200 * 0.299 + 100 * 0.587)).all()
    assert (images[2] == 255).all()


def test_palette_and_bilevel(tmp_path):
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 10, 20, 30])
    images = load(one_class(tmp_path, encode(palette)), channels=3).images(0)
    assert (images[0] == torch.tensor([10, 20, 30])[:, None, None]).all()
    bilevel = Image.fromarray(np.eye(8, dtype=np.uint8) * 255).convert("1")
    assert np.array_equal(load(one_class(tmp_path, encode(bilevel))).images(0)[0, 0].numpy(), np.eye(8) * 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = encode(noise, exif=exif)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(picture["bytes"])))
    image = load(one_class(tmp_path, picture)).images(0)[0, 0].numpy()
    assert np.array_equal(image, np.asarray(turned))
    assert np.array_equal(image, np.asarray(noise)) == (orientation == 1)


@pytest.mark.parametrize("bad", [{"bytes": b"no image", "path": None}, None])
def test_broken_image_names_its_row(tmp_path, bad):
    found = load(one_class(tmp_path, grey(0), bad))
    assert found.count(0) == 2
    found.images(1)  # other classes are not decoded, so they still load
    with pytest.raises(ValueError, match=r"split 'train', row 1:.*'image' cannot be read.*remove this (?:row|file)"):
        found.images(0)


def test_truncated_image_file(tmp_path):
    folder = image_folder(tmp_path / "pets", "cat/a.png", "dog/b.png")
    found = load(folder)
    file = tmp_path / "pets" / "cat" / "a.png"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=rf"row 0.*, file '{re.escape(str(file))}', cannot be read"):
        found.images(0)


def test_one_class_without_the_folder_above_it_is_told_of_that(tmp_path, monkeypatch):
    image_folder(tmp_path / "pets", "cat/a.png", "dog/b.png")
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^dataset_name='pets/cat': give the folder above it, 'pets', if that has"):
        load("pets/cat")


def test_unknown_class_or_split(tmp_path):
    found = load(one_class(tmp_path, grey(0)))
    with pytest.raises(ValueError, match=r"class_id=9 is not a class.*\[0, 1\]"):
        found.images(9)
    with pytest.raises(ValueError, match=r"split='val' is unknown.*\['test', 'train'\]"):
        found.count(0, split="val")


# Tasks and ids


@given(
    class_ids=st.lists(st.integers(0, 99), unique=True, min_size=2, max_size=20),
    first_task=st.lists(st.integers(0, 99), unique=True, max_size=6),
    classes_per_task=st.integers(1, 25),
    seed=st.none() | st.integers(0, 5),
)
def test_tasks_partition_the_classes(class_ids, first_task, classes_per_task, seed):
    def split():
        return split_into_tasks(class_ids, classes_per_task, class_order_seed=seed, first_task=first_task)

    tasks = split()
    assert tasks == split()
    assert [task.index for task in tasks] == list(range(len(tasks)))
    chunks = [task.class_ids for task in tasks]
    if first_task:
        assert chunks.pop(0) == tuple(first_task)
    rest = [class_id for class_id in class_ids if class_id not in first_task]
    flat = [class_id for chunk in chunks for class_id in chunk]
    assert sorted(flat) == sorted(rest)
    if seed is None:
        assert flat == rest
    assert all(len(chunk) == classes_per_task for chunk in chunks[:-1])
    assert all(0 < len(chunk) <= classes_per_task for chunk in chunks)


def test_tasks_of_ten_classes():
    assert split_into_tasks(range(5), 2) == [Task(0, (0, 1)), Task(1, (2, 3)), Task(2, (4,))]
    orders = {split_into_tasks(range(10), 10, class_order_seed=seed)[0].class_ids for seed in range(5)}
    assert len(orders) == 5
    assert split_into_tasks([3], 1, first_task=[0]) == [Task(0, (0,)), Task(1, (3,))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1], 0), "classes_per_task=0 must be at least 1.*--classes_per_task"),
        (([0, 1, 0], 1), r"class_ids=\[0, 1, 0\] holds \[0\] more than once"),
        (([4], 1), "at least two classes.*--label_column.*--base_model"),
        (([], 1), "at least two classes"),
    ],
)
def test_task_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        split_into_tasks(*arguments)


def test_first_task_errors():
    with pytest.raises(ValueError, match=r"first_task.*more than once"):
        split_into_tasks([0, 1], 1, first_task=[2, 2])
    with pytest.raises(ValueError, match="at least two classes"):
        split_into_tasks([2], 1, first_task=[2])


@given(
    names=st.lists(st.text("abcdef", max_size=2), unique=True),
    known=st.dictionaries(st.integers(0, 50), st.text("abcdef", max_size=2)),
)
def test_assigned_ids(names, known):
    known = {class_id: name for name, class_id in {name: class_id for class_id, name in known.items()}.items()}
    ids = assign_class_ids(names, known)
    by_name = {name: class_id for class_id, name in known.items()}
    assert all(class_id == by_name[name] for name, class_id in zip(names, ids, strict=True) if name in by_name)
    free = [class_id for name, class_id in zip(names, ids, strict=True) if name not in by_name]
    first = max(known) + 1 if known else 0
    assert free == list(range(first, first + len(free)))


def test_assign_class_ids_errors():
    with pytest.raises(ValueError, match=r"names=.*more than once"):
        assign_class_ids(["a", "a"], {})
    with pytest.raises(ValueError, match=r"known=.*more than once"):
        assign_class_ids(["b"], {0: "a", 1: "a"})


def test_with_class_ids(tmp_path):
    found = load(one_class(tmp_path, grey(7), grey(8)))
    renamed = found.with_class_ids([1, 0])
    assert list(renamed.class_names.items()) == [(1, "dog"), (0, "cat")]
    assert torch.equal(renamed.images(1), found.images(0))
    assert torch.equal(renamed.images(1, split="test"), found.images(0, split="test"))
    assert list(found.class_names.items()) == [(0, "dog"), (1, "cat")]
    with pytest.raises(ValueError, match=r"ids=.*has 1 entries, expected 2"):
        found.with_class_ids([4])
    with pytest.raises(ValueError, match=r"ids=.*more than once"):
        found.with_class_ids([4, 4])


# What is left out is named; rows name no files outside


def write_images(folder, count=3, suffix=".png"):
    folder.mkdir(parents=True)
    for index in range(count):
        grey(index).save(folder / f"{index}.png")
        (folder / f"{index}.png").rename(folder / f"{index}{suffix}")


def counts(folder):
    found = load_image_data(str(folder), image_size=8, channels=1)
    return {name: found.count(i) + found.count(i, split="test") for i, name in found.class_names.items()}


@pytest.mark.parametrize("splits", [("",), ("train", "test")])
def test_linked_class_folders_are_read(splits, tmp_path):
    for split in splits:
        write_images(tmp_path / "store" / split / "b")
        write_images(tmp_path / "images" / split / "a")
        (tmp_path / "images" / split / "linked").symlink_to(tmp_path / "store" / split / "b")
        write_images(tmp_path / "images" / split / "c [x]")
    each = 3 * len(splits)
    assert counts(tmp_path / "images") == {"a": each, "c [x]": each, "linked": each}
    (tmp_path / "images" / splits[0] / "linked").rename(tmp_path / "images" / splits[0] / "linked [x]")
    with pytest.raises(ValueError, match=r"linked folder .*linked \[x\]'"):
        counts(tmp_path / "images")


def test_linked_images_are_read(tmp_path):
    for name in "ab":
        write_images(tmp_path / "store" / name)
        (tmp_path / "images" / name).mkdir(parents=True)
        for file in (tmp_path / "store" / name).iterdir():
            (tmp_path / "images" / name / file.name).symlink_to(file)
    with pytest.warns(UserWarning, match=r"6 links lead out of the folder and are followed, such as 'a/\d.png' to"):
        assert counts(tmp_path / "images") == {"a": 3, "b": 3}


def test_links_inside_the_folder_are_nothing_to_tell(tmp_path):
    for name in "ab":
        write_images(tmp_path / "images" / name)
    (tmp_path / "images" / "b" / "again.png").symlink_to("0.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert counts(tmp_path / "images") == {"a": 3, "b": 4}


@pytest.mark.parametrize("suffix", [".heic", ".HEIC", ".raw", ""])
def test_files_without_the_extension_of_an_image_are_counted_and_named(suffix, tmp_path):
    write_images(tmp_path / "images" / "a")
    write_images(tmp_path / "images" / "b")
    write_images(tmp_path / "images" / "only others", suffix=suffix)
    (tmp_path / "images" / "b" / f"more{suffix}").write_bytes(b"x")
    (tmp_path / "images" / "b" / ".hidden").write_bytes(b"x")
    with pytest.warns(UserWarning, match="left out") as caught:
        assert counts(tmp_path / "images") == {"a": 3, "b": 3}
    said = next(str(one.message) for one in caught if "extension" in str(one.message))
    assert f"3 in 'only others' (extension {suffix or 'none'})" in said
    assert f"1 in 'b' (extension {suffix or 'none'})" in said


@pytest.mark.parametrize(("place", "said"), [(".", "outside of the folders"), ("a", "extension .zip")])
def test_archives_among_folders_of_classes_are_named_and_not_read(place, said, tmp_path):
    for name in ("images/a", "images/b", "store/c"):
        write_images(tmp_path / name)
    shutil.make_archive(str(tmp_path / "images" / place / "more"), "zip", tmp_path / "store")
    with pytest.warns(UserWarning, match=said):
        assert counts(tmp_path / "images") == {"a": 3, "b": 3}


def test_images_that_the_metadata_does_not_list_are_named(tmp_path):
    write_images(tmp_path / "images")
    (tmp_path / "images" / "metadata.csv").write_text("file_name,label\n0.png,a\n1.png,b\n")
    with pytest.warns(UserWarning, match="1 images are not in the metadata file and are left out: 2.png"):
        assert counts(tmp_path / "images") == {"a": 1, "b": 1}


@pytest.mark.parametrize("place", [".", "a"])
def test_parquet_files_among_images_are_named(place, tmp_path):
    write_images(tmp_path / "images" / "a")
    write_images(tmp_path / "images" / "b")
    pq.write_table(table([0, 1], datasets.Value("int64")).data.table, tmp_path / "images" / place / "x.parquet")
    with pytest.warns(UserWarning, match="in no split and are left out, .*x.parquet"):
        assert counts(tmp_path / "images") == {"a": 3, "b": 3}


def parquet_that_names(path, folder):
    """A parquet file of four rows, of which one has no bytes but the path of a file."""
    folder.mkdir(exist_ok=True)
    rows = table([0, 0, 1, 1], datasets.Value("int64")).cast_column("image", datasets.Image(decode=False))
    images = [*[*rows["image"]][:3], {"bytes": None, "path": str(path)}]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    made = datasets.Dataset.from_dict({"image": images, "label": rows["label"]}, features=features)
    pq.write_table(made.data.table, folder / "x.parquet")
    return folder / "x.parquet"


@pytest.mark.parametrize("place", ["outside.png", "data/../outside.png", "data/link/../../outside.png"])
@pytest.mark.parametrize("whole_folder", [True, False])
def test_a_row_names_no_file_outside_of_the_data(place, whole_folder, tmp_path, monkeypatch):
    grey(200).save(tmp_path / "outside.png")
    (tmp_path / "data" / "link").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / place, place):
        file = parquet_that_names(path, tmp_path / "data")
        found = load_image_data(str(file.parent if whole_folder else file), image_size=8, channels=1)
        with pytest.raises(ValueError, match="is outside of the dataset"):
            [found.images(1, split=split) for split in ("train", "test")]


def test_a_row_names_a_file_beside_it(tmp_path):
    (tmp_path / "data" / "images").mkdir(parents=True)
    grey(200).save(tmp_path / "data" / "images" / "x.png")
    file = parquet_that_names(tmp_path / "data" / "images" / "x.png", tmp_path / "data")
    found = load_image_data(str(file), image_size=8, channels=1)
    assert 200 in torch.cat([found.images(1, split=split) for split in ("train", "test")])


def test_digests_know_classes_by_name_and_content(tmp_path):
    for name in "abc":
        write_images(tmp_path / "images" / name, count=5)

    def digests():
        return load_image_data(str(tmp_path / "images"), image_size=8, channels=1).digests()

    before = digests()
    assert list(before) == ["class 0", "class 1", "class 2"]
    (tmp_path / "images").rename(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "images")
    os.utime(tmp_path / "images" / "a" / "0.png", (0, 0))
    assert digests() == before
    grey(99).save(tmp_path / "images" / "b" / "2.png")
    changed = digests()
    assert [key for key in before if changed[key] != before[key]] == ["class 1"]
    (tmp_path / "images" / "c" / "4.png").unlink()
    assert digests()["class 2"] != before["class 2"]
    (tmp_path / "images" / "a").rename(tmp_path / "images" / "z")
    assert digests()["class 0"] == changed["class 1"]


LEFT_OUT = {
    "an image beside the folders": ("root.png", "are outside of the folders of the classes.*'root.png'"),
    "a folder with a name that datasets skips": ("__background/0.png", "begin with '__'.*'__background'"),
    "a class of hidden images": ("c/.0.png", "these folders have no image.*'c'"),
}


@pytest.mark.parametrize(("place", "text"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_datasets_skips_is_named(place, text, tmp_path):
    for name in "ab":
        write_images(tmp_path / "images" / name)
    (tmp_path / "images" / place).parent.mkdir(exist_ok=True)
    grey(0).save(tmp_path / "images" / place)
    with pytest.warns(UserWarning, match=text):
        assert counts(tmp_path / "images") == {"a": 3, "b": 3}


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}"), "more than once"),
        (("a", " "), "has an empty label"),
    ],
)
def test_names_that_cannot_be_told_apart_are_refused(names, text, tmp_path):
    for name in names:
        write_images(tmp_path / "images" / name)
    with pytest.raises(ValueError, match=text):
        counts(tmp_path / "images")
