"""Exported pipelines: stock folders whose images are those of `load_concept`, or a refusal with nothing written."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline
from learned_concepts import learn, make_strategy, save_base
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from text_encoders import PIPELINES

from funlora_hf.adapters.base_fingerprint import BaseMismatchError
from funlora_hf.cli import main
from funlora_hf.personalization.arguments import ConceptEvaluationArguments
from funlora_hf.personalization.drawing import draw
from funlora_hf.personalization.export import export_concepts
from funlora_hf.personalization.load_concept import denoiser_of, load_concept


CONFIG = ConceptEvaluationArguments(num_inference_steps=2)


def load(folder):
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, prompt):
    return draw(pipe, [prompt], 2, purpose="export", seed=0, resolution=8, config=CONFIG).float()


def keys(folder):
    (file,) = next(one for part in ("unet", "transformer") if (one := list((folder / part).glob("*.safetensors"))))
    with safe_open(file, "pt") as opened:
        return set(opened.keys())


def assert_close(one, other):
    """Up to one step of 8 bits."""
    assert (one - other).abs().max() <= 1


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("strategy", ["funlora", "lora"])
def test_images_are_those_of_load_concept(strategy, family, tmp_path):
    base = save_base(tmp_path / "base", family)
    run = learn(make_strategy(tmp_path / "run", strategy, base=base, family=family))
    done = export_concepts(run, tmp_path / "out", adapter="t1")
    assert (done.tokens, done.adapter) == (["<t1>", "<t2>"], "t1")
    expected, found = load(base), load(tmp_path / "out")
    assert type(found).__name__ == type(expected).__name__ == done.pipeline
    before = images(expected, "a b")
    load_concept(expected, run / "concepts/t1")
    assert_close(images(found, "a <t1> b"), images(expected, "a <t1> b"))
    assert not torch.equal(images(expected, "a b"), before)
    # Nothing of an adapter is left, in memory or in the files.
    denoiser = getattr(found, "unet", None) or found.transformer
    assert not any(isinstance(module, BaseTunerLayer) for module in denoiser.modules())
    assert keys(tmp_path / "out") == keys(base)
    # The other one has its token.
    load_concept(expected, run / "concepts/t2")
    denoiser_of(expected).set_adapter("t1")
    assert_close(images(found, "a <t2> b"), images(expected, "a <t2> b"))


def test_tokens_alone_leave_the_weights(base, tmp_path):
    run = learn(make_strategy(tmp_path / "run", "textual_inversion", base=base))
    done = export_concepts(run, tmp_path / "out", concepts=["t2", "t1"])
    assert (done.tokens, done.adapter) == (["<t2>", "<t1>"], None)
    expected, found = load(base), load(tmp_path / "out")
    for name in ("t1", "t2"):
        load_concept(expected, run / "concepts" / name)
        assert torch.equal(images(found, f"a <{name}> b"), images(expected, f"a <{name}> b"))
    assert torch.equal(images(found, "a b"), images(load(base), "a b"))


def test_the_command(learned, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(learned), str(out), "--concepts", "t2"]) == 0
    assert capsys.readouterr().out == f"{out}: a StableDiffusionPipeline with <t2> and the adapter of t2\n"
    assert main(["export", str(learned), str(out), "--concepts", "t2"]) == 1
    assert "is there already, expected a new folder" in capsys.readouterr().err
    assert main(["export", str(learned / "concepts/t1"), str(tmp_path / "one")]) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "t1, t2 have an adapter each, but weights can hold that of one concept only"),
        ({"concepts": ["t3"]}, "`concepts` has 't3', expected some of: t1, t2"),
        ({"concepts": ["t1"], "adapter": "t2"}, "`adapter` is 't2', expected one of the exported concepts .*: t1"),
    ],
)
def test_refused(given, message, learned, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_concepts(learned, tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


def test_a_base_that_has_moved(tmp_path, capsys):
    run = learn(make_strategy(tmp_path / "run", base=save_base(tmp_path / "base")))
    export_concepts(run, tmp_path / "before", concepts=["t1"])
    (tmp_path / "base").rename(tmp_path / "moved")
    command = ["export", str(run), str(tmp_path / "out"), "--concepts", "t1"]
    assert main(command) == 1
    assert main([*command, "--base", str(tmp_path / "moved")]) == 0
    assert torch.equal(images(load(tmp_path / "out"), "a <t1> b"), images(load(tmp_path / "before"), "a <t1> b"))
    other = load(tmp_path / "moved")
    torch.nn.init.zeros_(other.unet.conv_in.weight)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError):
        export_concepts(run, tmp_path / "no", concepts=["t1"], base=tmp_path / "other")
    assert not (tmp_path / "no").exists()


def test_one_model_for_all_is_a_pipeline_already(base, tmp_path):
    run = learn(make_strategy(tmp_path / "run", "naive_lora", base=base))
    with pytest.raises(ValueError, match=r"needs no export: .*model' has all its concepts"):
        export_concepts(run, tmp_path / "out")
