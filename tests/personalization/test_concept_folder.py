"""The folder of a concept: what it says of itself, its card, and that a part of it is not taken for the whole."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from learned_concepts import learn, make_strategy
from safetensors.torch import load_file

from funlora_hf.cards.model_cards import Place
from funlora_hf.personalization.concept_folder import read_concept
from funlora_hf.personalization.load_concept import load_concept
from funlora_hf.text_to_image.model import TextToImageModel


def snippet(card):
    return re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]


def run_snippet(card, **places):
    for before, after in places.items():
        card = card.replace(f'"{before.replace("__", "/")}"', json.dumps(str(after)))
    code = snippet(card).replace("pipe(prompt)", "pipe(prompt, num_inference_steps=1, output_type='pt')")
    names: dict = {}
    exec(code, names)
    return names


def test_the_card_says_what_it_is_and_its_lines_run(base, learned):
    folder = learned / "concepts" / "t1"
    card = (folder / "README.md").read_text()
    numbers = sum(
        t.numel()
        for name in ("adapter_model", "learned_embeds")
        for t in load_file(folder / f"{name}.safetensors").values()
    )
    for text in (
        r"\<t1\>",
        "a \\<t1\\> b",
        "| strategy | funlora |",
        "FUNLORA, rank 1, cosine, 10 functions",
        f"| numbers | {numbers:,} |",
    ):
        assert text in card
    assert "instance_prompt: a <t1> b" in card.split("---")[1]
    assert str(base) not in card
    ran = run_snippet(card, path__to__base=base, path__to__this__folder=folder)
    assert ran["pipe"].get_active_adapters() == ["t1"]
    assert ran["image"].shape == (3, 8, 8)


def test_the_card_names_repositories(learned):
    card = (
        read_concept(learned / "concepts" / "t1")
        .card(Place(source="user/things", subfolder="t1", base="user/base", base_revision="v1"), license="mit")
        .decode()
    )
    assert 'DiffusionPipeline.from_pretrained("user/base", revision="v1")' in card
    assert 'load_concept(pipe, "user/things", subfolder="t1")' in card
    assert "\nbase_model: user/base\n" in card
    assert "\nlicense: mit\n" in card


def test_the_tiny_base_is_named_as_such(tmp_path):
    run = learn(make_strategy(tmp_path, "textual_inversion", base="tiny", names=["t1"]))
    card = (run / "concepts" / "t1" / "README.md").read_text()
    assert "DiffusionPipeline.from_pretrained(tiny_base())" in card
    assert "| adapter |" not in card
    assert "| numbers | 16 |" in card


def test_what_changes_the_model_is_drawn_by_the_pipeline_of_the_run(base, tmp_path):
    run = learn(make_strategy(tmp_path, "cns", base=base, names=["t1"], target_modules=["kv"]))
    folder = run / "concepts" / "t1"
    card = (folder / "README.md").read_text()
    assert "| strategy | cns (reconstructed) |" in card
    assert run_snippet(card, path__to__the__run__model=run / "model")["image"].shape == (3, 8, 8)
    pipe = TextToImageModel.from_pretrained(base).pipeline()
    with pytest.raises(ValueError, match=r"has only the token of 't1': its strategy 'cns' changed the model"):
        load_concept(pipe, folder)
    assert len(pipe.tokenizer) == len(TextToImageModel.from_pretrained(base).tokenizers["text_encoder"])


def test_three_text_encoders(tmp_path):
    run = learn(make_strategy(tmp_path, "lora", base="user/sd3", family="sd3", names=["t1"]))
    saved = read_concept(run / "concepts" / "t1")
    assert (saved.record.family, list(saved.rows)) == ("sd3", ["text_encoder", "text_encoder_2"])
    assert "pipe(**prompt_arguments(pipe, prompt))" in (saved.folder / "README.md").read_text()


def put(folder, **changes):
    file = folder / "concept.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors, which its concept.json names"),
        (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json, which"),
        (lambda f: (f / "learned_embeds.safetensors").unlink(), "has no learned_embeds.safetensors, which"),
        (lambda f: shutil.copy(f / "learned_embeds.safetensors", f / "learned_embeds_2.safetensors"), "which its concept.json does not name"),
        (lambda f: put(f, token="<other>"), "has rows of '<t1>', but its concept.json says '<other>'"),
        (lambda f: put(f, name="../t1"), "`name` is '../t1', expected letters"),
        (lambda f: put(f, weights={"x": "y"}), "`weights` names x, expected some of"),
        (lambda f: put(f, resolution="8"), "`resolution` is '8', expected a whole number"),
        (lambda f: (f / "concept.json").write_text("{}"), "token"),
    ],
)  # fmt: skip
def test_a_part_of_a_folder_is_not_taken_for_the_whole(learned, damage, message, tmp_path):
    folder = shutil.copytree(learned / "concepts" / "t1", tmp_path / "t1")
    read_concept(folder)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        read_concept(folder)


def test_a_loaded_concept_is_the_learned_one(base, learned):
    """Against the strategy's own model."""
    strategy = make_strategy(learned, base=base)
    pipe = TextToImageModel.from_pretrained(base).pipeline()
    assert load_concept(pipe, learned / "concepts" / "t2") == "<t2>"

    def image(pipe):
        return pipe("a <t2> b", num_inference_steps=1, output_type="pt", generator=torch.manual_seed(3)).images

    with strategy.sampling(1) as own:
        assert torch.equal(image(pipe), image(own))
