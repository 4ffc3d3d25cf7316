"""One model for several users: threads, inference mode and refused adapters leave nothing of theirs to others."""

from __future__ import annotations

import sys
import threading

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModel, inject_adapter_in_model
from peft_models import (
    PLAIN,
    UNET,
    adapter_parameters,
    adapter_state,
    close,
    differ,
    funlora_layers,
    hooks,
    kinds,
    output,
)
from runs import write_adapters

from funlora_hf import Guidance, cached_weights, hotswap_adapter, mixed_batch


pytestmark = pytest.mark.filterwarnings(
    "ignore:Adapter name '' should not be contained", "ignore:Already found a `peft_config`"
)


# Threads


def in_threads(*works):
    """Run functions at once, each in a thread; raise what one of them raises."""
    errors = []

    def guarded(work):
        try:
            work()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


@pytest.fixture
def _fast_switches():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_fast_switches")
@kinds
def test_threads_get_the_results_of_their_own_mixed_batches(kind):
    model, inputs = kind.model("x", "y"), kind.batch(3)
    names = (["x", "y", "x"], ["y", "__base__", "y"], ["x"] * 3)
    expected = [kind.run(model, inputs, adapter_names=of_thread) for of_thread in names]
    model.set_adapter("y")
    plain = kind.run(model, inputs)

    def mixed(index):
        for _ in range(8):
            with mixed_batch(model, names[index]):
                assert torch.equal(kind.run(model, inputs), expected[index])

    def without():
        for _ in range(8):
            assert torch.equal(kind.run(model, inputs), plain)

    in_threads(*(lambda index=index: mixed(index) for index in range(3)), without)
    assert hooks(model) == 0


def test_forward_goes_on_while_another_thread_leaves_its_mixed_batch():
    """torch has listed a layer's hooks before it calls the first of them, and calls those that are gone, too."""
    model = PLAIN.model("x", "y")
    expected, start, end = PLAIN.run(model), threading.Event(), threading.Event()

    def other():
        with mixed_batch(model, ["y"] * 3):
            start.set()
            assert reached.wait(60)
        end.set()

    def wait(*args):
        reached.set()
        assert end.wait(60)

    reached = threading.Event()
    layer = funlora_layers(model)[-1]
    handle = layer.register_forward_pre_hook(wait)
    found = []

    def forward():
        assert start.wait(60)
        try:
            found.append(PLAIN.run(model))
        finally:
            reached.set()

    in_threads(other, forward)
    handle.remove()
    assert torch.equal(found[0], expected)


def checkpointed(*adapters):
    model = PLAIN.model("x", "y").train()
    model.get_base_model().enable_gradient_checkpointing()
    model.set_requires_grad(list(adapters))
    return model


def gradients(model, *adapters):
    return {name: p.grad for adapter in adapters for name, p in adapter_parameters(model, adapter).items()}


def assert_gradients(found, expected):
    assert list(found) == list(expected)
    for name, gradient in found.items():
        assert gradient is not None, name
        close(gradient, expected[name])


def loss(model):
    return output(model(**PLAIN.batch(3))).square().sum()


def test_backward_in_another_thread_repeats_the_forward_with_the_same_names():
    names = ["x", "y", "x"]
    model, other = checkpointed("x", "y"), checkpointed("x", "y")
    with mixed_batch(model, names):
        loss(model).backward()
    with mixed_batch(other, names):
        value = loss(other)
        in_threads(value.backward)
    assert_gradients(gradients(other, "x", "y"), gradients(model, "x", "y"))


def test_threads_that_train_one_model_with_checkpoints_in_mixed_batches():
    def train(model, adapter, barrier=None):
        with mixed_batch(model, [adapter] * 3):
            value = loss(model)
            if barrier is not None:
                barrier.wait()
            value.backward()
            if barrier is not None:
                barrier.wait()

    expected = {}
    for adapter in "xy":
        alone = checkpointed("x", "y")
        train(alone, adapter)
        expected |= gradients(alone, adapter)
    model, barrier = checkpointed("x", "y"), threading.Barrier(2, timeout=60)
    in_threads(lambda: train(model, "x", barrier), lambda: train(model, "y", barrier))
    assert_gradients(gradients(model, "x", "y"), expected)


def test_mixed_batch_within_another_takes_its_place():
    model = PLAIN.model("x", "y")
    inputs = PLAIN.batch(3)
    expected = {name: PLAIN.run(model, inputs, adapter_names=[name] * 3) for name in "xy"}
    with mixed_batch(model, ["x"] * 3):
        with mixed_batch(model, ["y"] * 3):
            assert torch.equal(PLAIN.run(model, inputs), expected["y"])
        assert torch.equal(PLAIN.run(model, inputs), expected["x"])


@pytest.fixture
def pipe(tiny_pipe, tmp_path):
    run = write_adapters(tiny_pipe, tmp_path / "run", classes=[7, 8], base=False)
    for label in (7, 8):
        tiny_pipe.load_adapter(run / "adapters" / f"class_{label}", class_label=label)
    return tiny_pipe


def draw(pipe, labels, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return pipe(list(labels), num_inference_steps=2, generator=generator, output_type="pt", **kwargs).images


@pytest.mark.usefixtures("_fast_switches")
def test_threads_draw_their_own_images_from_one_pipeline(pipe):
    calls = ((7, 7, 7), (8, 3), (5,))
    expected = {labels: draw(pipe, labels) for labels in calls}

    def work(labels):
        for _ in range(6):
            assert torch.equal(draw(pipe, labels), expected[labels])

    in_threads(*(lambda labels=labels: work(labels) for labels in calls))


def test_call_within_a_call_is_refused(pipe):
    expected = draw(pipe, [7])

    def score(images):
        draw(pipe, [8])
        return images.sum()

    with pytest.raises(RuntimeError, match="at work in this thread"):
        draw(pipe, [7], guidance=Guidance(score, scale=1.0))
    assert torch.equal(draw(pipe, [7]), expected)
    assert hooks(pipe.unet) == 0


# Inference mode


def trained(kind, model):
    """The output after two steps."""
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        output(model(**kind.batch())).square().mean().backward()
        optimizer.step()
    return kind.run(model.eval())


@pytest.mark.parametrize("work", ["added", "loaded", "sampled", "swapped", "scaled", "merged", "replaced"])
@pytest.mark.parametrize("kind", [UNET, PLAIN], ids=lambda kind: kind.name)
def test_what_was_done_in_inference_mode_can_be_trained_outside(kind, work, tmp_path):
    state = adapter_state(kind.model(seed=9))
    if work == "loaded":
        kind.model("x", "y").save_pretrained(tmp_path)

    def act(model_base):
        if work == "loaded":
            model = PeftModel.from_pretrained(model_base, tmp_path / "x", adapter_name="x", is_trainable=True)
            model.load_adapter(tmp_path / "y", "y")
            model.set_adapter("x")  # before 0.21, PEFT freezes it when another is loaded
            return model.eval()
        model = kind.model("x", "y", base=model_base)
        if work == "sampled":
            with cached_weights(model):
                kind.run(model)
            with mixed_batch(model, ["x", "y", "__base__"]):
                model(**kind.batch(3))
        if work == "swapped":
            hotswap_adapter(model, state, "x")
        if work == "scaled":
            for layer in funlora_layers(model):
                layer.set_scale("x", 0.5)
        if work == "merged":
            model.merge_adapter()
            model.unmerge_adapter()
        if work == "replaced":
            model.delete_adapter("x")
            torch.manual_seed(4)
            model.add_adapter("x", kind.config())
            model.set_adapter("x")
        model(**kind.batch())
        return model

    base = kind.base()
    expected = trained(kind, act(kind.base()))
    with torch.inference_mode():
        model = act(base)
    assert torch.equal(trained(kind, model), expected)


@pytest.mark.parametrize("work", ["cached", "merged"])
def test_gradient_of_an_input_after_inference_mode(work):
    """As guidance takes it, through weights that were computed in inference mode."""
    model = PLAIN.model()
    expected = input_gradient(model)
    with cached_weights(model):
        with torch.inference_mode():
            if work == "merged":
                model.merge_adapter()
            model(**PLAIN.batch())
        close(input_gradient(model), expected)


def input_gradient(model):
    inputs = PLAIN.batch()
    inputs["sample"].requires_grad_()
    output(model(**inputs)).sum().backward()
    return inputs["sample"].grad


# Refused adapters

# Name of the adapter, what the error says, changes to a config that fits.
REFUSED = {
    "a dot in the name": ("a.b", "a.b.*without dots", {}),
    "no name": ("", "without dots", {}),
    "a module in the middle": ("z", "not supported", None),
    "no such class embedding": ("z", "no such module", {"class_embedding": "nothing"}),
    "no such module": (
        "z",
        "not found|No modules were targeted",
        {"target_modules": ["nothing"], "class_embedding": None},
    ),
}
UNSUPPORTED = {"UNet2DModel": "conv_norm_out", "UNet2DConditionModel": "norm1", "modules": "mlp.1"}
ADDING = {
    "add_adapter": lambda model, name, config: model.add_adapter(name, config),
    "inject": lambda model, name, config: inject_adapter_in_model(config, model.get_base_model(), name),
}


def refused(kind, why):
    """Name, what the error says, and config of an adapter that cannot be added."""
    name, text, changes = REFUSED[why]
    if changes is None:
        # After layers that can be adapted, and before others.
        targets = kind.targets.get("target_modules", ["conv1", "conv2"])
        changes = {"target_modules": [*targets, UNSUPPORTED[kind.name]]}
    return name, text, kind.config(**changes)


@kinds
@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("adding", ADDING)
def test_refused_adapter_leaves_nothing_behind(kind, why, adding):
    if (why, adding) == ("no such module", "add_adapter") and Version(peft.__version__) < Version("0.21"):
        pytest.skip("PEFT before 0.21 takes a second adapter that matches no module")
    model = kind.model("x", "y")
    name, text, config = refused(kind, why)
    before, parameters, wrapped = kind.run(model), traits(model), modules(model)
    with pytest.raises(ValueError, match=text):
        ADDING[adding](model, name, config)
    assert modules(model) == wrapped
    assert traits(model) == parameters
    assert list(model.peft_config) == ["x", "y"]
    assert model.active_adapters == ["x"]
    assert not any(name in layer.settings for layer in funlora_layers(model))
    assert torch.equal(kind.run(model), before)
    with pytest.raises(ValueError, match="non-existing"), mixed_batch(model, [name] * 3):
        pass
    if "." not in name and name:
        torch.manual_seed(1)
        model.add_adapter(name, kind.config())
        model.set_adapter(name)
        assert differ(kind.run(model), kind.run(kind.base()))


@kinds
@pytest.mark.parametrize("why", REFUSED)
def test_refused_first_adapter_leaves_the_base_as_it_was(kind, why):
    base = kind.base()
    name, text, config = refused(kind, why)
    before, wrapped, parameters = kind.run(base), modules(base), traits(base)
    with pytest.raises(ValueError, match=text):
        inject_adapter_in_model(config, base, name)
    assert modules(base) == wrapped
    assert traits(base) == parameters
    assert not hasattr(base, "peft_config")
    assert torch.equal(kind.run(base), before)


def modules(model):
    return [(name, type(module)) for name, module in model.named_modules()]


def traits(model):
    return [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
