"""Concepts are read as they are meant, or refused with file, concept and value before anything is written."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from concept_runs import PHOTOS, needs_photos
from hostile import JSON, bounded, examples, guarded
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from text_to_image import make_pipeline

from funlora_hf.personalization.concepts import DREAMBOOTH_PROMPTS, Concept, _Entry, check_concepts, load_concepts
from funlora_hf.personalization.pictures import load_images


CAT = {"instance_prompt": "photo of a <new1> cat", "instance_data_dir": "cat"}
DOG = {"instance_prompt": "photo of a <new2> dog", "instance_data_dir": "dog"}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for file in ("b.png", "a.png"):
            Image.new("RGB", (6, 4), "red").save(tmp_path / name / file)
    return tmp_path


def load(folder: Path, *entries: object) -> list[Concept]:
    (folder / "concepts.json").write_text(json.dumps(list(entries)))
    return load_concepts(folder / "concepts.json")


def tokenizer(limit: int = 200):
    """Of single letters."""
    found = make_pipeline("SD").tokenizer
    found.model_max_length = limit
    return found


@pytest.mark.parametrize("given", [["a cat", "two dogs"], "prompts.txt"])
def test_several_prompts_of_a_class(folder, given):
    (folder / "prompts.txt").write_text("a cat\n\n two dogs \n")
    (cat,) = load(folder, {**CAT, "class_prompt": given})
    assert cat.class_prompts == ("a cat", "two dogs")
    assert (cat.class_caption, cat.noun) == ("photo of a cat", "cat")
    assert {"a cat", "two dogs", "photo of a cat"} < {*cat.texts()}


def test_custom_diffusions_keys_and_defaults(folder):
    (folder / "real_reg").mkdir()
    cat, dog = load(folder, {**CAT, "class_prompt": "cat", "class_data_dir": "./real_reg/cat"}, DOG)
    assert cat == Concept(
        name="cat",
        token="<new1>",
        noun="cat",
        initializer="cat",
        instance_prompt="photo of a <new1> cat",
        class_prompts=("cat",),
        images=(folder / "cat/a.png", folder / "cat/b.png"),
        class_data_dir=folder / "real_reg/cat",
        eval_prompts=DREAMBOOTH_PROMPTS["live"],
        references=(folder / "cat/a.png", folder / "cat/b.png"),
    )
    assert (cat.class_caption, dog.class_caption) == ("cat", "photo of a dog")
    assert [one.name for one in load_concepts(folder)] == ["cat", "dog"]


def test_paths_start_at_the_file_or_at_the_working_directory(folder, monkeypatch):
    (folder / "assets").mkdir()
    shutil.copytree(folder / "dog", folder / "assets/dog")
    monkeypatch.chdir(folder)
    cat, dog = load(folder / "assets", {**CAT, "class_data_dir": "x"}, {**DOG, "class_data_dir": "y"})
    assert [cat.images[0].parent, cat.class_data_dir] == [folder / "cat", folder / "x"]
    assert [dog.images[0].parent, dog.class_data_dir] == [folder / "assets/dog", folder / "assets/y"]


@pytest.mark.parametrize(
    ("given", "noun"),
    [
        ({"instance_prompt": "a <n> stuffed animal", "class_prompt": "a photo of a Stuffed Animal"}, "stuffed animal"),
        ({"instance_prompt": "a <n> cat in the snow", "class_prompt": "cat"}, "cat"),
        ({"instance_prompt": "a <n> teddy-bear, seen from above"}, "teddy-bear"),
        ({"instance_prompt": "a <n> stuffed animal"}, "stuffed"),
        ({"instance_prompt": "in the style of <n>", "noun": "painting"}, "painting"),
    ],
)
def test_the_noun_follows_the_token(folder, given, noun):
    (found,) = load(folder, {**CAT, **given})
    assert (found.token, found.noun, found.initializer) == ("<n>", noun, noun)


def test_prompts():
    cat = Concept("cat", "<new1>", "cat", "cat", "photo of a <new1> cat", (), (Path("a.png"),))
    assert cat.prompt("a {} in snow, <TOK>") == "a <new1> cat in snow, <new1> cat"
    assert cat.plain("a <new1> cat on a catalogue") == "a cat on a catalogue"
    assert cat.plain("a <new1> Cat") == "a cat"
    assert cat.plain("<new1> catalogue, <new1>") == "cat catalogue, cat"
    digits = Concept("cat", "new1", "cat", "cat", "new1 cat", (), (Path("a.png"),))
    assert digits.plain("a new10 cat and a new1 cat") == "a new10 cat and a cat"


def test_dreambooths_templates():
    """As the prompts of its data set; `{0} {1}` there are token and noun."""
    for kind, last in (("object", "a {} on top of a white rug"), ("live", "a {} in a purple wizard outfit")):
        prompts = DREAMBOOTH_PROMPTS[kind]
        assert len({*prompts}) == len(prompts) == 25
        assert all(one.startswith("a ") and one.count("{}") == 1 for one in prompts)
        assert [prompts[0], prompts[9], prompts[19], prompts[24]] == [
            *("a {} in the jungle", "a {} on top of a purple rug in a forest", last, "a cube shaped {}"),
        ]
    assert len({*DREAMBOOTH_PROMPTS["live"]} & {*DREAMBOOTH_PROMPTS["object"]}) == 15


def test_captions(folder, caplog):
    caplog.set_level(logging.INFO)
    (folder / "cat/a.txt").write_text("A Cat reads a catalogue.\n")
    (cat,) = load(folder, {**CAT, "captions": "txt"})
    assert [cat.caption(one) for one in cat.images] == ["A <new1> Cat reads a catalogue.", "photo of a <new1> cat"]
    assert "(cat): 1 of 2 pictures have no caption; theirs is `instance_prompt`" in caplog.text
    (folder / "cat/a.txt").unlink()
    texts = {"a.png": "<new1> asleep", "b.png": "a cat"}
    for place in (folder, folder / "cat"):
        (place / "captions.json").write_text(json.dumps(texts))
    (cat,) = load(folder, {**CAT, "captions": "captions.json"})
    assert cat.captions == {"a.png": "<new1> asleep", "b.png": "a <new1> cat"}


def test_evaluation_prompts_and_references(folder):
    (folder / "prompts.txt").write_text("a <TOK> in snow\n\n {} {brace}\n")
    cat, dog = load(
        folder,
        {**CAT, "eval_prompts": "prompts.txt", "reference_dir": "dog"},
        {**DOG, "eval_prompts": ["a {}"], "class_prompt": "a dog", "initializer": "puppy", "name": "rex"},
    )
    assert cat.eval_prompts == ("a {} in snow", "{} {brace}")
    assert cat.prompt(cat.eval_prompts[1]) == "<new1> cat {brace}"
    assert cat.references == dog.images
    assert (dog.eval_prompts, dog.initializer, dog.name) == (("a {}",), "puppy", "rex")
    (cat,) = load(folder, {**CAT, "kind": "object"})
    assert cat.eval_prompts == DREAMBOOTH_PROMPTS["object"]


def test_a_style_meets_every_subject(folder):
    style = {**CAT, "kind": "style", "instance_prompt": "a picture in <s1> style", "name": "s"}
    one, cat, other, dog = load(
        folder,
        style,
        CAT,
        {**style, "name": "t", "instance_prompt": "a picture in <t1> style", "pair_prompt": "{subject}, <TOK>"},
        {**DOG, "name": "dog"},
    )
    assert one.prompt(one.eval_prompts[0]) == "a house in <s1> style"
    assert one.prompt_with(cat) == cat.prompt_with(one) == "a photo of a <new1> cat in <s1> style"
    assert other.prompt_with(dog) == "<new2> dog, <t1> style"
    assert one.prompt_with(other) is None
    assert cat.prompt_with(dog) == "a photo of a <new1> cat and a <new2> dog"
    assert cat.pair_prompt is None


def test_a_folder_of_folders(folder, caplog):
    caplog.set_level(logging.INFO)
    shutil.copytree(folder / "dog", folder / "wolf_plushie 2")
    found = load_concepts(folder)
    assert [(one.name, one.token, one.noun) for one in found] == [
        ("cat", "<cat>", "cat"),
        ("dog", "<dog>", "dog"),
        ("wolf_plushie_2", "<wolf_plushie_2>", "wolf plushie"),
    ]
    assert "no prompts_and_classes.txt; the nouns are the folders' names" in caplog.text
    for file in (folder / "prompts_and_classes.txt", folder.parent / "prompts_and_classes.txt"):
        file.write_text(
            "Classes\n\nsubject_name,class\ncat,cat\ndog,stuffed animal\n\nPrompts\n'a {0} {1}'.format(a, b),\n"
        )
        with pytest.raises(
            ValueError, match=r"prompts_and_classes\.txt' has no noun for 'wolf_plushie 2': add the line"
        ):
            load_concepts(folder)
        file.write_text(file.read_text().replace("\n\nP", "\nwolf_plushie 2,toy\n\nP"))
        found = load_concepts(folder)
        assert [one.noun for one in found] == ["cat", "stuffed animal", "toy"]
        assert found[1].instance_prompt == "a photo of a <dog> stuffed animal"
        file.unlink()


@needs_photos
def test_dreambooths_photos():
    found = load_concepts(PHOTOS)
    assert len(found) == 10
    assert all(4 <= len(one.images) <= 6 for one in found)
    assert load_images(found[0].images[:2], size=16).shape == (2, 3, 16, 16)
    check_concepts(found, {"text_encoder": tokenizer()})


HOSTILE = [
    ([], r"concepts\.json' has 0 concepts, expected 1 to 1000"),
    ([CAT] * 10_000, r"has 10000 concepts, expected 1 to 1000"),
    ([CAT, 3], r"concepts\.json', entry 2 is int, expected an object with some of the keys"),
    (
        [{**CAT, "instance_promt": "x"}],
        r"entry 1 has the unknown key 'instance_promt'\. Did you mean 'instance_prompt'\?",
    ),
    ([{**CAT, "zzz": 1}], r"unknown key 'zzz'\. The keys are instance_prompt, "),
    ([{"instance_prompt": "x"}], r"entry 1 has no 'instance_data_dir': add it"),
    ([{**CAT, "instance_prompt": 3}], r"entry 1: `instance_prompt` is 3, expected text"),
    ([{**CAT, "instance_prompt": "a cat"}], r"\(cat\): `instance_prompt` is 'a cat', expected one token"),
    ([{**CAT, "instance_prompt": "<a> and <b> cat"}], r"expected one token such as <new1>; it has 2: set `token`"),
    (
        [{**CAT, "token": "<new2>"}],
        r"\(cat\): `instance_prompt` is .*, expected a prompt with the token '<new2>' as a word",
    ),
    ([{**CAT, "token": "new", "instance_prompt": "new10 cat"}], r"a prompt with the token 'new' as a word"),
    ([{**CAT, "token": "two words"}], r"`token` is 'two words', expected one new word"),
    ([{**CAT, "instance_prompt": "photo of <new1>"}], r"`noun` is '', expected a word .*no word follows the token"),
    ([{**CAT, "initializer": " "}], r"`initializer` is ' ', expected a word"),
    ([{**CAT, "name": "../x"}], r"`name` is '\.\./x', expected 1 to 64 letters"),
    ([{**CAT, "kind": "cat"}], r"`kind` is 'cat', expected one of: 'object', 'live', 'style'"),
    ([{**CAT, "kind": "live", "eval_prompts": ["{}"]}], r"`kind` is 'live', expected no such `kind` beside `eval_pr"),
    (
        [{**CAT, "pair_prompt": "{} {subject}"}],
        r"`pair_prompt` is '\{\} \{subject\}', expected none, or `kind` 'style'",
    ),
    (
        [{**CAT, "kind": "style", "pair_prompt": "a {subject}"}],
        r"`pair_prompt` is 'a \{subject\}', expected places for the style, '\{\}', and for a subject, '\{subject\}'",
    ),
    ([{**CAT, "eval_prompts": ["a {}", "a cat"]}], r"\(cat\): `eval_prompts` is 'a cat', expected a place for"),
    ([{**CAT, "eval_prompts": []}], r"`eval_prompts` is \[\], expected at least one"),
    ([{**CAT, "eval_prompts": "no.txt"}], r"`eval_prompts` is 'no\.txt', expected a file; there is no"),
    (
        [{**CAT, "instance_data_dir": "../nowhere"}],
        r"entry 1: `instance_data_dir` is '\.\./nowhere', expected a folder",
    ),
    ([{**CAT, "instance_data_dir": "a\0b"}], r"`instance_data_dir` is 'a\\x00b', expected text"),
    ([{**CAT, "instance_data_dir": "x" * 5000}], r"`instance_data_dir` is 'xxx.*expected a folder"),
    ([{**CAT, "instance_data_dir": "."}], r"`instance_data_dir` is '\.', expected a folder with pictures"),
    ([{**CAT, "reference_dir": "."}], r"`reference_dir` is '\.', expected a folder with pictures, but it has none"),
    (
        [{**CAT, "class_data_dir": "cat"}],
        r"`class_data_dir` is 'cat', expected another folder than `instance_data_dir`",
    ),
    ([{**CAT, "class_data_dir": "cat/a.png"}], r"`class_data_dir` is 'cat/a\.png', expected a folder"),
    ([{**CAT, "class_prompt": "a <new1> cat"}], r"`class_prompt` is .*, expected a prompt without the token"),
    (
        [{**CAT, "class_prompt": ["a cat", "a <new1> cat"]}],
        r"`class_prompt` is 'a <new1> cat', expected a prompt without",
    ),
    ([{**CAT, "class_prompt": []}], r"`class_prompt` is \[\], expected at least one prompt"),
    ([{**CAT, "class_prompt": "none.txt"}], r"`class_prompt` is 'none\.txt', expected a file; there is no"),
    ([{**CAT, "captions": "txt"}], r"`captions` is 'txt', expected captions, but no picture has one"),
    ([{**CAT, "captions": "a.json"}], r"`captions` is 'a\.json', expected a file"),
    ([CAT, {**DOG, "name": "CAT"}], r"two concepts have the name 'CAT': give one of them another `name`"),
    (
        [CAT, {**DOG, "instance_prompt": "a <New1> dog"}],
        r"the token '<new1>' of concept 'cat' equals the token '<New1>' of",
    ),
    (
        [
            {**CAT, "token": "new1", "instance_prompt": "new1 cat"},
            {**DOG, "token": "new10", "instance_prompt": "new10 dog"},
        ],
        r"concepts\.json': the token 'new1' of concept 'cat' is the beginning of the token 'new10' of concept 'dog': rename",
    ),
    ([CAT, {**DOG, "eval_prompts": ["{} by a <new1>"]}], r"concept 'dog' has the token '<new1>' of another concept"),
    (
        [{**CAT, "class_data_dir": "x"}, {**DOG, "class_data_dir": "x"}],
        r"concepts 'cat' and 'dog' have the same `class_data_dir`, but different classes",
    ),
]


@pytest.mark.parametrize(("entries", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_refused(folder, entries, message):
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=message) as caught:
        load(folder, *entries)
    assert len(str(caught.value)) < 1500
    assert sorted(folder.rglob("*")) == sorted([*before, folder / "concepts.json"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}', "holds dict, expected a list of objects"),
        ("[NaN]", "is not a valid JSON file: it contains NaN"),
        ("[" * 10**5, "is not a valid JSON file"),
        ('[{"instance_data_dir": "cat", "instance_prompt": ' + "[" * 900 + "]" * 900 + "}]", "instance_prompt"),
    ],
)
def test_refused_files(folder, text, message):
    (folder / "concepts.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_concepts(folder / "concepts.json")


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ('{"c.png": "a cat"}', r"`captions` is 'c\.png', expected the name of a picture\. Did you mean"),
        (
            '{"a.png": "a dog"}',
            r"`captions\['a\.png'\]` is 'a dog', expected text with the token '<new1>' or the noun 'cat'",
        ),
        ('{"a.png": 3}', r"`captions\['a\.png'\]` is 3, expected text"),
        ("[]", "holds a list, expected a mapping"),
        ("{}", "no picture has one"),
    ],
)
def test_refused_captions(folder, captions, message):
    (folder / "captions.json").write_text(captions)
    with pytest.raises(ValueError, match=message):
        load(folder, {**CAT, "captions": "captions.json"})


def test_nothing_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"`concepts` is 'nowhere', but there is no such file or folder"):
        load_concepts("nowhere")
    Path("concepts.json").touch()
    with pytest.raises(FileNotFoundError, match=r"did you mean 'concepts\.json'"):
        load_concepts("concept.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="'empty' has no folders"):
        load_concepts("empty")


def test_pictures_that_do_not_decode(folder):
    for content in (b"", b"\x89PNG\r\n\x1a\n", (folder / "cat/a.png").read_bytes()[:45]):
        (folder / "dog/a.png").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"concepts\.json', concept 'dog': the picture '.*dog/a\.png' cannot be read"
        ):
            load(folder, CAT, DOG)
    bomb = bytearray((folder / "cat/a.png").read_bytes())
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    (folder / "dog/a.png").write_bytes(bomb)
    with bounded(), pytest.raises(ValueError, match=r"dog/a\.png' cannot be read"):
        load(folder, CAT, DOG)


def test_links_and_other_files_are_named(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "c.png"
    shutil.copy(folder / "cat/a.png", elsewhere)
    (folder / "cat/c.png").symlink_to(elsewhere)
    with pytest.warns(UserWarning, match="'cat': 1 links lead out of the folder and are followed, such as 'c.png' to"):
        (cat,) = load(folder, CAT)
    assert len(cat.images) == 3
    (folder / "cat/c.png").unlink()
    (folder / "cat/note.txt").touch()
    (folder / "cat/more").mkdir()
    with pytest.warns(
        UserWarning, match=r"cat': 2 of its entries are no images and will not be read: more, note\.txt\."
    ):
        load(folder, CAT)
    (folder / "concepts.json").unlink()
    (folder / "top.png").touch()
    with pytest.warns(UserWarning, match=r"top\.png is in no concept's folder and will not be read"):
        load_concepts(folder)


@pytest.mark.filterwarnings("ignore")
def test_any_json(folder):
    """Loaded or refused with the file's name; no hang, no other error."""
    keys = [one.name for one in fields(_Entry)]
    texts = st.sampled_from(
        ["cat", "dog", "a <n> cat", "<n>", "{}", "txt", "live", "../cat", "/", "~x", "\ud800", ["{}"]]
    )
    entries = st.dictionaries(st.sampled_from(keys), texts | JSON).map(lambda given: CAT | given)
    refused = 0
    with guarded():

        @examples(60)
        @given(st.lists(entries, min_size=1, max_size=2) | JSON)
        def check(value):
            nonlocal refused
            (folder / "concepts.json").write_text(json.dumps(value))
            try:
                with bounded():
                    found = load_concepts(folder / "concepts.json")
            except ValueError as error:
                refused += 1
                text = str(error)
            else:
                text = "concepts.json"
                assert all(one.token in one.caption(path) for one in found for path in one.images)
            assert "concepts.json" in text or "no such user" in text
            assert len(text) < 2000

        check()
    assert refused > 20


def test_against_a_tokenizer(folder, caplog):
    caplog.set_level(logging.INFO)
    (cat,) = load(folder, CAT)
    check_concepts([cat], {"text_encoder": tokenizer()})
    assert "concept 'cat': initializer 'cat' is 3 tokens of text_encoder; the row starts as their mean" in caplog.text


def test_words_and_unknown_characters_are_refused_by_a_tokenizer(folder):
    known = tokenizer()
    known.add_tokens("qx")
    (cat,) = load(folder, {**CAT, "token": "qx", "instance_prompt": "qx cat"})
    message = "concept 'cat': `token` 'qx' is a word of text_encoder's tokenizer already, expected a new one, such as '<qx-1>'"
    with pytest.raises(ValueError, match=message):
        check_concepts([cat], {"text_encoder": known})
    (cat,) = load(folder, {**CAT, "initializer": "4"})
    with pytest.raises(
        ValueError, match="`initializer` '4' has characters that text_encoder's tokenizer does not know"
    ):
        check_concepts([cat], {"text_encoder": known})


def test_prompts_over_the_limit_are_refused(folder):
    """Start, end, the token as one, three letters of the noun, and eight more are 14."""
    (cat,) = load(folder, {**CAT, "instance_prompt": "<new1> cat", "eval_prompts": ["{}" + " a" * 8]})
    check_concepts([cat], {"text_encoder": tokenizer(14), "text_encoder_2": tokenizer(14)})
    message = (
        r"concept 'cat': the prompt '<new1> cat a a a a a a a a' has 12 tokens, expected 11 at most for text_encoder_2"
    )
    with pytest.raises(ValueError, match=message):
        check_concepts([cat], {"text_encoder": tokenizer(14), "text_encoder_2": tokenizer(13)})
    check_concepts([cat], {"text_encoder": tokenizer(13)}, evaluated=False)
    with pytest.raises(ValueError, match="has 14 tokens, expected 12 at most"):
        check_concepts([cat], {"text_encoder": tokenizer(14)}, num_vectors=3)
