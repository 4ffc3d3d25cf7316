"""Hooks of other libraries on the base's layers, offloading and casting: outputs are those without hooks."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.hooks import apply_group_offloading
from peft import PeftModel
from peft_models import (
    CONDITION_UNET,
    UNET,
    adapter_parameters,
    adapter_state,
    close,
    differ,
    funlora_layers,
    kinds,
    output,
)
from runs import make_tiny_unet, write_adapters

from funlora_hf import hotswap_adapter


CPU = torch.device("cpu")


def in_groups(model, folder=None):
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    apply_group_offloading(
        model, onload_device=CPU, offload_device=CPU, offload_type="leaf_level", offload_to_disk_path=folder
    )


OFFLOADS = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: accelerate.disk_offload(model, str(folder), execution_device=CPU),
    "groups": lambda model, folder: in_groups(model),
    "groups on disk": lambda model, folder: in_groups(model, str(folder)),
}
offloads = pytest.mark.parametrize("offload", OFFLOADS)
orders = pytest.mark.parametrize("order", ["before", "after"])


@pytest.fixture(autouse=True)
def _nan_in_empty_tensors():
    """Weights that are read while they are offloaded are NaN, not by chance the right ones."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def offloaded(kind, offload, order, folder, *adapters, **config):
    """A model with adapters that were added before or after it was offloaded."""
    base = kind.base()
    if order == "after":
        OFFLOADS[offload](base, folder)
    model = kind.model(*adapters, base=base, **config)
    if order == "before":
        OFFLOADS[offload](model, folder)
    return model


# Offloading


@kinds
@offloads
@orders
@pytest.mark.parametrize("class_embedding", ["class_embedding", None], ids=["class vector", "no class vector"])
def test_offloaded_model_gives_the_outputs_of_one_that_is_not(kind, offload, order, class_embedding, tmp_path):
    plain = kind.model("x", "y", class_embedding=class_embedding, operation="mul-add")
    model = offloaded(
        kind, offload, order, tmp_path, "x", "y", class_embedding=class_embedding, operation="mul-add"
    )
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
    plain, model = UNET.model(), offloaded(UNET, offload, order, tmp_path)
    for each in (plain, model):
        for layer in funlora_layers(each):
            layer.set_scale("default", 0.3)
    close(UNET.run(model), UNET.run(plain))


@offloads
def test_second_adapter_of_an_offloaded_model(offload, tmp_path):
    def second(model):
        torch.manual_seed(7)
        model.add_adapter("y", UNET.config())
        model.set_adapter("y")
        return UNET.run(model)

    close(second(offloaded(UNET, offload, "before", tmp_path, "x")), second(UNET.model("x")))


@offloads
@orders
def test_hotswap_in_an_offloaded_model_takes_effect_or_is_refused(offload, order, tmp_path):
    other = UNET.model(seed=9)
    model = offloaded(UNET, offload, order, tmp_path)
    UNET.run(model)
    try:
        hotswap_adapter(model, adapter_state(other))
    except (RuntimeError, ValueError) as error:
        assert "offload" in str(error)
    else:
        close(UNET.run(model), UNET.run(other))


@offloads
@orders
def test_merging_under_offloading_is_right_or_refused(offload, order, tmp_path):
    expected, base = UNET.run(UNET.model()), UNET.run(UNET.base())
    model = offloaded(UNET, offload, order, tmp_path)
    try:
        model.merge_adapter()
    except ValueError as error:
        assert "offload" in str(error)
        assert not any(layer.merged for layer in funlora_layers(model))
    else:
        close(UNET.run(model), expected)
        model.unmerge_adapter()
    close(UNET.run(model), expected)
    with model.disable_adapter():
        close(UNET.run(model), base)


def gradients(kind, model):
    """Of the adapter's parameters; the model in training mode."""
    output(model.train()(**kind.batch())).square().mean().backward()
    return {name: p.grad for name, p in adapter_parameters(model).items()}


# diffusers writes other values into weights that autograd needs, so that nothing trains with groups on disk.
@pytest.mark.parametrize("offload", ["cpu", "disk", "groups"])
@kinds
@orders
def test_training_an_offloaded_model_gives_the_gradients_or_an_error(kind, offload, order, tmp_path):
    expected = gradients(kind, kind.model())
    model = offloaded(kind, offload, order, tmp_path)
    try:
        found = gradients(kind, model)
    except (RuntimeError, ValueError) as error:
        assert "offload" in str(error)
        return
    assert list(found) == list(expected)
    for name, gradient in found.items():
        assert gradient is not None, name
        close(gradient, expected[name])


@kinds
@offloads
@orders
def test_delta_weight_of_an_offloaded_layer(kind, offload, order, tmp_path):
    plain, model = kind.model(), offloaded(kind, offload, order, tmp_path)
    for layer, expected in zip(funlora_layers(model), funlora_layers(plain), strict=True):
        delta = layer.get_delta_weight("default")
        assert delta.requires_grad
        close(delta.detach(), expected.get_delta_weight("default").detach())
    close(kind.run(model), kind.run(plain))


# The pipeline


@pytest.fixture
def adapters(tiny_pipe, tmp_path):
    """Folders of the adapters of the classes 7, 8 and 9."""
    run = write_adapters(tiny_pipe, tmp_path / "run", classes=[7, 8, 9], base=False)
    return {label: run / "adapters" / f"class_{label}" for label in (7, 8, 9)}


@pytest.fixture
def images(tiny_pipe, adapters):
    """What a pipeline that is not offloaded draws."""
    pipe = copy.deepcopy(tiny_pipe)
    load(pipe, adapters)
    return {labels: draw(pipe, labels) for labels in CALLS}


CALLS = ((7, 3, 8), (9,), (9, 8), (5,))


def load(pipe, adapters):
    for label, folder in adapters.items():
        pipe.load_adapter(folder, class_label=label)


def draw(pipe, labels):
    generator = torch.Generator().manual_seed(0)
    return pipe(list(labels), num_inference_steps=1, generator=generator, output_type="pt").images


def check(pipe, images):
    for labels, expected in images.items():
        close(draw(pipe, labels), expected)


@offloads
@pytest.mark.parametrize("order", ["loaded", "drawn", "after"])
def test_offloaded_pipeline_draws_the_images_of_one_that_is_not(offload, order, tiny_pipe, adapters, images, tmp_path):
    if order != "after":
        load(tiny_pipe, adapters)
    if order == "drawn":
        draw(tiny_pipe, (7, 8))
    OFFLOADS[offload](tiny_pipe.unet, tmp_path / "offload")
    if order == "after":
        load(tiny_pipe, adapters)
    check(tiny_pipe, images)
    tiny_pipe.unload_adapter(9)
    tiny_pipe.load_adapter(adapters[9], class_label=9)
    check(tiny_pipe, images)


@offloads
def test_offloaded_pipeline_after_it_was_moved(offload, tiny_pipe, adapters, images, tmp_path):
    """As on a GPU: `pipe.to("cuda")`, images, then `pipe.enable_sequential_cpu_offload()`."""
    load(tiny_pipe, adapters)
    draw(tiny_pipe, (7, 8))
    tiny_pipe.unet.to(torch.float64).to(torch.float32)
    OFFLOADS[offload](tiny_pipe.unet, tmp_path / "offload")
    check(tiny_pipe, images)


@pytest.mark.parametrize("order", ["before", "after"])
def test_sequential_cpu_offload_of_the_pipeline(order, tiny_pipe, adapters, images):
    stock = DDPMPipeline(make_tiny_unet(), DDPMScheduler())
    try:
        stock.enable_sequential_cpu_offload(device="cpu")
        stock.unet(torch.zeros(1, 1, 8, 8), 0, torch.tensor([0]))
    except (RuntimeError, TypeError, ValueError) as error:
        pytest.skip(f"a pipeline without adapters cannot be offloaded from the CPU either: {error}"[:150])
    if order == "before":
        load(tiny_pipe, adapters)
    tiny_pipe.enable_sequential_cpu_offload(device="cpu")
    if order == "after":
        load(tiny_pipe, adapters)
    check(tiny_pipe, images)


# Casting


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16], ids=["float8", "bfloat16"])
@pytest.mark.parametrize("kind", [UNET, CONDITION_UNET], ids=lambda kind: kind.name)
@orders
class TestLayerwiseCasting:
    def cast(self, model, dtype):
        model.enable_layerwise_casting(storage_dtype=dtype, compute_dtype=torch.float32)

    def error_of_base(self, kind, dtype):
        base = kind.base()
        expected = kind.run(base)
        self.cast(base, dtype)
        return (kind.run(base) - expected).abs().max().item()

    def model(self, kind, dtype, order, *adapters, **config):
        base = kind.base()
        if order == "after":
            self.cast(base, dtype)
        model = kind.model(*adapters, base=base, **config)
        if order == "before":
            self.cast(model.get_base_model(), dtype)
        return model

    def test_outputs_are_as_near_as_those_of_the_base(self, kind, dtype, order):
        error, plain, model = (
            self.error_of_base(kind, dtype),
            kind.model("x", "y"),
            self.model(kind, dtype, order, "x", "y"),
        )
        names = ["y", "__base__", "x"]
        for options in ({}, {"adapter_names": names}):
            expected = kind.run(plain, **options)
            assert (kind.run(model, **options) - expected).abs().max() < 2 * error
        with model.disable_adapter():
            assert (kind.run(model) - kind.run(kind.base())).abs().max() < 1.01 * error
        assert {p.dtype for p in adapter_parameters(model, "x").values()} == {torch.float32}

    @pytest.mark.parametrize("safe_merge", [False, True])
    def test_merged_and_unmerged(self, kind, dtype, order, safe_merge):
        error, expected = self.error_of_base(kind, dtype), kind.run(kind.model())
        model = self.model(kind, dtype, order)
        before = kind.run(model)
        model.merge_adapter(safe_merge=safe_merge)
        # The merged weight is rounded, too.
        assert (kind.run(model) - expected).abs().max() < 3 * error
        model.unmerge_adapter()
        assert torch.equal(kind.run(model), before)

    def test_delta_weight(self, kind, dtype, order):
        plain, model = kind.model(operation="mul-add"), self.model(kind, dtype, order, operation="mul-add")
        for layer, other in zip(funlora_layers(model), funlora_layers(plain), strict=True):
            expected = other.get_delta_weight("default").detach()
            largest = max(expected.abs().max(), other.get_base_layer().weight.abs().max()).item()
            found = layer.get_delta_weight("default").detach().float()
            close(found, expected, 2 * torch.finfo(dtype).eps * largest)
