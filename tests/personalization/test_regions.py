"""Prompts for regions against plain calls of the stock pipeline, to the bit."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from learned_concepts import learn, make_strategy
from peft import LoraConfig
from text_encoders import make_prompted

from funlora_hf import FunLoraConfig
from funlora_hf.cli import main
from funlora_hf.personalization.regions import Region, prompts_in_regions
from funlora_hf.personalization.sampling import sample_prompts
from funlora_hf.text_to_image.model import TextToImageModel


WHOLE, LEFT, RIGHT = (0, 0, 1, 1), (0, 0, 0.5, 1), (0.5, 0, 1, 1)


def make_pipe(name="SD", method=None):
    """With the adapters "one" and "two" if there is a method."""
    pipe = make_prompted(name)
    torch.manual_seed(0)
    for adapter in ("one", "two") if method else ():
        pipe.unet.add_adapter(method(target_modules=["to_q", "to_v"]), adapter)
    with torch.no_grad():
        for path, parameter in pipe.unet.named_parameters():
            if any(f".{adapter}" in path for adapter in ("one", "two")):
                parameter.add_(torch.randn_like(parameter))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt="a b", **kwargs):
    settings = {"num_inference_steps": 3, "height": 8, "width": 8, "guidance_scale": 2.5, "output_type": "latent"}
    return pipe(prompt, generator=torch.Generator().manual_seed(1), **{**settings, **kwargs}).images


def first_predictions(pipe, **kwargs):
    """What the denoiser returns in the first step, with guidance both halves."""
    found = []
    handle = pipe.unet.register_forward_hook(lambda module, args, out: found.append(out[0]))
    draw(pipe, num_inference_steps=1, **kwargs)
    handle.remove()
    return found[-1]


def state(pipe):
    layers = [module for module in pipe.unet.modules() if hasattr(module, "disable_adapters")]
    active = [(layer.active_adapters, layer.disable_adapters) for layer in layers]
    hooks = [len(module._forward_hooks) for module in pipe.unet.modules()]
    return (
        active,
        [parameter.requires_grad for parameter in pipe.unet.parameters()],
        hooks,
        "encode_prompt" in vars(pipe),
    )


@pytest.mark.parametrize("name", ["SD", "SDXL"])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 2}, {"negative_prompt": "d", "guidance_rescale": 0.5}],
    ids=lambda kwargs: ",".join(kwargs),
)
def test_one_region_with_everything_is_the_plain_call_of_its_prompt(name, kwargs):
    pipe = make_pipe(name)
    expected, other = draw(pipe, "c d e", **kwargs), draw(pipe, **kwargs)
    with prompts_in_regions(pipe, [Region(WHOLE, "c d e")]):
        assert torch.equal(draw(pipe, **kwargs), expected)
    assert not torch.equal(other, expected)
    assert torch.equal(draw(pipe, **kwargs), other)


def test_several_prompts_in_one_call():
    pipe = make_pipe("SDXL")
    expected = draw(pipe, ["c"] * 2)
    with prompts_in_regions(pipe, [Region(WHOLE, "c")]):
        assert torch.equal(draw(pipe, ["a", "b"]), expected)
        assert torch.equal(draw(pipe, "a", prompt_2="b"), draw(make_pipe("SDXL"), "c"))


def test_regions_with_the_prompt_of_the_call_change_nothing():
    pipe = make_pipe(method=FunLoraConfig)
    pipe.unet.set_adapter("two")
    expected = draw(pipe)
    with prompts_in_regions(pipe, [Region(LEFT, "a b"), Region((0.2, 0.3, 0.9, 0.7), "a b")], [["two"]] * 2):
        assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("method", [FunLoraConfig, LoraConfig])
def test_inside_a_region_its_adapter_predicts_alone(method):
    pipe = make_pipe(method=method)
    alone = []
    for prompt, names in (("c", ["one"]), ("d", ["two"]), ("e", ["one", "two"])):
        pipe.unet.set_adapter(names)
        alone.append(first_predictions(pipe, prompt=prompt))
    pipe.unet.disable_adapters()
    outside = first_predictions(pipe)
    before = state(pipe)
    regions = [Region((0, 0, 0.5, 0.5), "c"), Region(RIGHT, "d"), Region((0.5, 0.75, 1, 1), "e")]
    with prompts_in_regions(pipe, regions, [["one"], ["two"], ["one", "two"]]):
        found = first_predictions(pipe)
    assert torch.equal(found[..., :4, :4], alone[0][..., :4, :4])
    assert torch.equal(found[..., :6, 4:], alone[1][..., :6, 4:])
    assert torch.equal(found[..., 6:, 4:], alone[2][..., 6:, 4:])
    assert torch.equal(found[..., 4:, :4], outside[..., 4:, :4])
    assert not any(torch.equal(one, other) for one in alone for other in (outside, *alone) if one is not other)
    assert state(pipe) == before


@pytest.mark.parametrize("box", [LEFT, (0.1, 0.2, 0.45, 0.9), (0.49, 0, 1, 0.0722), (1 / 3, 1 / 3, 2 / 3, 2 / 3)])
@pytest.mark.parametrize("size", [(8, 8), (7, 12)])
def test_a_mask_has_the_latents_whose_centre_is_in_the_box(box, size):
    expected = np.zeros(size, dtype=bool)
    for y, x in np.ndindex(size):
        expected[y, x] = box[0] <= (x + 0.5) / size[1] < box[2] and box[1] <= (y + 0.5) / size[0] < box[3]
    np.testing.assert_array_equal(Region(box, "a").mask(*size).numpy(), expected)


def test_boxes_side_by_side_neither_overlap_nor_leave_a_gap():
    edges = (0, 0.19, 0.5, 0.8125, 1)
    columns = [Region((left, 0, right, 1), "a").mask(4, 8) for left, right in pairwise(edges)]
    assert torch.equal(torch.stack(columns).sum(dim=0), torch.ones(4, 8, dtype=torch.long))


def test_after_an_error_all_is_as_before():
    pipe = make_pipe(method=LoraConfig)
    pipe.unet.set_adapter("one")
    pipe.unet.requires_grad_(False)
    before, expected = state(pipe), draw(pipe)

    def fail(module, args, kwargs):
        if module.active_adapters() == ["two"]:
            raise RuntimeError("in the region")

    handle = pipe.unet.register_forward_pre_hook(fail, with_kwargs=True)
    with (
        pytest.raises(RuntimeError, match="in the region"),
        prompts_in_regions(pipe, [Region(LEFT, "c")], [["two"]]),
    ):
        draw(pipe)
    handle.remove()
    assert state(pipe) == before
    assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("strategy", ["funlora", "lora", "textual_inversion", "naive_lora", "mix_of_show"])
def test_samples_of_a_run(strategy, base, tmp_path):
    """With a region that has everything, images are those of the concept alone."""
    run = learn(make_strategy(tmp_path, strategy, base=base))
    how = {"num_images": 2, "num_inference_steps": 2}
    alone, plain = sample_prompts(run, ["a <t2> b", "a b"], **how)
    (found,) = sample_prompts(run, ["a b"], regions=[Region(WHOLE, "a <t2> b")], **how)
    assert (found.prompt, found.concepts, found.adapters) == ("a b", ["t2"], [])
    assert torch.equal(found.images, alone.images)
    (half,) = sample_prompts(run, ["a b"], regions=[Region(LEFT, "a <t2> b")], **how)
    assert not any(torch.equal(half.images, one.images) for one in (alone, plain))


def test_wider_images(learned):
    how = {"num_images": 2, "num_inference_steps": 2, "width": 16}
    (plain,) = sample_prompts(learned, ["a <t1> b"], **how)
    (found,) = sample_prompts(learned, ["a b"], regions=[Region(WHOLE, "a <t1> b")], **how)
    assert plain.images.shape == (2, 3, 8, 16)
    assert torch.equal(found.images, plain.images)


def test_the_command(learned, tmp_path, capsys):
    options = ["--region", "0,0,.5,1: a <t1> b", "--region", "0.5, 0, 1, 1:a <t2> b", "--num_images", "1"]
    options += ["--num_inference_steps", "1", "--output", str(tmp_path / "a.png")]
    assert main(["sample", str(learned), "--prompt", "a b", *options]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "row 1: a b: concepts t1, t2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--region", "0,0,1: b"], "`--region` is '0,0,1: b', expected 'left,top,right,bottom: prompt'"),
        (["--region", "left: b"], "`--region` is 'left: b', expected"),
        (["--region", "0,0,1,1"], "The region 0.0,0.0,1.0,1.0 has an empty prompt"),
        (["--region", "0.5,0,0.5,1: b"], "The region 0.5,0.0,0.5,1.0 of 'b' is no box in the image"),
        (["--region", "0,0.6,1,0.4: b"], "is no box in the image"),
        (["--region", "0,0,1.5,1: b"], "is no box in the image"),
        (["--region", "nan,0,1,1: b"], "is no box in the image"),
        (["--region", "0,0,0.01,1: b"], "of 'b' has the centre of none of the 8 x 8 latents"),
        (["--width", "9"], "`height` and `width` have to be divisible by 8 but are 8 and 9"),
        (["--region", "0,0,1,1: a <t9> b"], "has <t9>, expected tokens of these concepts: <t1>, <t2>"),
        (["--region", "0,0,1,1: a b b b b b b b"], "expected at most 8: shorten it"),
    ],
)
def test_bad_regions_are_refused(learned, tmp_path, capsys, options, message):
    code = main(["sample", str(learned), "--prompt", "a b", *options, "--output", str(tmp_path / "a.png")])
    assert code == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value", "shown"), [("--region", "0,0,1,1: b", "['0,0,1,1: b']"), ("--width", "16", "16")]
)
def test_what_belongs_to_a_prompt_is_refused_without_one(learned, capsys, option, value, shown):
    assert main(["sample", str(learned), option, value]) == 1
    assert f"`{option}` is {shown}, which only `--prompt` uses: add one" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SD3", "PixArt", "Flux"])
def test_other_families_are_refused(name):
    pipe = TextToImageModel(make_prompted(name)).pipeline()
    with (
        pytest.raises(ValueError, match=f"`pipe` is a {type(pipe).__name__}, expected a StableDiffusionPipeline or"),
        prompts_in_regions(pipe, [Region(LEFT, "a")]),
    ):
        pass


def test_what_does_not_fit_the_pipeline_is_refused():
    pipe, regions = make_pipe(method=LoraConfig), [Region(LEFT, "a"), Region(RIGHT, "b")]
    for names, message in (([["one"]], "has 1 entries, expected one for each of 2"), ([["x"], []], "has x, expected")):
        with pytest.raises(ValueError, match=f"`adapter_names` {message}"), prompts_in_regions(pipe, regions, names):
            pass
    with (
        prompts_in_regions(pipe, regions),
        pytest.raises(ValueError, match="has regions already"),
        prompts_in_regions(pipe, regions),
    ):
        pass
    embeds = pipe.encode_prompt("a", "cpu", 1, True)
    with prompts_in_regions(pipe, regions), pytest.raises(ValueError, match="`prompt` is None, expected text"):
        draw(pipe, None, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])
