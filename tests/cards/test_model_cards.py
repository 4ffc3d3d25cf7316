"""Cards: that the Hub can read their metadata, Python their code, and Markdown their tables, whatever a class is called."""

from __future__ import annotations

import ast
import itertools
import json
import re
import shutil

import pytest
import torch
from diffusers import UNet2DModel
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from runs import write_adapters
from text_to_image import make_pipeline

from funlora_hf import FunLoraConfig, FunLoraPipeline, save_adapter
from funlora_hf.baselines import ConvLoraConfig
from funlora_hf.cards.model_cards import ClassRow, Place, adapter_card, repository_card
from funlora_hf.continual.config import (
    ContinualTrainingArguments,
    DataArguments,
    EvaluationArguments,
    ModelArguments,
    run_settings,
)


FINGERPRINT = "0123456789abcdef" * 4
HUB = Place("me/cifar", "class_7", "me/base", "v1")
CLASSES = [
    ClassRow(0, "plane", "base", None, None, 91.25, None),
    ClassRow(1, "car", "base", None, None, 93.0, None),
    ClassRow(7, "bird", "adapter", 2256, 11312, 77.125, "class_7"),
    ClassRow(8, "cat", "adapter", 2256, 11312, None, "class_8"),
]


def results(**changes):
    arguments = run_settings(
        DataArguments(),
        ModelArguments(),
        ContinualTrainingArguments(),
        EvaluationArguments(num_samples_per_class=1000),
    )
    return {
        "dataset": "uoft-cs/cifar10",
        "seed": 3,
        "tasks": [[0, 1], [7, 8]],
        "class_order": [0, 1, 7, 8],
        "LA": 81.236,
        "AIA": 88.0,
        "class_accuracy": {"0": 91.25, "1": 93.0, "7": 77.125, "8": 70.0},
        "parameters_per_class": 2000,
        "parameters_per_class_with_vector": 2256,
        "versions": {"torch": "2.13.0", "peft": "0.21.2"},
        "settings": arguments,
        **changes,
    }


def funlora(**fields):
    return FunLoraConfig(**{"class_embedding": "class_embedding", "class_label": 7, "class_name": "bird", **fields})


def adapter(config=None, **changes):
    usual = {"class_label": 7, "class_name": "bird", "parameters": 2256, "num_bytes": 11312, "place": HUB}
    return adapter_card(funlora() if config is None else config, **{**usual, **changes})


def fingerprinted():
    config = funlora()
    config.base_fingerprint = {"float32": FINGERPRINT, "float16": None}
    return config


FULL = {"results": results(), "license": "mit"}


def full_cards():
    yield adapter(fingerprinted(), samples="samples.png", **FULL)
    yield repository_card("me/base", CLASSES, kind="base", base_fingerprints={"float32": FINGERPRINT}, **FULL)
    yield repository_card("me/cifar", CLASSES, kind="adapter", base="me/base", base_revision="v1", **FULL)


def snippets(card):
    return re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)


def table(card, heading):
    """The rows of a section's table, header first, as lists of cells."""
    section = card.text.split(f"\n## {heading}\n", 1)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert set(rows[1]) == {"---"}
    return [rows[0], *rows[2:]]


@pytest.mark.parametrize("number", range(3))
def test_metadata_survives_the_file(tmp_path, number):
    card = list(full_cards())[number]
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.to_dict() == card.data.to_dict()
    assert loaded.text == card.text
    assert loaded.data.license == "mit"
    assert loaded.data.datasets == ["uoft-cs/cifar10"]
    assert loaded.data.library_name == ["peft", "diffusers", "peft"][number]
    assert loaded.data.base_model == ["me/base", None, "me/base"][number]
    assert loaded.data.get("base_model_relation") == ["adapter", None, "adapter"][number]
    assert str(card) == str(list(full_cards())[number])


def test_an_adapter_s_card_has_the_facts():
    card = adapter(fingerprinted(), samples="samples.png", **FULL)
    assert dict(table(card, "Adapter")) == {
        "": "",
        "class": "7 (bird)",
        "function": "cosine",
        "functions p": "10",
        "rank": "1",
        "ratio": "1",
        "operation on the weights": "mul",
        "parameters, class vector included": "2,256",
        "parameters without the class vector": "2,000",
        "size of the file": "11.3 kB",
    }
    assert dict(table(card, "Training")) == {
        "": "",
        "data set": "uoft-cs/cifar10",
        "steps": "100",
        "batch size": "32",
        "learning rate": "0.03",
        "learning rate of alpha": "0.3",
        "Adam's beta1": "0.5",
        "warm-up steps": "0",
        "EMA": "decay 0.98",
        "seed": "3",
    }
    assert [row[1] for row in table(card, "Accuracy")[1:]] == ["77.12", "81.24", "88.00"]
    assert table(card, "Base")[1:] == [["float32", f"`{FINGERPRINT}`"]]
    for text in (
        "![Samples of this class](samples.png)",
        "torch 2.13.0, peft 0.21.2",
        "Its base is [me/base](https://huggingface.co/me/base/tree/v1), revision v1.",
        "trained on synthetic images (after the first task, on real ones), is tested on real images of uoft-cs/cifar10",
        "1,000 synthetic images of every class, sampled by heun in 6 steps.",
    ):
        assert text in card.text
    assert "rate of alpha" not in adapter(results=results(peft_method="class_vector")).text
    guided = results()
    guided["settings"]["EvaluationArguments"]["guidance_scale"] = 1.5
    assert "heun in 6 steps, with the guidance scale 1.5." in adapter(results=guided).text


def test_accuracies_are_in_the_metadata_in_percent():
    found = {result.metric_name: result for result in adapter(**FULL).data.eval_results}
    assert [result.metric_value for result in found.values()] == [77.12, 81.24, 88.0]
    assert all("in %, by a classifier trained on synthetic images" in name for name in found)
    assert {(result.metric_type, result.dataset_type) for result in found.values()} == {
        ("accuracy", "uoft-cs/cifar10")
    }
    for card in list(full_cards())[1:]:
        assert [result.metric_value for result in card.data.eval_results] == [81.24, 88.0]


@pytest.mark.parametrize(
    "changes", [{"LA": None, "AIA": None, "class_accuracy": None}, {"tasks": [[0, 1, 7, 8]]}, {"dataset": None}]
)
def test_accuracies_that_say_nothing_of_the_generator_are_not_in_the_metadata(changes):
    """After one task alone, the classifier is trained on real images."""
    card = adapter(results=results(**changes))
    assert card.data.eval_results is None
    assert "model-index" not in str(card)
    if "tasks" in changes:
        assert "trained on real images" in card.text


def test_a_base_s_card_lists_its_classes():
    card = repository_card("me/base", CLASSES, kind="base", base_fingerprints={"float32": FINGERPRINT}, **FULL)
    assert table(card, "Classes") == [
        ["id", "class", "made by", "parameters", "size", "accuracy (%)"],
        ["0", "plane", "base", "", "", "91.25"],
        ["1", "car", "base", "", "", "93.00"],
        ["7", "[bird](https://huggingface.co/me/base/tree/main/class_7)", "adapter", "2,256", "11.3 kB", "77.12"],
        ["8", "[cat](https://huggingface.co/me/base/tree/main/class_8)", "adapter", "2,256", "11.3 kB", ""],
    ]
    assert "knows\n2 classes itself" in card.text
    assert dict(table(card, "Training"))["steps"] == "700"
    assert table(card, "Fingerprints")[1:] == [["float32", f"`{FINGERPRINT}`"]]
    assert 'FunLoraPipeline.from_pretrained("me/base")' in card.text
    assert 'pipe.load_adapter("me/base", subfolder="class_7")' in card.text


def test_columns_with_nothing_in_them_are_left_out():
    classes = [ClassRow(7, "bird", "adapter", None, None, None, None)]
    card = repository_card(None, classes, kind="adapter", base=None, base_revision=None)
    assert table(card, "Classes") == [["id", "class", "made by"], ["7", "bird", "adapter"]]
    assert "1 class," in card.text
    assert "The base has not been published" in card.text


def test_a_class_is_made_by_a_base_or_an_adapter():
    with pytest.raises(ValueError, match="`kind` is 'lora', expected 'base' or 'adapter'"):
        ClassRow(7, "bird", "lora", None, None, None, None)


def test_a_base_given_to_the_run_was_not_trained_by_it():
    contents = results()
    contents["settings"]["ModelArguments"]["base_model"] = "me/base"
    card = repository_card("me/base", CLASSES, kind="base", base_fingerprints=None, results=contents)
    assert "## Training" not in card.text


ABSENT = {
    "place": Place(),
    "results": None,
    "samples": None,
    "license": None,
    "num_bytes": None,
    "class_label": None,
    "config": FunLoraConfig(),
}


@pytest.mark.parametrize(
    "absent", [{*pair} for pair in itertools.combinations_with_replacement(ABSENT, 2)] + [{*ABSENT}]
)
def test_what_is_not_known_is_left_out(absent):
    full = {**FULL, "samples": "samples.png", "config": fingerprinted()}
    card = adapter(**{**full, **{name: value for name, value in ABSENT.items() if name in absent}})
    _check_form(card)
    assert ("samples.png" in card.text) == ("samples" not in absent)
    assert ("## Training" in card.text) == ("## Accuracy" in card.text) == ("results" not in absent)
    assert ("has not been published" in card.text) == ("place" in absent)
    assert ("## Base" in card.text) == ("config" not in absent)


@pytest.mark.parametrize("key", list(results()))
def test_results_may_lack_anything(key):
    lacking = {name: value for name, value in results().items() if name != key}
    classes = CLASSES[:3]
    not_measured = [results(**{key: None})] if key in ("LA", "AIA", "class_accuracy", "dataset") else []
    for contents in [lacking, *not_measured]:
        _check_form(adapter(results=contents))
        _check_form(repository_card(None, classes, kind="base", base_fingerprints=None, results=contents))
        _check_form(repository_card(None, classes, kind="adapter", base=None, base_revision=None, results=contents))


def _check_form(card):
    """Nothing missing shows, no heading is alone, tables stand apart, and the code is Python."""
    assert "None" not in str(card)
    assert "\n\n\n" not in card.text
    assert not re.search(r"\n#+ [^\n]*\n+(#+ [^\n]*\n|$)", re.sub(r"```.*?```", "code", card.text, flags=re.DOTALL))
    assert not re.search(r"\n[^|\n]+\n\|", card.text)
    for code in snippets(card):
        assert code.startswith("import funlora_hf")
        ast.parse(code)
    assert snippets(card)


def test_no_path_of_a_machine_gets_into_a_card():
    place = Place("/home/me/run/adapters", "class_7", "/home/me/base", None)
    for dataset in ("/home/me/images", "~/me/images", "C:\\me\\images", "home/me/images", "images"):
        contents = results(dataset=dataset)
        for card in (
            adapter(place=place, results=contents),
            repository_card("/home/me/base", CLASSES, kind="base", base_fingerprints=None, results=contents),
            repository_card(
                "/home/me", CLASSES, kind="adapter", base="/home/me/base", base_revision=None, results=contents
            ),
        ):
            assert "me/base" not in str(card)
            assert "home" not in str(card)
            assert "C:" not in str(card)
            assert card.data.datasets is None
            assert ["data set", "images"] in table(card, "Training")
    assert adapter(results=results(dataset="digits")).data.datasets is None


def test_auto_classes_are_named_where_they_work():
    on_unet = adapter(place=Place("me/a", None, "me/unet", None, base_is_unet=True))
    assert "`AutoPeftModel` finds the U-Net by itself" in on_unet.text
    assert 'UNet2DModel.from_pretrained("me/unet")' in on_unet.text
    assert "`AutoPeftModel` does not work here" in adapter().text
    assert "`AutoPeftModel` does not work without the base" in adapter(place=Place()).text


def test_other_methods_have_the_facts_that_they_have():
    lora = adapter(LoraConfig(r=4))
    assert ["rank", "4"] in table(lora, "Adapter")
    assert "function" not in dict(table(lora, "Adapter"))
    assert 'pipe.load_adapter("me/cifar", subfolder="class_7", class_label=7)' in lora.text
    assert lora.data.tags[0] == "lora"
    row = adapter(LoraConfig(r=4, trainable_token_indices={"class_embedding": [0]})).text
    assert "velocity of this class if `class_labels` are 0, the row of" in row
    assert "velocity of this class, whichever row of" in lora.text
    conv = adapter(ConvLoraConfig(r=2, target_modules=["conv1"]))
    assert all(code.startswith("import funlora_hf.baselines\n") for code in snippets(conv))
    identity = dict(table(adapter(funlora(function="identity", operation="add")), "Adapter"))
    assert "functions p" not in identity
    assert identity["operation on the weights"] == "add"


NASTY = st.one_of(
    st.text(),
    st.text(st.sampled_from("|`\n\r-#*_[]()<>{}%'\"\\: &;~$!\t\u2028\x85ab7"), max_size=30),
    st.sampled_from(
        ["---", "a\n---\nb", "{{ 7 * 7 }}", "{% raw %}", "null", "7", "- a", "a: b", "# a", "```", "\\|", "None"]
    ),
).filter(str.strip)


@settings(deadline=None, max_examples=30)
@given(NASTY)
@example("a\n---\n\nb: c\n---\n")
@example("\ufeff")
@example("a\xa0")
def test_any_name_survives_in_the_metadata(name):
    cards = [
        adapter(funlora(class_name=name), class_name=name, results=results()),
        adapter(funlora(class_name=name), class_name=name, place=Place()),
    ]
    for card in cards:
        assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
        # Line breaks of Unicode, which PyYAML does not read as it writes them, become blanks.
        assert card.data.to_dict()["class_name"] == re.sub("[\x85\u2028\u2029]", " ", name)
        for code in snippets(card):
            ast.parse(code)
    assert len(snippets(cards[0])) == 2


@settings(deadline=None, max_examples=30)
@given(NASTY, NASTY)
def test_any_name_stays_in_its_cell(first, second):
    classes = [
        ClassRow(0, first, "base", None, None, 50.0, None),
        ClassRow(7, second, "adapter", 1, 1, None, "class_7"),
    ]
    for card in (
        repository_card("me/base", classes, kind="base", base_fingerprints=None),
        repository_card(None, classes, kind="adapter", base=None, base_revision=None),
    ):
        rows = table(card, "Classes")
        assert [len(row) for row in rows] == [6, 6, 6]
        assert [row[2] for row in rows[1:]] == ["base", "adapter"]
    assert {len(row) for row in table(adapter(class_name=first), "Adapter")} == {2}


@settings(deadline=None, max_examples=30)
@given(NASTY)
def test_a_name_is_shown_as_it_is(name):
    """By a Markdown reader that is not ours."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = markdown.parse(adapter(class_name=name).text)
    inline = [token for token in tokens if token.type == "inline"]
    printable = "".join(c if c.isprintable() or c in "\u200c\u200d" else " " for c in name)
    expected = " ".join(printable.split()) or "(no name)"
    shown = ["".join(child.content for child in token.children) for token in inline]
    assert all(child.type in ("text", "text_special") for token in inline[:1] for child in token.children)
    assert shown[0] == ("class 7" if name == "7" else expected)
    assert shown[shown.index("class") + 1] == ("7" if name == "7" else f"7 ({expected})")


def execute(code, places):
    for place, path in places.items():
        assert json.dumps(place) in code
        code = code.replace(json.dumps(place), json.dumps(str(path)))
    names = {}
    exec(code, names)
    return names


@pytest.fixture
def run_folder(tiny_pipe, tmp_path):
    """A run with a base of the classes 3 and 5 and an adapter of the class 7."""
    return write_adapters(tiny_pipe, tmp_path / "run", classes=(7,), class_label=7, class_name="seven")


def velocities(model, label=0):
    torch.manual_seed(0)
    sample, timestep = torch.randn(2, 1, 8, 8), torch.rand(2) * 1000
    with torch.no_grad():
        return model(sample, timestep, torch.full((2,), label)).sample


def test_the_code_in_an_adapter_s_card_runs(run_folder):
    folder = run_folder / "adapters" / "class_7"
    card = ModelCard.load(folder / "README.md")
    first, second = snippets(card)
    places = {"path/to/base": run_folder / "base", "path/to/this/folder": folder}
    assert len(execute(first, places)["images"]) == 4
    model = execute(second, places)["model"]
    assert isinstance(model, PeftModel)
    pipe = FunLoraPipeline.from_pretrained(run_folder / "base")
    pipe.load_adapter(folder)
    torch.manual_seed(0)
    sample, timestep = torch.randn(2, 1, 8, 8), torch.rand(2) * 1000
    assert torch.equal(velocities(model), pipe.predict_velocity(sample, timestep / 1000, [7, 7]))
    # As the card says, whatever row the labels name.
    assert torch.equal(velocities(model, 0), velocities(model, 1))
    base = UNet2DModel.from_pretrained(run_folder / "base", subfolder="unet").eval()
    assert not torch.equal(velocities(model), velocities(base))


def test_the_code_for_the_hub_runs_with_folders_in_its_place(run_folder):
    card = adapter(place=Place("me/run", "class_7", "me/base"), class_name="seven")
    places = {"me/base": run_folder / "base", "me/run": run_folder / "adapters"}
    assert len(execute(snippets(card)[0], places)["images"]) == 4
    expected = velocities(execute(snippets(card)[1], places)["model"])

    on_unet = adapter(place=Place("me/run", "class_7", "me/unet", base_is_unet=True))
    places = {"me/unet": run_folder / "base" / "unet", "me/run": run_folder / "adapters"}
    assert len(execute(snippets(on_unet)[0], places)["images"]) == 4
    assert torch.equal(velocities(execute(snippets(on_unet)[1], places)["model"]), expected)
    path = run_folder / "adapters" / "class_7" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": str(run_folder / "base" / "unet")}))
    model = AutoPeftModel.from_pretrained(run_folder / "adapters", subfolder="class_7").eval()
    assert torch.equal(velocities(model), expected)

    unlabelled = adapter(FunLoraConfig(), class_label=None, place=Place("me/run", "class_7", "me/base"))
    places = {"me/base": run_folder / "base", "me/run": run_folder / "adapters"}
    assert len(execute(snippets(unlabelled)[0], places)["images"]) == 4


def test_the_code_in_cards_of_many_runs(run_folder, tiny_pipe):
    classes = [
        ClassRow(3, "three", "base", None, None, None, None),
        ClassRow(7, "seven", "adapter", 1, 1, None, "class_7"),
    ]
    card = repository_card(None, classes, kind="adapter", base=None, base_revision=None)
    places = {"path/to/base": run_folder / "base", "path/to/this/folder": run_folder / "adapters"}
    first, second = snippets(card)
    assert len(execute(first, places)["images"]) == 4
    assert isinstance(execute(second, places)["model"], PeftModel)

    card = repository_card("me/run", classes, kind="adapter", base="me/unet", base_is_unet=True)
    places = {"me/unet": run_folder / "base" / "unet", "me/run": run_folder / "adapters"}
    first, second = snippets(card)
    assert len(execute(first, places)["images"]) == 4
    assert isinstance(execute(second, places)["model"], PeftModel)

    card = repository_card(None, classes, kind="base", base_fingerprints=None)
    assert 'pipe.load_adapter("path/to/this/folder", subfolder="class_7")' in snippets(card)[0]
    shutil.copytree(run_folder / "base", run_folder / "whole")
    (run_folder / "adapters" / "class_7").rename(run_folder / "whole" / "class_7")
    assert len(execute(*snippets(card), {"path/to/this/folder": run_folder / "whole"})["images"]) == 4


def of_base(name, library="diffusers.models.unets.unet_2d_condition"):
    config = FunLoraConfig()
    config.auto_mapping = {"base_model_class": name, "parent_library": library}
    return config


@pytest.mark.parametrize(
    ("name", "part", "task"),
    [
        ("UNet2DConditionModel", "unet", "text-to-image"),
        ("SD3Transformer2DModel", "transformer", "text-to-image"),
        ("FluxTransformer2DModel", "transformer", "text-to-image"),
        ("DiTTransformer2DModel", "transformer", "unconditional-image-generation"),
        ("CLIPTextModelWithProjection", "text_encoder", "text-to-image"),
        ("T5EncoderModel", "text_encoder", "text-to-image"),
        ("AutoencoderKL", "vae", "text-to-image"),
    ],
)
def test_a_card_names_the_class_of_the_base(name, part, task):
    usual = {"class_label": None, "class_name": "dog"}
    for place in (
        Place("me/dog", None, "me/base", "v1"),
        Place(),
        Place("me/dog", None, "me/unet", base_is_unet=True),
    ):
        card = adapter(of_base(name), place=place, **usual)
        _check_form(card)
        assert f"changes what a frozen\n{name} of" in card.text
        assert card.data.pipeline_tag == task
        assert card.data.tags == ["funlora", "diffusers"]
        assert "class_name" not in card.data.to_dict()
        assert "class-conditional" not in card.text
        assert ["base", name] in table(card, "Adapter")
        (code,) = snippets(card)
        assert (f"pipe.{part}" in code) != place.base_is_unet
    assert f'{name}.from_pretrained("me/unet")' in code


@pytest.mark.parametrize("pipeline", ["os", "NoSuchPipeline", "DiffusionPipeline; import os", 7, ["SD"], None])
def test_a_pipeline_that_diffusers_does_not_have_is_not_named(pipeline):
    config = of_base("UNet2DConditionModel")
    usual = str(adapter(config))
    config.auto_mapping["pipeline_class"] = pipeline
    assert str(adapter(config)) == usual
    config.auto_mapping["pipeline_class"] = "StableDiffusionXLPipeline"
    assert "of a [diffusers](https://github.com/huggingface/diffusers) StableDiffusionXLPipeline computes" in str(
        adapter(config)
    )


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("UNet2DModel", "diffusers.models.unets.unet_2d"),
        ("UNet2DConditionModel", "os"),
        ("UNet; import os", "diffusers.models"),
        (7, None),
        ("ConvMLP", "diffusers.models"),
    ],
)
def test_other_bases_have_the_usual_card(name, library):
    assert str(adapter(of_base(name, library))) == str(adapter(FunLoraConfig()))
    config = FunLoraConfig()
    config.auto_mapping = name
    assert str(adapter(config)) == str(adapter(FunLoraConfig()))


@pytest.mark.parametrize(
    ("name", "part", "target"),
    [
        ("SD", "unet", "to_q"),
        ("SD", "text_encoder", "q_proj"),
        ("SD", "vae", "conv1"),
        ("DiT", "transformer", "to_q"),
    ],
)
@pytest.mark.parametrize("loaded", [False, True])
def test_the_code_in_a_card_of_a_pipeline_s_adapter_runs(name, part, target, loaded, tmp_path):
    pipe = make_pipeline(name)
    pipe.save_pretrained(tmp_path / "base")
    if loaded:
        pipe = type(pipe).from_pretrained(tmp_path / "base")
    config = FunLoraConfig(target_modules=[target], init_weights=False)
    save_adapter(inject_adapter_in_model(config, getattr(pipe, part)), tmp_path / "mine")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    (code,) = snippets(card)
    assert (f"{type(pipe).__name__} computes" in card.text) == (f"= {type(pipe).__name__}.from" in code) == loaded
    assert ("= DiffusionPipeline.from" in code) == (not loaded)
    names = execute(code, {"path/to/base": tmp_path / "base", "path/to/this/folder": tmp_path / "mine"})
    assert names["image"].size == (8, 8)
    found = get_peft_model_state_dict(getattr(names["pipe"], part), adapter_name="default")
    expected = get_peft_model_state_dict(getattr(pipe, part))
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
