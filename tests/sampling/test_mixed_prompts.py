"""A batch of prompts with an adapter each against one call for each prompt."""

from __future__ import annotations

import threading

import pytest
import torch
from peft import get_peft_model
from text_to_image import component, make_pipeline

from funlora_hf import FunLoraConfig, expand_adapter_names, mixed_prompts


NAMES = ["one", "__base__", "two"]


def config(*targets):
    return FunLoraConfig(target_modules=list(targets) or ["to_q", "to_v"], init_weights=False)


def two_adapters(name):
    pipe = make_pipeline(name)
    torch.manual_seed(0)
    for adapter in ("one", "two"):
        component(pipe).add_adapter(config(), adapter)
    return pipe


def two_in_a_peft_model(name):
    """A pipeline whose model has no `add_adapter`, and the PeftModel around that model."""
    pipe = make_pipeline(name)
    torch.manual_seed(0)
    model = get_peft_model(pipe.transformer, config(), "one")
    model.add_adapter("two", config())
    return pipe, model


def draw(pipe, numbers, **kwargs):
    """Latents for the prompts of these numbers, which do not depend on the others of the batch."""
    images = kwargs.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(number) for number in numbers]
    embeds = torch.cat([torch.randn(1, 4, 16, generator=generator) for generator in generators])
    given = {"prompt_embeds": embeds}
    if type(pipe).__name__ != "StableDiffusionPipeline":
        given["pooled_prompt_embeds"] = embeds[:, 0]
    if type(pipe).__name__ != "FluxPipeline" or "true_cfg_scale" in kwargs:
        given |= {f"negative_{key}": torch.zeros_like(value) for key, value in given.items()}
    size = 8 * pipe.vae_scale_factor
    noise = [torch.Generator().manual_seed(10 * number + i) for number in numbers for i in range(images)]
    given |= {"num_inference_steps": 2, "height": size, "width": size, "output_type": "latent", "generator": noise}
    return pipe(**given, **kwargs).images


def one_by_one(pipe, **kwargs):
    parts = []
    for number, name in enumerate(NAMES):
        if name == "__base__":
            pipe.disable_lora()
        else:
            pipe.enable_lora()
            pipe.set_adapters(name)
        parts.append(draw(pipe, [number], **kwargs))
    pipe.enable_lora()
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("SD", {"guidance_scale": 3.0}),
        ("SD", {"guidance_scale": 1.0}),
        ("SD", {"num_images_per_prompt": 2}),
        ("SD", {"num_images_per_prompt": 2, "guidance_scale": 1.0}),
        ("SDXL", {"guidance_scale": 3.0}),
        ("SDXL", {"num_images_per_prompt": 2}),
        ("SD3", {}),
        ("SD3", {"guidance_scale": 1.0}),
        # Of each step, a batch with copies and one without.
        ("SD3", {"skip_guidance_layers": [0], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}),
        ("Flux", {}),
        ("Flux", {"true_cfg_scale": 3.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_each_prompt_has_its_own_adapter(name, kwargs):
    pipe = two_adapters(name)
    expected = one_by_one(pipe, **kwargs)
    with mixed_prompts(pipe, NAMES, num_images_per_prompt=kwargs.get("num_images_per_prompt", 1)):
        found = draw(pipe, range(3), **kwargs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    pipe.disable_lora()
    assert (draw(pipe, range(3), **kwargs) - expected).abs().max() > 1e-3


def test_labels_in_place_of_prompts():
    pipe, model = two_in_a_peft_model("DiT")

    def images(labels):
        generators = [torch.Generator().manual_seed(label) for label in labels]
        return torch.from_numpy(pipe(labels, generator=generators, num_inference_steps=2, output_type="np").images)

    expected = []
    for label, name in enumerate(("one", "two")):
        model.set_adapter(name)
        expected.append(images([label]))
    with mixed_prompts(pipe, ["one", "two"]):
        torch.testing.assert_close(images([0, 1]), torch.cat(expected), rtol=0, atol=1e-5)


def test_a_pipeline_that_does_not_say_whether_it_is_guided():
    pipe, model = two_in_a_peft_model("PixArt")

    def images(numbers, images=2):
        embeds = torch.cat([torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(n)) for n in numbers])
        prompts = {"prompt_embeds": embeds, "prompt_attention_mask": torch.ones(len(numbers), 4)}
        prompts |= {f"negative_{key}": torch.zeros_like(value) for key, value in prompts.items()}
        noise = [torch.Generator().manual_seed(10 * n + i) for n in numbers for i in range(images)]
        settings = {"num_inference_steps": 2, "height": 8, "width": 8, "output_type": "latent", "generator": noise}
        settings |= {"use_resolution_binning": False, "num_images_per_prompt": images}
        return pipe(prompt=None, negative_prompt=None, **prompts, **settings).images

    expected = []
    for number, name in enumerate(("one", "two")):
        model.set_adapter(name)
        expected.append(images([number]))
    with mixed_prompts(pipe, ["one", "two"], num_images_per_prompt=2):
        torch.testing.assert_close(images([0, 1]), torch.cat(expected), rtol=0, atol=1e-5)
        # Of this call, two names with two images each are as many as the doubled batch.
        with pytest.raises(ValueError, match="got a batch of 4 samples, expected 4, all different"):
            images([0, 1], images=1)


def test_adapters_of_the_text_encoder():
    pipe = make_pipeline("SD")
    torch.manual_seed(0)
    pipe.unet.add_adapter(config(), "one")
    for adapter in ("one", "two"):
        pipe.text_encoder.add_adapter(config("q_proj", "v_proj"), adapter)

    def images(*numbers):
        prompts = [["a photo", "a house"][number] for number in numbers]
        noise = [torch.Generator().manual_seed(number) for number in numbers for _ in range(2)]
        settings = {"num_inference_steps": 2, "output_type": "latent", "num_images_per_prompt": 2}
        return pipe(prompts, generator=noise, **settings).images

    pipe.text_encoder.set_adapter("one")
    expected = [images(0)]
    pipe.text_encoder.set_adapter("two")
    pipe.unet.disable_lora()
    expected.append(images(1))
    pipe.unet.enable_lora()
    with mixed_prompts(pipe, ["one", "two"], num_images_per_prompt=2):
        torch.testing.assert_close(images(0, 1), torch.cat(expected), rtol=0, atol=1e-5)


def test_unknown_names_are_refused():
    with (
        pytest.raises(ValueError, match=r"Trying to infer with non-existing adapter\(s\): three"),
        mixed_prompts(two_adapters("SD"), ["one", "three"]),
    ):
        pass


@pytest.mark.parametrize(
    ("names", "images", "call"),
    [
        (["one"] * 2, 1, {}),
        (["one"] * 2, 1, {"guidance_scale": 1.0}),
        (["one"] * 4, 1, {}),
        (["one"] * 6, 1, {"guidance_scale": 1.0, "num_images_per_prompt": 3}),
        ([], 1, {}),
        (["one"] * 3, 1, {"num_images_per_prompt": 2}),
        (["one"] * 3, 1, {"guidance_scale": 1.0, "num_images_per_prompt": 2}),
        (["one"] * 3, 2, {}),
        (["one"] * 3 + ["two"] * 3, 1, {}),
    ],
)
def test_another_number_of_prompts_is_refused(names, images, call):
    pipe = two_adapters("SD")
    expected = draw(pipe, range(3), **call)
    with (
        mixed_prompts(pipe, names, num_images_per_prompt=images),
        pytest.raises(ValueError, match=r"has \d names and .* is \d, but UNet2DConditionModel got a batch of \d+"),
    ):
        draw(pipe, range(3), **call)
    assert torch.equal(draw(pipe, range(3), **call), expected)


def test_equal_samples_are_no_copies_without_guidance():
    pipe = two_adapters("SD")
    latents = torch.randn(2, 4, 8, 8).repeat(2, 1, 1, 1)
    with (
        mixed_prompts(pipe, ["one", "two"]),
        pytest.raises(ValueError, match=r"has 2 names and .* got a batch of 4 samples, expected 2,"),
    ):
        draw(pipe, range(2), guidance_scale=1.0, num_images_per_prompt=2, latents=latents)


def test_other_threads_are_left_alone():
    pipe = two_adapters("SD")
    expected, found = draw(pipe, [0]), []
    with mixed_prompts(pipe, NAMES):
        thread = threading.Thread(target=lambda: found.append(draw(pipe, [0])))
        thread.start()
        thread.join()
        draw(pipe, range(3))
    assert torch.equal(found[0], expected)


def test_a_number_of_images_is_checked():
    with (
        pytest.raises(ValueError, match="`num_images_per_prompt` should be a positive integer"),
        mixed_prompts(make_pipeline("SD"), [], num_images_per_prompt=0),
    ):
        pass


@pytest.mark.parametrize(
    "how", [pytest.param("model", marks=pytest.mark.slow), pytest.param("in place", marks=pytest.mark.slow), "blocks"]
)
def test_compiled(how):
    pipe = two_adapters("SD")
    with mixed_prompts(pipe, NAMES):
        expected = draw(pipe, range(3))
    torch._dynamo.reset()
    if how == "model":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    elif how == "in place":
        pipe.unet.compile(backend="eager")
    else:
        pipe.unet.compile_repeated_blocks(backend="eager")
    with mixed_prompts(pipe, NAMES):
        torch.testing.assert_close(draw(pipe, range(3)), expected, rtol=0, atol=1e-5)
    with mixed_prompts(pipe, NAMES[::-1]):
        assert (draw(pipe, range(3)) - expected).abs().max() > 1e-3
    torch._dynamo.reset()


def test_names_around_a_pipeline_with_guidance():
    assert expand_adapter_names(["x", "y"]) == ["x", "y", "x", "y"]
    assert expand_adapter_names(["x", "y"], num_images_per_prompt=2) == ["x", "x", "y", "y"] * 2
    assert expand_adapter_names(["x", "y"], do_classifier_free_guidance=False) == ["x", "y"]
