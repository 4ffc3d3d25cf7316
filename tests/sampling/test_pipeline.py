from __future__ import annotations

import copy
import inspect
import json
import sys
import typing

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.unets.unet_2d import UNet2DOutput
from peft import LoraConfig, PeftModel, get_peft_model
from runs import TINY_UNET, make_tiny_unet
from safetensors.torch import load_file, save_file
from scipy.integrate import solve_ivp

from funlora_hf import FunLoraConfig, FunLoraPipeline, FunLoraPipelineOutput, merge_class
from funlora_hf.adapters.untrusted_base import read_unet
from funlora_hf.continual.base import find_base
from funlora_hf.continual.config import ModelArguments
from funlora_hf.tuner import FunLoraLayer


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def adapters(tiny_unet, tmp_path):
    """Folders of two random adapters, for the classes 7 (named "seven") and 9."""
    for class_id, name in ((7, "seven"), (9, None)):
        torch.manual_seed(class_id)
        config = FunLoraConfig(
            class_embedding="class_embedding", class_label=class_id, class_name=name, init_weights=False
        )
        model = get_peft_model(tiny_unet, config, adapter_name=f"class_{class_id}")
        model.save_pretrained(tmp_path / "adapters", save_embedding_layers=False)
        model.unload()
    return tmp_path / "adapters"


@pytest.fixture
def pipe(tiny_pipe, adapters):
    tiny_pipe.load_adapter(adapters / "class_7")
    tiny_pipe.load_adapter(adapters / "class_9")
    return tiny_pipe


def test_classes_are_those_of_base_and_adapters(pipe):
    assert pipe.classes == {3: "three", 5: "5", 7: "seven", 9: "9"}
    assert pipe.base_classes == [3, 5]


@pytest.fixture
def plain_unet(tiny_unet):
    """The base's U-Net, taken before anything is done to it."""
    return copy.deepcopy(tiny_unet)


def test_a_mixed_call_gives_each_class_in_the_order_asked(plain_unet, pipe, adapters):
    asked = [9, 3, "seven", 5, 7, "three", 9]
    together = pipe(asked, generator=generator(), output_type="pt").images
    noise = torch.randn(7, 1, 8, 8, generator=generator())
    rows = {3: 0, "three": 0, 5: 1}
    for index, label in enumerate(asked):
        unet = copy.deepcopy(plain_unet)
        if label not in rows:
            unet = PeftModel.from_pretrained(unet, adapters / f"class_{9 if label == 9 else 7}")
        alone = _integrate_by_hand(unet, noise[index : index + 1], torch.tensor([rows.get(label, 0)]))
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-5, rtol=0)


def _integrate_by_hand(unet, x, row, steps: int = 10):
    """Heun's rule written out."""

    def v(sigma, x):
        return unet(x, torch.tensor(1000.0 * sigma), row).sample

    with torch.no_grad():
        for k in range(steps):
            sigma, following = 1 - k / steps, 1 - (k + 1) / steps
            h = following - sigma
            slope = v(sigma, x)
            x = x + h / 2 * (slope + v(following, x + h * slope))
    return (x / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_guidance_scale_moves_away_from_the_base_at_the_mean_of_its_vectors(plain_unet, pipe, adapters, compiled):
    """Against copies of the U-Net in stock PEFT, and one whose class embedding has the mean in every row."""
    if compiled:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        pipe([9, 3], 1, generator=generator())  # compiled without guidance
    asked, scale = [9, 3, 7, 5], 1.7
    guided = pipe(asked, 10, generator=generator(), output_type="pt", guidance_scale=scale)
    assert guided.nfe == 2 * pipe(asked, 10).nfe
    mean = copy.deepcopy(plain_unet)
    rows = mean.class_embedding.weight.data
    rows.copy_(rows.mean(dim=0).expand_as(rows))
    noise = torch.randn(4, 1, 8, 8, generator=generator())
    for index, label in enumerate(asked):
        own = copy.deepcopy(plain_unet)
        if label > 5:
            own = PeftModel.from_pretrained(own, adapters / f"class_{label}")

        def both(x, time, row, own=own):
            base = mean(x, time, row).sample
            return UNet2DOutput(base + scale * (own(x, time, row).sample - base))

        alone = _integrate_by_hand(both, noise[index : index + 1], torch.tensor([1 if label == 5 else 0]))
        torch.testing.assert_close(guided.images[index : index + 1], alone, atol=1e-5, rtol=0)
    without = pipe(asked, generator=generator(), output_type="pt").images
    assert torch.equal(without, pipe(asked, generator=generator(), output_type="pt", guidance_scale=1.0).images)


def test_a_base_without_classes_guides_too(tmp_path):
    unet = UNet2DModel(**{**TINY_UNET, "num_class_embeds": None}).eval()
    pipe = FunLoraPipeline(unet, FlowMatchEulerDiscreteScheduler())
    model = get_peft_model(copy.deepcopy(unet), FunLoraConfig(init_weights=False, class_label=4))
    model.save_pretrained(tmp_path)
    pipe.load_adapter(tmp_path)
    images = pipe([4], 1, "euler", generator=generator(), output_type="pt", guidance_scale=3.0).images
    noise = torch.randn(1, 1, 8, 8, generator=generator())
    with torch.no_grad():
        base, own = (one(noise, torch.tensor(1000.0)).sample for one in (unet, model))
    expected = ((noise - base - 3.0 * (own - base)) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [-0.5, float("nan"), float("inf")])
def test_a_guidance_scale_out_of_range_is_refused(pipe, scale):
    with pytest.raises(ValueError, match=r"`guidance_scale` is .*, expected a number of at least 0; 1 is none"):
        pipe([7], guidance_scale=scale)


def test_stock_peft_gives_the_same_output(pipe, adapters, tiny_unet):
    sample, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        ours = pipe.predict_velocity(sample, sigma, [7, 7, 7])
        pipe.unload_adapter(7)
        pipe.unload_adapter(9)
        model = PeftModel.from_pretrained(tiny_unet, adapters / "class_7")
        theirs = model(sample, 1000 * sigma, torch.zeros(3, dtype=torch.long)).sample
    assert torch.equal(ours, theirs)


def test_adapters_leave_the_base_s_classes_alone(tiny_pipe, adapters):
    before = tiny_pipe([3, 5], generator=generator(), output_type="pt").images
    tiny_pipe.load_adapter(adapters / "class_7")
    with_adapter = tiny_pipe([3, 5], generator=generator(), output_type="pt").images
    tiny_pipe.unload_adapter(7)
    after = tiny_pipe([3, 5], generator=generator(), output_type="pt").images
    assert torch.equal(before, with_adapter)
    assert torch.equal(before, after)
    assert not any(isinstance(module, FunLoraLayer) for module in tiny_pipe.unet.modules())


@pytest.mark.parametrize(("solver", "nfe"), [("euler", 3), ("heun", 6), ("rk4", 12)])
def test_output_types_and_evaluations(pipe, solver, nfe):
    tensor = pipe([3, 7], 3, solver, generator=generator(), output_type="pt")
    array = pipe([3, 7], 3, solver, generator=generator(), output_type="np")
    images, evaluations = pipe([3, 7], 3, solver, generator=generator(), return_dict=False)
    assert tensor.nfe == array.nfe == evaluations == nfe
    assert tensor.images.shape == (2, 1, 8, 8)
    np.testing.assert_array_equal(array.images[..., 0], tensor.images[:, 0].numpy())
    assert [image.size for image in images] == [(8, 8), (8, 8)]
    np.testing.assert_array_equal(np.asarray(images[1]), (array.images[1, ..., 0] * 255).round().astype("uint8"))


@pytest.mark.parametrize(("solver", "nfe"), [("heun", 8), ("rk4", 16)])
@pytest.mark.parametrize(("first", "second"), [(3, "seven"), (9, 7), (5, 3), (7, 7)])
def test_interpolation_ends_at_the_plain_classes(pipe, first, second, solver, nfe):
    way = pipe.interpolate(first, second, [1.0, 0.5, 0.0], 4, solver, generator=generator(), output_type="pt")
    for index, label in ((2, first), (0, second)):
        plain = pipe([label], 4, solver, generator=generator(), output_type="pt")
        torch.testing.assert_close(way.images[index : index + 1], plain.images, atol=1e-5, rtol=0)
        assert way.nfe == plain.nfe == nfe


def test_between_the_ends_velocities_are_mixed(plain_unet, pipe, adapters):
    adapted = PeftModel.from_pretrained(copy.deepcopy(plain_unet), adapters / "class_7")
    noise = torch.randn(1, 1, 8, 8, generator=generator())
    images = pipe.interpolate(5, "seven", 5, generator=generator(), output_type="pt").images
    assert images.shape == (5, 1, 8, 8)
    for image, weight in zip(images, (0, 0.25, 0.5, 0.75, 1), strict=True):

        def mixed(x, timestep, row, weight=weight):
            first, second = plain_unet(x, timestep, torch.tensor([1])), adapted(x, timestep, torch.tensor([0]))
            return UNet2DOutput((1 - weight) * first.sample + weight * second.sample)

        by_hand = _integrate_by_hand(mixed, noise, None)
        torch.testing.assert_close(image[None], by_hand, atol=1e-5, rtol=0)
    # The middle is no mixture of the images at the ends.
    assert (images[2] - (images[0] + images[4]) / 2).abs().max() > 1e-3


def test_interpolation_takes_other_peft_methods(tiny_unet, tiny_pipe, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["conv_out", "conv1"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(tiny_unet), config)
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    tiny_pipe.load_adapter(tmp_path / "lora", class_label=8)
    images = tiny_pipe.interpolate(8, 3, 2, generator=generator(), output_type="pt").images
    for image, label in zip(images, (8, 3), strict=True):
        plain = tiny_pipe(label, generator=generator(), output_type="pt").images
        torch.testing.assert_close(image[None], plain, atol=1e-5, rtol=0)
    assert (images[0] - images[1]).abs().max() > 1e-2


def test_interpolation_gives_the_usual_output_types(pipe):
    array = pipe.interpolate(3, 7, 3, 2, generator=generator(), output_type="np").images
    images, nfe = pipe.interpolate(3, 7, 3, 2, generator=generator(), return_dict=False)
    assert (array.shape, nfe) == ((3, 8, 8, 1), 4)
    for image, values in zip(images, array, strict=True):
        np.testing.assert_array_equal(np.asarray(image), (values[..., 0] * 255).round().astype("uint8"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"class_label_2": 4}, r"`class_labels` has 4, expected ids or names of known classes"),
        ({"weights": []}, r"`weights` is \[\], expected numbers in \[0, 1\]"),
        ({"weights": [0.5, 1.5]}, r"`weights` is \[0.5, 1.5\], expected numbers in \[0, 1\]"),
        ({"weights": [float("nan")]}, "`weights` is .*nan"),
        ({"weights": 1}, "`weights` is 1, expected at least 2 images"),
        ({"solver": "midpoint"}, "`solver` is 'midpoint', expected one of"),
        ({"num_inference_steps": 0}, "`num_inference_steps` should be a positive integer"),
        ({"output_type": "latent"}, "`output_type` is 'latent'"),
    ],
)
def test_bad_interpolations_are_named(pipe, arguments, text):
    with pytest.raises(ValueError, match=text):
        pipe.interpolate(**{"class_label_1": 3, "class_label_2": 7, **arguments})


def test_dopri5_agrees_with_scipy(pipe):
    adaptive = pipe([3, 7], solver="dopri5", rtol=1e-3, atol=1e-3, generator=generator(), output_type="pt")
    noise = torch.randn(2, 1, 8, 8, generator=generator())

    def velocity(sigma, flat):
        state = torch.tensor(flat, dtype=torch.float32).reshape(noise.shape)
        with torch.no_grad():
            return pipe.predict_velocity(state, torch.tensor(sigma), [3, 7]).numpy().reshape(-1)

    solution = solve_ivp(velocity, (1, 0), noise.numpy().reshape(-1), method="RK45", rtol=1e-3, atol=1e-3)
    expected = (torch.tensor(solution.y[:, -1]).reshape(noise.shape) / 2 + 0.5).clamp(0, 1)
    # An untrained U-Net swings fast in time: two adaptive solvers of this tolerance differ by up to 0.02.
    torch.testing.assert_close(adaptive.images, expected.float(), atol=0.03, rtol=0)


def test_saving_leaves_the_base_plain_and_loading_brings_all_back(pipe, tmp_path):
    expected = pipe([3, 7, 9], generator=generator(), output_type="pt").images
    pipe.save_pretrained(tmp_path / "saved")
    plain = UNet2DModel.from_pretrained(tmp_path / "saved", subfolder="unet")
    clean = {key.replace(".base_layer", "") for key in pipe.unet.state_dict() if "funlora" not in key}
    assert set(plain.state_dict()) == clean
    assert (tmp_path / "saved" / "adapters" / "class_7" / "README.md").is_file()
    again = FunLoraPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert again.classes == pipe.classes
    assert torch.equal(again([3, 7, 9], generator=generator(), output_type="pt").images, expected)


def test_saving_over_a_class_folder_with_other_files_changes_nothing(pipe, tmp_path):
    notes = tmp_path / "saved" / "adapters" / "class_7" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("x")
    with pytest.raises(ValueError, match="class_7', which has other contents than an adapter"):
        pipe.save_pretrained(tmp_path / "saved")
    assert [path for path in (tmp_path / "saved").rglob("*") if path.is_file()] == [notes]


def test_saving_with_merged_adapters_is_refused(pipe, tmp_path):
    for module in pipe.unet.modules():
        if isinstance(module, FunLoraLayer):
            module.merge(adapter_names=sorted(module._get_available_adapters())[:1])
    with pytest.raises(ValueError, match="unmerge_adapter"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_list_of_generators_makes_each_image_its_own(pipe):
    both = pipe([3, 3], generator=[generator(1), generator(2)], output_type="pt").images
    swapped = pipe([3, 3], generator=[generator(2), generator(1)], output_type="pt").images
    torch.testing.assert_close(both.flip(0), swapped)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"class_labels": [4]}, r"`class_labels` has 4, .* 3 \(three\), 5 \(5\), 7 \(seven\), 9 \(9\)"),
        ({"class_labels": ["four"]}, "`class_labels` has 'four'"),
        ({"class_labels": []}, "`class_labels` is empty"),
        ({"class_labels": 3, "solver": "midpoint"}, "`solver` is 'midpoint', expected one of"),
        ({"class_labels": 3, "num_inference_steps": 0}, "`num_inference_steps` should be a positive integer"),
        ({"class_labels": 3, "output_type": "latent"}, "`output_type` is 'latent'"),
    ],
)
def test_bad_calls_are_named(pipe, arguments, text):
    with pytest.raises(ValueError, match=text):
        pipe(**arguments)


def test_a_class_is_taken_once(pipe, adapters):
    with pytest.raises(ValueError, match="`class_label` is 7, a class that an adapter is loaded for already"):
        pipe.load_adapter(adapters / "class_7")
    with pytest.raises(ValueError, match="`class_label` is 3, a class that the base knows already"):
        pipe.load_adapter(adapters / "class_7", class_label=3)
    with pytest.raises(ValueError, match="`class_name` 'seven' is used for two classes"):
        pipe.load_adapter(adapters / "class_7", class_label=8)
    assert pipe.load_adapter(adapters.parent, subfolder="adapters/class_7", class_label=8, class_name="eight") == 8
    assert pipe.classes[8] == "eight"


def test_an_adapter_without_a_label_asks_for_one(tiny_unet, tiny_pipe, tmp_path):
    model = get_peft_model(tiny_unet, FunLoraConfig())
    model.save_pretrained(tmp_path / "a")
    model.unload()
    with pytest.raises(ValueError, match="does not say which class it is: pass `class_label`"):
        tiny_pipe.load_adapter(tmp_path / "a")
    assert tiny_pipe.load_adapter(tmp_path / "a", class_label=0) == 0


def test_adapters_of_two_methods_do_not_mix(tiny_unet, pipe, tmp_path):
    unet = UNet2DModel.from_config(tiny_unet.config)
    get_peft_model(unet, LoraConfig(target_modules=["to_q"])).save_pretrained(tmp_path / "a")
    classes = pipe.classes
    with pytest.raises(ValueError, match=r"an adapter of type LORA, expected FUNLORA, as those loaded already"):
        pipe.load_adapter(tmp_path / "a", class_label=0)
    assert pipe.classes == classes


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("damage", ["shape", "missing", "unexpected"])
def test_an_adapter_that_does_not_fit_changes_nothing(tiny_pipe, adapters, first, damage):
    broken = adapters / "class_9" / "adapter_model.safetensors"
    tensors = load_file(broken)
    key = next(key for key in tensors if key.endswith("funlora_A"))
    if damage == "shape":
        tensors[key] = torch.zeros(3, 1)
    elif damage == "missing":
        del tensors[key]
    else:
        tensors[key.replace("funlora_A", "funlora_add_A")] = tensors[key].clone()
    save_file(tensors, broken)
    if not first:
        tiny_pipe.load_adapter(adapters / "class_7")
    classes = tiny_pipe.classes
    before = tiny_pipe(list(classes), generator=generator(), output_type="pt").images
    with pytest.raises(ValueError, match="does not fit this base"):
        tiny_pipe.load_adapter(adapters / "class_9")
    assert tiny_pipe.classes == classes
    assert torch.equal(tiny_pipe(list(classes), generator=generator(), output_type="pt").images, before)


def test_unloading_needs_a_loaded_class(pipe):
    for class_label in (3, 4):
        with pytest.raises(ValueError, match=f"`class_label` is {class_label}, expected a class loaded"):
            pipe.unload_adapter(class_label)


def test_the_base_must_be_a_flow_matching_one(tiny_unet):
    with pytest.raises(ValueError, match="`scheduler` is a DDPMScheduler"):
        FunLoraPipeline(tiny_unet, DDPMScheduler())
    with pytest.raises(ValueError, match=r"`class_ids` is \[1\], expected 2 different ids"):
        FunLoraPipeline(tiny_unet, FlowMatchEulerDiscreteScheduler(), class_ids=[1])


def test_the_folder_says_which_row_is_which_class(tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["class_ids"] == [3, 5]
    assert index["id2label"] == {"3": "three", "5": "5"}


def test_a_bfloat16_unet_keeps_its_state_in_float32(pipe):
    exact = pipe([3, 7], generator=generator(), output_type="pt").images
    pipe.unet.to(torch.bfloat16)
    rounded = pipe([3, 7], generator=generator(), output_type="pt").images
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.1, rtol=0)


@pytest.mark.parametrize("wrapped", [lambda model: model, lambda model: model.base_model], ids=["PeftModel", "tuner"])
def test_a_peft_model_is_no_base(tiny_unet, wrapped):
    model = wrapped(get_peft_model(tiny_unet, FunLoraConfig()))
    with pytest.raises(ValueError, match=rf"`unet` is a {type(model).__name__}, .*`unet.unload\(\)`.*`load_adapter`"):
        FunLoraPipeline(model, FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize(
    "config",
    [
        FunLoraConfig(),
        FunLoraConfig(modules_to_save=["conv_out"]),
        LoraConfig(target_modules=["conv1"]),
        LoraConfig(target_modules=["conv1"], trainable_token_indices={"class_embedding": [0]}),
    ],
    ids=["bank", "whole module", "LoRA", "LoRA and row"],
)
def test_the_pipeline_saves_its_base_without_adapters(tiny_pipe, config, tmp_path):
    unet = tiny_pipe.unet
    get_peft_model(copy.deepcopy(unet), config).save_pretrained(tmp_path / "a", save_embedding_layers=False)
    for _ in range(2):
        tiny_pipe.load_adapter(tmp_path / "a", class_label=7)
        unet.save_pretrained(tmp_path / "wrapped")
        with pytest.raises(ValueError, match="saved with adapters inside"):
            read_unet(tmp_path / "wrapped")
        tiny_pipe.save_pretrained(tmp_path / "saved")
        again = FunLoraPipeline.from_pretrained(tmp_path / "saved")
        assert again.classes.keys() == {3, 5, 7}
        tiny_pipe.unload_adapter(7)
        unet.save_pretrained(tmp_path / "plain")
        loaded = UNet2DModel.from_pretrained(tmp_path / "plain")
        assert all(torch.equal(tensor, unet.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads is new in Python 3.11")
@pytest.mark.parametrize("name", ["__call__", "interpolate"])
def test_the_type_of_the_output_follows_return_dict(name):
    method = getattr(FunLoraPipeline, name)
    types = {}
    for overloaded in typing.get_overloads(method):
        hints = typing.get_type_hints(overloaded)
        (flag,) = typing.get_args(hints["return_dict"])
        types[flag] = hints["return"]
        assert inspect.signature(overloaded).parameters.keys() == inspect.signature(method).parameters.keys()
    assert types.keys() == {True, False}
    assert types[True] is FunLoraPipelineOutput
    assert typing.get_origin(types[False]) is tuple


UNUSUAL = [
    ({"time_embedding_type": "fourier"}, "time_embedding_type"),
    ({"time_embedding_type": "learned", "num_train_timesteps": 1000}, "time_embedding_type"),
    ({"out_channels": 2}, "out_channels"),
]


@pytest.mark.parametrize(("changes", "field"), UNUSUAL)
def test_a_unet_with_other_conventions_is_refused_by_name(changes, field, tmp_path):
    """Before anything is sampled or trained: by the pipeline, as an existing base, and in the arguments of a run."""
    unet = UNet2DModel(**{**TINY_UNET, "num_class_embeds": 2, **changes})
    with pytest.raises(ValueError, match=rf"`unet\.config\.{field}`"):
        FunLoraPipeline(unet, FlowMatchEulerDiscreteScheduler())
    FunLoraPipeline(make_tiny_unet(), FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path)
    unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match=rf"`base_model\.unet\.{field}`"):
        find_base(str(tmp_path))
    with pytest.raises(ValueError, match=rf"`unet_config\.{field}`"):
        ModelArguments(unet_config={**TINY_UNET, **changes})


@pytest.mark.parametrize("changes", [{"num_train_timesteps": 500}, {"shift": 3.0}, {"use_dynamic_shifting": True}])
def test_a_scheduler_with_other_conventions_is_refused_by_name(changes, tiny_unet):
    (name,) = changes
    with pytest.raises(ValueError, match=rf"`scheduler\.config\.{name}`"):
        FunLoraPipeline(tiny_unet, FlowMatchEulerDiscreteScheduler(**changes))


def test_another_kind_of_model_is_refused_at_construction():
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
    )
    with pytest.raises(ValueError, match="`unet` is a UNet2DConditionModel, expected a UNet2DModel"):
        FunLoraPipeline(unet, FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("solver", ["euler", "heun", "rk4"])
def test_samples_that_are_not_finite_are_no_images(value, solver, tiny_pipe):
    """The error names the class whose weights are spoiled and no other."""
    with torch.no_grad():
        tiny_pipe.unet.class_embedding.weight[1] = value
    assert tiny_pipe([3], 2, solver, generator=generator()).images
    with pytest.raises(ValueError, match=rf"1 of 2 samples are not finite after 2 steps of '{solver}'.*: 5 \(5\)"):
        tiny_pipe([3, 5], 2, solver, generator=generator())
    with pytest.raises(ValueError, match=r"samples are not finite.*3 \(three\), 5 \(5\)"):
        tiny_pipe.interpolate(3, 5, [0.5, 1.0], num_inference_steps=2, solver=solver)


def test_a_compiled_unet_is_saved_with_its_adapters(adapters, tiny_pipe, tmp_path):
    tiny_pipe.load_adapter(adapters / "class_7")
    tiny_pipe.unet = torch.compile(tiny_pipe.unet, backend="eager")
    tiny_pipe.save_pretrained(tmp_path / "saved")
    again = FunLoraPipeline.from_pretrained(tmp_path / "saved")
    images = [pipe([7, 3], 2, generator=generator(), output_type="np").images for pipe in (tiny_pipe, again)]
    np.testing.assert_allclose(*images, atol=1e-5)


def test_a_second_pipeline_of_the_same_unet_leaves_the_first_alone(adapters, tiny_pipe):
    tiny_pipe.load_adapter(adapters / "class_7")
    before = tiny_pipe([7, 3], 2, generator=generator(), output_type="np").images
    other = FunLoraPipeline(**tiny_pipe.components)
    with pytest.raises(ValueError, match="has the adapters bank0 of another pipeline"):
        other.load_adapter(adapters / "class_9")
    np.testing.assert_array_equal(tiny_pipe([7, 3], 2, generator=generator(), output_type="np").images, before)
    assert other.classes == {3: "three", 5: "5"}
    own = FunLoraPipeline(copy.deepcopy(make_tiny_unet()), tiny_pipe.scheduler, class_ids=[3, 5])
    own.load_adapter(adapters / "class_9")
    tiny_pipe.unload_adapter(7)
    other.load_adapter(adapters / "class_9")
    images = [pipe([9, 3], 2, generator=generator(), output_type="np").images for pipe in (own, other)]
    np.testing.assert_allclose(*images, atol=1e-6)


def test_a_replaced_unet_is_taken_up_or_refused(adapters, tiny_pipe):
    tiny_pipe.unet = make_tiny_unet()
    tiny_pipe.load_adapter(adapters / "class_7")
    expected = tiny_pipe([7], 2, generator=generator(), output_type="np").images
    assert tiny_pipe._adapters.model is tiny_pipe.unet
    tiny_pipe.unet = make_tiny_unet()
    for use in (
        lambda: tiny_pipe([7], 2),
        lambda: tiny_pipe.load_adapter(adapters / "class_9"),
        lambda: tiny_pipe.merged_unet(7),
        lambda: tiny_pipe.save_pretrained(adapters.parent / "saved"),
    ):
        with pytest.raises(ValueError, match="`unet` was replaced after adapters were loaded"):
            use()
    tiny_pipe.unload_adapter(7)
    tiny_pipe.load_adapter(adapters / "class_7")
    np.testing.assert_array_equal(tiny_pipe([7], 2, generator=generator(), output_type="np").images, expected)


BAD_CALLS = [
    ({"generator": [generator()]}, "`generator` is a list of 1, expected one for each of 2 images"),
    ({"generator": [generator() for _ in range(3)]}, "`generator` is a list of 3"),
    ({"class_labels": [3, 5.5]}, r"`class_labels` has 5\.5"),
    ({"class_labels": torch.tensor([3.0, 4.9])}, r"`class_labels` has 4\.9"),
    ({"class_labels": [True, 3]}, "`class_labels` has True"),
    ({"class_labels": [float("nan"), 3]}, "`class_labels` has nan"),
    ({"class_labels": [float("inf"), 3]}, "`class_labels` has inf"),
    ({"class_labels": [None, 3]}, "`class_labels` has None"),
    # A set has no order in which images could come.
    ({"class_labels": {"three", "5"}}, "expected a list: images come in the order asked"),
    ({"class_labels": {3: "three"}}, "expected a list: images come in the order asked"),
    ({"class_labels": torch.eye(2)}, r"`class_labels` has the shape \(2, 2\), expected one dimension"),
    ({"num_inference_steps": 2.5}, "`num_inference_steps`"),
    ({"num_inference_steps": True}, "`num_inference_steps`"),
    ({"num_inference_steps": 0}, "`num_inference_steps`"),
]


@pytest.mark.parametrize(("changes", "text"), BAD_CALLS)
def test_arguments_of_a_call_are_acted_on_or_refused(changes, text, tiny_pipe):
    with pytest.raises(ValueError, match=text):
        tiny_pipe(**{"class_labels": [3, 5], "num_inference_steps": 2, **changes})


@pytest.mark.parametrize("sigma", [float("nan"), -0.1, 1.5, [0.5, 2.0]])
def test_sigma_lies_between_data_and_noise(sigma, tiny_pipe):
    with pytest.raises(ValueError, match="`sigma` is"):
        tiny_pipe.predict_velocity(torch.zeros(2, 1, 8, 8), torch.tensor(sigma), [3, 5])


def test_saving_refuses_what_would_lose_adapters_or_could_not_be_read(adapters, tiny_pipe, tmp_path):
    tiny_pipe.load_adapter(adapters / "class_7")
    for arguments in ({"safe_serialization": False}, {"push_to_hub": True, "repo_id": "user/x"}):
        with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
            tiny_pipe.save_pretrained(tmp_path / "saved", **arguments)
    with pytest.raises(ValueError, match="`safe_serialization`"):
        tiny_pipe.save_pretrained(tmp_path / "saved", False)
    assert not (tmp_path / "saved").exists()


def test_pipelines_made_of_another_share_its_adapters(pipe, adapters):
    before = pipe([7, 3, 9], 2, generator=generator(), output_type="np").images
    other = FunLoraPipeline.from_pipe(pipe)
    assert other.classes == pipe.classes == {3: "three", 5: "5", 7: "seven", 9: "9"}
    for one in (other, pipe):
        np.testing.assert_array_equal(one([7, 3, 9], 2, generator=generator(), output_type="np").images, before)
    other.unload_adapter(9)
    assert 9 not in pipe.classes
    pipe.load_adapter(adapters / "class_9")
    np.testing.assert_array_equal(other([7, 3, 9], 2, generator=generator(), output_type="np").images, before)


def to_another_precision_and_back(pipe: FunLoraPipeline) -> None:
    pipe.to(torch.float64)
    pipe([7], 1)
    pipe.to(torch.float32)


@pytest.mark.parametrize(
    "use",
    [
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        lambda pipe: pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
        to_another_precision_and_back,
        lambda pipe: torch.inference_mode()(pipe)([7], 1),
        lambda pipe: pipe.enable_attention_slicing(),
        lambda pipe: pipe.reset_device_map(),
    ],
    ids=["model_offload", "group_offload", "to", "inference_mode", "slicing", "device_map"],
)
def test_idioms_of_diffusers_keep_adapters(use, pipe, adapters, tmp_path):
    """Those loaded before as after, and in a folder that is saved then."""
    before = pipe([7, 3, 9], 2, generator=generator(), output_type="np").images
    pipe.unload_adapter(9)
    use(pipe)
    pipe.load_adapter(adapters / "class_9")
    np.testing.assert_array_equal(pipe([7, 3, 9], 2, generator=generator(), output_type="np").images, before)
    pipe.save_pretrained(tmp_path / "saved")
    again = FunLoraPipeline.from_pretrained(tmp_path / "saved")
    assert again.classes == pipe.classes
    np.testing.assert_array_equal(again([7, 3, 9], 2, generator=generator(), output_type="np").images, before)


def test_the_pipeline_s_folder_is_not_loaded_as_another_pipeline(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    with pytest.raises(AttributeError, match="FunLoraPipeline"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_names_that_look_alike_are_one(tiny_unet):
    composed, decomposed = "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}"
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = FunLoraPipeline(tiny_unet, scheduler, class_ids=[3, 5], id2label={3: composed})
    images = [pipe(name, 1, generator=generator(), output_type="np").images for name in (3, composed, decomposed)]
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_array_equal(images[0], images[2])
    with pytest.raises(ValueError, match="is used for two classes"):
        FunLoraPipeline(tiny_unet, scheduler, class_ids=[3, 5], id2label={3: composed, 5: decomposed})


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        ({"class_ids": [3.7, 5]}, "not whole numbers"),
        ({"class_ids": [True, 5]}, "not whole numbers"),
        ({"class_ids": [3, 5], "id2label": {3: None}}, "3 has no text for a name"),
        ({"class_ids": [3, 5], "id2label": {3: " "}}, "3 has no text for a name"),
        (
            {"class_ids": [3, 5], "id2label": {3: "three", 9: "nine"}},
            r"`id2label` names \[9\], expected ids of the base's",
        ),
    ],
)
def test_classes_are_taken_as_they_are_or_refused(classes, text, tiny_unet):
    with pytest.raises(ValueError, match=text):
        FunLoraPipeline(tiny_unet, FlowMatchEulerDiscreteScheduler(), **classes)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(),
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=100),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    ],
)
def test_a_scheduler_put_in_later_is_checked_too(scheduler, tiny_pipe):
    tiny_pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=r"`scheduler[.`]"):
        tiny_pipe([3], 1)


def test_dropout_never_acts_on_samples():
    torch.manual_seed(0)
    unet = UNet2DModel(**{**TINY_UNET, "dropout": 0.5, "num_class_embeds": 2}).train()
    pipe = FunLoraPipeline(unet, FlowMatchEulerDiscreteScheduler())
    images = [pipe([0], 1, generator=generator(), output_type="np").images for _ in range(2)]
    np.testing.assert_array_equal(*images)
    assert unet.training


def test_an_embedding_of_times_is_refused():
    unet = UNet2DModel(**{**TINY_UNET, "num_class_embeds": 2, "class_embed_type": "timestep"})
    with pytest.raises(ValueError, match=r"`unet.config.class_embed_type` is 'timestep', expected None"):
        FunLoraPipeline(unet, FlowMatchEulerDiscreteScheduler())


def test_a_unet_without_a_size_is_named():
    unet = UNet2DModel(**{**TINY_UNET, "sample_size": None, "num_class_embeds": 2})
    with pytest.raises(ValueError, match=r"`unet.config.sample_size` is None"):
        FunLoraPipeline(unet, FlowMatchEulerDiscreteScheduler())([0], 1)


@pytest.mark.parametrize("labels", [[3], [3, 5, 3]])
def test_velocities_have_a_label_for_each_sample(labels, tiny_pipe):
    with pytest.raises(
        ValueError, match=rf"`class_labels` has {len(labels)} classes, expected one for each of 2 samples"
    ):
        tiny_pipe.predict_velocity(torch.zeros(2, 1, 8, 8), torch.tensor(0.5), labels)


def test_velocities_of_whole_numbers_are_refused(tiny_pipe):
    with pytest.raises(ValueError, match=r"`sample` is of torch.int64"):
        tiny_pipe.predict_velocity(torch.zeros(1, 1, 8, 8, dtype=torch.int64), torch.tensor(0.5), [3])


def test_adapters_of_an_earlier_save_are_named(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    pipe.unload_adapter(9)
    with pytest.warns(UserWarning, match=r"adapters' also has class_9, which this pipeline does not have"):
        pipe.save_pretrained(tmp_path)


def test_weights_that_are_not_finite_are_neither_saved_nor_merged(tiny_pipe, tmp_path):
    with torch.no_grad():
        tiny_pipe.unet.conv_out.weight[0, 0, 0, 0] = torch.inf
    problem = "- conv_out.weight: found NaN or infinity"
    with pytest.raises(ValueError, match=f"The base cannot be saved:\n{problem}"):
        tiny_pipe.save_pretrained(tmp_path / "base")
    assert not (tmp_path / "base").exists()
    label = tiny_pipe.base_classes[0]
    with pytest.raises(ValueError, match=f"Class {label} cannot be merged:\n{problem}"):
        merge_class(tiny_pipe, label)
