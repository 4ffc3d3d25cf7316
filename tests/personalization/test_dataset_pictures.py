"""Pictures of concepts in data sets: the same concept as from a folder, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from concept_strategies import write_pictures
from datasets import ClassLabel, Dataset, Features, Image, Value, config

from funlora_hf.personalization.concepts import load_concepts
from funlora_hf.personalization.pictures import load_images


PROMPT = "a photo of a <v> dog"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "dog", 3, seed=0)


@pytest.fixture
def parquet(tmp_path, pictures):
    """Three pictures of one class, with captions, of which one is empty."""
    rows = {
        "image": [{"bytes": one.read_bytes(), "path": None} for one in pictures],
        "text": ["a dog asleep", "", "a <v> dog"],
        "label": [0, 0, 0],
    }
    features = Features({"image": Image(), "text": Value("string"), "label": ClassLabel(names=["dog"])})
    path = tmp_path / "data" / "dog6.parquet"
    path.parent.mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


def load(folder: Path, **entry: object):
    (folder / "concepts.json").write_text(json.dumps([{"instance_prompt": PROMPT, **entry}]))
    (concept,) = load_concepts(folder / "concepts.json")
    return concept


def assert_equal_pictures(concept, paths):
    assert torch.equal(load_images(concept.images, size=8), load_images(paths, size=8))
    assert concept.references == concept.images


def test_a_file(parquet, pictures, tmp_path):
    (concept,) = load_concepts(parquet, instance_prompt=PROMPT)
    assert (concept.name, concept.token, concept.noun) == ("dog6", "<v>", "dog")
    assert {concept.caption(one) for one in concept.images} == {PROMPT}
    assert_equal_pictures(concept, pictures)
    again = load(tmp_path, dataset_name="data/dog6.parquet", caption_column="text", name="rex")
    assert again.images == concept.images
    assert [again.caption(one) for one in again.images] == ["a <v> dog asleep", PROMPT, "a <v> dog"]
    assert again.name == "rex"


def test_a_folder_with_captions(pictures, tmp_path):
    lines = [{"file_name": one.name, "caption": f"a dog, {one.stem}"} for one in pictures]
    (tmp_path / "dog/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    concept = load(tmp_path, dataset_name="dog", caption_column="caption")
    assert [concept.caption(one) for one in concept.images] == ["a <v> dog, 0", "a <v> dog, 1", "a <v> dog, 2"]
    assert_equal_pictures(concept, pictures)


def test_a_folder_of_pictures_of_one_concept(pictures, tmp_path):
    (concept,) = load_concepts(tmp_path / "dog")
    assert (concept.name, concept.token, concept.noun, concept.images) == ("dog", "<dog>", "dog", pictures)
    (concept,) = load_concepts(tmp_path / "dog", instance_prompt="a <new> puppy")
    assert (concept.name, concept.token, concept.noun, concept.images) == ("dog", "<new>", "puppy", pictures)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"dataset_name": "data/dog6.parquet", "instance_data_dir": "dog"},
            "expected one of `dataset_name` and `instance",
        ),
        ({}, "has no 'instance_data_dir': add it, or dataset_name"),
        ({"dataset_name": "data/dog6.parquet", "captions": "txt"}, "`captions` is 'txt', expected a `caption_column`"),
        ({"instance_data_dir": "dog", "train_split": "x"}, "`train_split` is 'x', expected a `dataset_name`"),
        ({"dataset_name": "data/dog7.parquet"}, "dog7.parquet"),
        ({"dataset_name": "data/dog6.parquet", "train_split": "test"}, "`train_split` is 'test', expected a split"),
        ({"dataset_name": "data/dog6.parquet", "image_column": "picture"}, "image_column='picture' is not a column"),
        ({"dataset_name": "data/dog6.parquet", "image_column": "label"}, "image_column='label' is of type"),
        ({"dataset_name": "data/dog6.parquet", "caption_column": "label"}, "caption_column='label' is of type"),
        ({"dataset_name": "data/dog6.parquet", "dataset_revision": "main"}, "revision='main' is only for datasets on"),
    ],
)
def test_refused_by_name(entry, message, parquet, tmp_path, cache):
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, **entry)
    assert "concepts.json', entry 1" in str(error.value)
    assert not (cache / "funlora_concepts").exists()


def test_prompts_are_needed_and_belong_to_one_concept(parquet, tmp_path):
    with pytest.raises(ValueError, match=r"dog6\.parquet', a data set: also give `instance_prompt`"):
        load_concepts(parquet)
    with pytest.raises(FileNotFoundError, match="on the Hub: owner/name, and `instance_prompt`"):
        load_concepts("user/dog")
    write_pictures(tmp_path / "more/a", 1, seed=1)
    write_pictures(tmp_path / "more/b", 1, seed=2)
    with pytest.raises(ValueError, match="is neither one folder of pictures nor a data set"):
        load_concepts(tmp_path / "more", instance_prompt=PROMPT)


def test_rows_that_do_not_fit(pictures, tmp_path):
    image = {"bytes": pictures[0].read_bytes(), "path": None}
    outside = {"bytes": None, "path": str(pictures[0])}
    (tmp_path / "data").mkdir()
    for name, rows, message in (
        ("gap", [image, None], "row 1 of the data set 'gap' has no picture"),
        ("outside", [outside], "row 0 of the data set 'outside' has no picture: .* outside of the dataset"),
        ("many", [image] * 1001, "has 1001 rows, expected 1 to 1000"),
    ):
        features = Features({"image": {"bytes": Value("binary"), "path": Value("string")}})
        file = tmp_path / "data" / f"{name}.parquet"
        Dataset.from_dict({"image": rows}, features=features).to_parquet(file)
        with pytest.raises(ValueError, match=message):
            load(tmp_path, dataset_name=f"data/{name}.parquet", image_column="image")


def test_classes_are_not_told_apart(pictures, tmp_path):
    rows = {"image": [{"bytes": one.read_bytes(), "path": None} for one in pictures], "kind": [0, 1, 1]}
    features = Features({"image": Image(), "kind": ClassLabel(names=["a", "b"])})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "two.parquet")
    with pytest.warns(UserWarning, match="the classes in its column 'kind' are not read"):
        load_concepts(tmp_path / "two.parquet", instance_prompt=PROMPT)
