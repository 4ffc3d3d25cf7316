"""Hooks of other libraries on the base's layers, offloading and casting: outputs are those without hooks."""

from __future__ import annotations

import accelerate
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.hooks import apply_group_offloading
from peft import PeftModel
from peft_models import (
    CONDITION_UNET,
    PLAIN,
    UNET,
    adapter_parameters,
    adapter_state,
    close,
    differ,
    funlora_layers,
    output,
)
from runs import make_tiny_unet, write_adapters

from funlora_hf import FunLoraPipeline, hotswap_adapter, save_adapter


pytestmark = pytest.mark.usefixtures("nan_in_empty_tensors")
CPU = torch.device("cpu")


def in_groups(model, folder=None, **options):
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    options = {"offload_type": "leaf_level", "offload_to_disk_path": folder, **options}
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **options)


def in_blocks(model, folder):
    in_groups(model, str(folder), offload_type="block_level", num_blocks_per_group=1)


OFFLOADS = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: accelerate.disk_offload(model, str(folder), execution_device=CPU),
    "groups": lambda model, folder: in_groups(model),
    "groups on disk": lambda model, folder: in_groups(model, str(folder)),
}
offloads = pytest.mark.parametrize("offload", OFFLOADS)
orders = pytest.mark.parametrize("order", ["before", "after"])


def offloaded(kind, offload, order, folder, *adapters, **config):
    """A model with adapters that were added before or after it was offloaded."""
    base = kind.base()
    if order == "after":
        OFFLOADS[offload](base, folder)
    model = kind.model(*adapters, base=base, **config)
    if order == "before":
        OFFLOADS[offload](model, folder)
    return model


def is_refused(call, error=ValueError):
    """Whether a call raises an error that says that the model is offloaded."""
    try:
        call()
    except error as raised:
        if "offload" in str(raised):
            return True
        raise
    return False


# Offloading


@pytest.mark.parametrize(
    ("kind", "config"),
    [(UNET, {}), (PLAIN, {"operation": "mul-add"}), (PLAIN, {"class_embedding": None})],
    ids=["unet", "modules", "no class vector"],
)
@offloads
@orders
def test_offloaded_model_gives_the_outputs_of_one_that_is_not(kind, config, offload, order, tmp_path):
    plain, model = kind.model("x", "y", **config), offloaded(kind, offload, order, tmp_path, "x", "y", **config)
    inputs, names = kind.batch(5), ["x", "y", "__base__", "x", "y"]
    expected = kind.run(plain, inputs)
    assert differ(expected, kind.run(kind.base(), inputs))
    for _ in range(2):
        close(kind.run(model, inputs), expected)
    close(kind.run(model, inputs, adapter_names=names), kind.run(plain, inputs, adapter_names=names))
    with model.disable_adapter():
        close(kind.run(model, inputs), kind.run(kind.base(), inputs))
    for active in (["y"], ["x", "y"]):
        for each in (plain, model):
            each.base_model.set_adapter(active)
        close(kind.run(model, inputs), kind.run(plain, inputs))


@offloads
@orders
def test_scale_of_an_offloaded_adapter(offload, order, tmp_path):
    plain, model = PLAIN.model(), offloaded(PLAIN, offload, order, tmp_path)
    for each in (plain, model):
        for layer in funlora_layers(each):
            layer.set_scale("default", 0.3)
    close(PLAIN.run(model), PLAIN.run(plain))


@offloads
def test_second_adapter_of_an_offloaded_model(offload, tmp_path):
    def second(model):
        torch.manual_seed(7)
        model.add_adapter("y", PLAIN.config())
        model.set_adapter("y")
        return PLAIN.run(model)

    close(second(offloaded(PLAIN, offload, "before", tmp_path, "x")), second(PLAIN.model("x")))


@offloads
@orders
def test_hotswap_in_an_offloaded_model_takes_effect_or_is_refused(offload, order, tmp_path):
    other = PLAIN.model(seed=9)
    model = offloaded(PLAIN, offload, order, tmp_path)
    PLAIN.run(model)
    if not is_refused(lambda: hotswap_adapter(model, adapter_state(other))):
        close(PLAIN.run(model), PLAIN.run(other))


@offloads
@orders
def test_merging_under_offloading_is_right_or_refused(offload, order, tmp_path):
    expected, base = PLAIN.run(PLAIN.model()), PLAIN.run(PLAIN.base())
    model = offloaded(PLAIN, offload, order, tmp_path)
    if is_refused(model.merge_adapter):
        assert not any(layer.merged for layer in funlora_layers(model))
    else:
        close(PLAIN.run(model), expected)
        model.unmerge_adapter()
    close(PLAIN.run(model), expected)
    with model.disable_adapter():
        close(PLAIN.run(model), base)


def gradients(model):
    """Of the adapter's parameters; the model in training mode."""
    output(model.train()(**PLAIN.batch())).square().mean().backward()
    return {name: p.grad for name, p in adapter_parameters(model).items()}


@offloads
@orders
def test_training_an_offloaded_model_gives_the_gradients_or_an_error(offload, order, tmp_path):
    expected = gradients(PLAIN.model())
    model = offloaded(PLAIN, offload, order, tmp_path)
    found = {}
    if not is_refused(lambda: found.update(gradients(model)), RuntimeError):
        assert list(found) == list(expected)
        for name, gradient in found.items():
            assert gradient is not None, name
            close(gradient, expected[name])


@offloads
@orders
def test_delta_weight_of_an_offloaded_layer(offload, order, tmp_path):
    plain, model = PLAIN.model(), offloaded(PLAIN, offload, order, tmp_path)
    for layer, expected in zip(funlora_layers(model), funlora_layers(plain), strict=True):
        delta = layer.get_delta_weight("default")
        assert delta.requires_grad
        close(delta.detach(), expected.get_delta_weight("default").detach())
    close(PLAIN.run(model), PLAIN.run(plain))


@orders
def test_blocks_on_disk(order, tmp_path):
    """What is offloaded with the block around it works, or says so before it is wrong."""
    base, other = PLAIN.base(), PLAIN.model(seed=9)
    if order == "after":
        in_blocks(base, tmp_path)
    model = PLAIN.model(base=base)
    if order == "before":
        in_blocks(model, tmp_path)
    expected = PLAIN.run(PLAIN.model())
    for refused, error in (
        (model.merge_adapter, ValueError),
        (lambda: model.delete_adapter("default"), ValueError),
        (lambda: gradients(model), RuntimeError),
        (lambda: save_adapter(model, tmp_path / "adapter"), ValueError),
    ):
        assert is_refused(refused, error)
        close(PLAIN.run(model.eval()), expected)
    assert not (tmp_path / "adapter").exists()
    hotswap_adapter(model, adapter_state(other))
    for _ in range(2):
        close(PLAIN.run(model), PLAIN.run(other))
    for each in (model, other):
        torch.manual_seed(7)
        each.add_adapter("y", PLAIN.config())
        each.set_adapter("y")
    close(PLAIN.run(model), PLAIN.run(other))
    for layer, plain in zip(funlora_layers(model), funlora_layers(other), strict=True):
        close(layer.get_delta_weight("default"), plain.get_delta_weight("default"))
    close(PLAIN.run(model), PLAIN.run(other))


# The pipeline


CALLS = ((7, 3, 8), (9,), (9, 8), (5,))


def make_pipe():
    pipe = FunLoraPipeline(make_tiny_unet(), FlowMatchEulerDiscreteScheduler(), class_ids=[3, 5])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    return make_pipe()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders of the adapters of the classes 7, 8 and 9."""
    run = write_adapters(make_pipe(), tmp_path_factory.mktemp("run"), classes=[7, 8, 9], base=False)
    return {label: run / "adapters" / f"class_{label}" for label in (7, 8, 9)}


@pytest.fixture(scope="module")
def images(adapters):
    """What a pipeline that is not offloaded draws."""
    pipe = make_pipe()
    load(pipe, adapters)
    return {labels: draw(pipe, labels) for labels in CALLS}


def load(pipe, adapters):
    for label, folder in adapters.items():
        pipe.load_adapter(folder, class_label=label)


def draw(pipe, labels):
    generator = torch.Generator().manual_seed(0)
    return pipe(list(labels), num_inference_steps=1, solver="euler", generator=generator, output_type="pt").images


def check(pipe, images):
    for labels, expected in images.items():
        close(draw(pipe, labels), expected)


@offloads
@pytest.mark.parametrize("order", ["loaded", "drawn", "after"])
def test_offloaded_pipeline_draws_the_images_of_one_that_is_not(offload, order, pipe, adapters, images, tmp_path):
    if order != "after":
        load(pipe, adapters)
    if order == "drawn":
        draw(pipe, (7, 8))
    OFFLOADS[offload](pipe.unet, tmp_path / "offload")
    if order == "after":
        load(pipe, adapters)
    check(pipe, images)
    pipe.unload_adapter(9)
    pipe.load_adapter(adapters[9], class_label=9)
    check(pipe, images)


def test_a_pipeline_offloaded_in_blocks_on_disk(pipe, adapters, images, tmp_path):
    load(pipe, adapters)
    in_blocks(pipe.unet, tmp_path / "offload")
    check(pipe, images)


@offloads
def test_offloaded_pipeline_after_it_was_moved(offload, pipe, adapters, images, tmp_path):
    """As on a GPU: `pipe.to("cuda")`, images, then `pipe.enable_sequential_cpu_offload()`."""
    load(pipe, adapters)
    draw(pipe, (7, 8))
    pipe.unet.to(torch.float64).to(torch.float32)
    OFFLOADS[offload](pipe.unet, tmp_path / "offload")
    check(pipe, images)


@pytest.mark.parametrize("order", ["before", "after"])
def test_sequential_cpu_offload_of_the_pipeline(order, pipe, adapters, images):
    stock = DDPMPipeline(make_tiny_unet(), DDPMScheduler())
    try:
        stock.enable_sequential_cpu_offload(device="cpu")
        stock.unet(torch.zeros(1, 1, 8, 8), 0, torch.tensor([0]))
    except (RuntimeError, TypeError, ValueError) as error:
        pytest.skip(f"a pipeline without adapters cannot be offloaded from the CPU either: {error}"[:150])
    if order == "before":
        load(pipe, adapters)
    pipe.enable_sequential_cpu_offload(device="cpu")
    if order == "after":
        load(pipe, adapters)
    check(pipe, images)


# Casting


dtypes = pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16], ids=["float8", "bfloat16"])


def cast(model, dtype):
    model.enable_layerwise_casting(storage_dtype=dtype, compute_dtype=torch.float32)


def error_of_base(kind, dtype):
    """By how much casting changes the output of the model without adapters."""
    base = kind.base()
    expected = kind.run(base)
    cast(base, dtype)
    return (kind.run(base) - expected).abs().max().item()


def with_casting(kind, dtype, order, *adapters, **config):
    base = kind.base()
    if order == "after":
        cast(base, dtype)
    model = kind.model(*adapters, base=base, **config)
    if order == "before":
        cast(model.get_base_model(), dtype)
    return model


@pytest.mark.parametrize("kind", [UNET, CONDITION_UNET], ids=lambda kind: kind.name)
@dtypes
@orders
def test_outputs_with_casting_are_as_near_as_those_of_the_base(kind, dtype, order):
    error, plain, model = error_of_base(kind, dtype), kind.model("x", "y"), with_casting(kind, dtype, order, "x", "y")
    for options in ({}, {"adapter_names": ["y", "__base__", "x"]}):
        assert (kind.run(model, **options) - kind.run(plain, **options)).abs().max() < 2 * error
    with model.disable_adapter():
        assert (kind.run(model) - kind.run(kind.base())).abs().max() < 1.01 * error
    assert {p.dtype for p in adapter_parameters(model, "x").values()} == {torch.float32}


@dtypes
@orders
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_with_casting(dtype, order, safe_merge):
    error, expected = error_of_base(UNET, dtype), UNET.run(UNET.model())
    model = with_casting(UNET, dtype, order)
    before = UNET.run(model)
    model.merge_adapter(safe_merge=safe_merge)
    # The merged weight is rounded, too.
    assert (UNET.run(model) - expected).abs().max() < 3 * error
    model.unmerge_adapter()
    assert torch.equal(UNET.run(model), before)


@dtypes
@orders
def test_delta_weight_with_casting(dtype, order):
    plain, model = UNET.model(operation="mul-add"), with_casting(UNET, dtype, order, operation="mul-add")
    for layer, other in zip(funlora_layers(model), funlora_layers(plain), strict=True):
        expected = other.get_delta_weight("default").detach()
        largest = max(expected.abs().max(), other.get_base_layer().weight.abs().max()).item()
        found = layer.get_delta_weight("default").detach().float()
        close(found, expected, 2 * torch.finfo(dtype).eps * largest)
