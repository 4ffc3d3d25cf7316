"""Inside `cached_weights` each effective weight is computed once; changes take effect, and nothing is kept afterwards."""

import copy
import gc
import io
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft_models import PLAIN, UNET, adapter_parameters, adapter_state, differ, funlora_layers, kinds, output
from runs import write_adapters
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from funlora_hf import AdapterBank, cached_weights, hotswap_adapter, mixed_batch
from funlora_hf.sampling.drawing import draw_samples
from funlora_hf.sampling.guidance import Guidance
from funlora_hf.tuner.layer import FunLoraFactorLayer


@pytest.fixture
def computed(monkeypatch):
    """A list that grows by one for every F computed."""
    calls = []
    original = FunLoraFactorLayer.functional_matrix

    def counted(self, *args):
        calls.append(args)
        return original(self, *args)

    monkeypatch.setattr(FunLoraFactorLayer, "functional_matrix", counted)
    return calls


def factor_layers(model):
    return [layer for layer in funlora_layers(model) if isinstance(layer, FunLoraFactorLayer)]


def without_context(kind, model, **kwargs):
    """The output of a copy of the model, of which nothing is kept."""
    return kind.run(copy.deepcopy(model), **kwargs)


def one_layer(**config):
    """A layer of the plain model, frozen, and an input."""
    layer = factor_layers(PLAIN.model(**config))[0].requires_grad_(False)
    return layer, torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))


# How often weights are computed


@kinds
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_once_inside_and_in_every_forward_outside(kind, mode, computed):
    model, inputs = kind.model(), kind.batch()
    once = len(factor_layers(model))
    with mode():
        first = output(model(**inputs))
        assert len(computed) == once
        assert torch.equal(output(model(**inputs)), first)
        assert len(computed) == 2 * once
        computed.clear()
        with cached_weights(model):
            for _ in range(3):
                assert torch.equal(output(model(**inputs)), first)
        assert len(computed) == once
        assert torch.equal(output(model(**inputs)), first)
        assert len(computed) == 2 * once


@kinds
def test_every_set_of_active_adapters_has_its_weights(kind, computed):
    model = kind.model("x", "y")
    sets = (["x"], ["y"], ["x", "y"], ["x"], ["y"], ["x", "y"])
    with cached_weights(model):
        for names in sets:
            model.base_model.set_adapter(names)
            found = kind.run(model)
            assert torch.equal(found, without_context(kind, model))
        computed.clear()
        for names in sets:
            model.base_model.set_adapter(names)
            kind.run(model)
        assert not computed


def test_any_module_around_the_layers_will_do(computed):
    model = PLAIN.model()
    layers = factor_layers(model)
    for module in (model, model.base_model, model.base_model.model, nn.ModuleList([model])):
        computed.clear()
        with cached_weights(module):
            PLAIN.run(model)
            PLAIN.run(model)
        assert len(computed) == len(layers)
    computed.clear()
    with cached_weights(layers[0]):
        PLAIN.run(model)
        PLAIN.run(model)
    assert len(computed) == 2 * len(layers) - 1


def test_a_model_without_adapters():
    model = PLAIN.base()
    expected = PLAIN.run(model)
    with cached_weights(model):
        assert torch.equal(PLAIN.run(model), expected)


def test_nested_contexts_share(computed):
    model, other = PLAIN.model(), PLAIN.model(seed=5)
    once = len(factor_layers(model))
    with cached_weights(model):
        PLAIN.run(model)
        with cached_weights(model), cached_weights(other):
            PLAIN.run(model)
            assert len(computed) == once
            PLAIN.run(other)
            PLAIN.run(other)
            assert len(computed) == 2 * once
        PLAIN.run(model)
        assert len(computed) == 2 * once
        PLAIN.run(other)
        assert len(computed) == 3 * once


def test_an_inner_context_leaves_to_an_outer_one_what_it_adds(computed):
    model = PLAIN.model()
    once = len(factor_layers(model))
    with cached_weights(model.base_model.model.mlp), cached_weights(model):
        with cached_weights(model):
            PLAIN.run(model)
        PLAIN.run(model)
        assert len(computed) == once
    PLAIN.run(model)
    assert len(computed) == 2 * once


def test_a_change_in_an_inner_context_takes_effect_in_the_outer_one():
    model = PLAIN.model()
    with cached_weights(model):
        before = PLAIN.run(model)
        with cached_weights(model):
            swap(model)
        after = PLAIN.run(model)
    assert differ(after, before)
    assert torch.equal(after, without_context(PLAIN, model))


def test_nothing_is_kept_after_the_context():
    """Also after an exception."""
    layer, x = one_layer()
    kept = []
    original = layer.adapted_weight

    def adapted_weight(*args):
        weight = original(*args)
        kept.append(weakref.ref(weight))
        return weight

    layer.adapted_weight = adapted_weight

    def fail():
        with cached_weights(layer):
            layer(x)
            layer(x)
            assert len(kept) == 1
            assert kept[0]() is not None
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    gc.collect()
    assert kept[0]() is None
    layer(x)
    assert len(kept) == 2


# Threads


def test_another_thread_without_a_context_computes_its_own(computed):
    model = PLAIN.model()
    once = len(factor_layers(model))
    with cached_weights(model), ThreadPoolExecutor(1) as pool:
        expected = PLAIN.run(model)
        for count in (2, 3):
            assert torch.equal(pool.submit(PLAIN.run, model).result(), expected)
            assert len(computed) == count * once
        PLAIN.run(model)
        assert len(computed) == 3 * once


def test_two_threads_in_two_contexts_do_not_see_each_others_weights(computed):
    """The second thread enters, changes the model and leaves while the first is inside."""
    model = PLAIN.model(class_embedding=None)
    once = len(factor_layers(model))

    def change():
        with cached_weights(model):
            before = PLAIN.run(model)
            swap(model)
            return before, PLAIN.run(model)

    with cached_weights(model), ThreadPoolExecutor(1) as pool:
        first = PLAIN.run(model)
        before, after = pool.submit(change).result()
        assert torch.equal(before, first)
        assert differ(after, first)
        assert len(computed) == 3 * once
        # What the other thread left is not what this one keeps.
        assert torch.equal(PLAIN.run(model), first)
        assert len(computed) == 3 * once
    assert torch.equal(PLAIN.run(model), after)


def test_many_threads_at_once():
    models = [PLAIN.model(seed=seed) for seed in range(4)]
    expected = [PLAIN.run(model) for model in models]
    barrier = threading.Barrier(4)

    def run(index):
        results = []
        for _ in range(5):
            with cached_weights(models[index]), cached_weights(models[0]):
                barrier.wait()
                results += [PLAIN.run(models[index]), PLAIN.run(models[index])]
        return results

    with ThreadPoolExecutor(4) as pool:
        for index, results in enumerate(pool.map(run, range(4))):
            assert all(torch.equal(result, expected[index]) for result in results)


# Gradients


@kinds
@pytest.mark.parametrize("first", [True, False], ids=["kept-before", "nothing-kept"])
def test_no_weight_is_kept_where_its_gradient_is_wanted(kind, first, computed):
    model, inputs = kind.model(), kind.batch()

    def gradients():
        model.zero_grad()
        output(model(**inputs)).square().sum().backward()
        return {name: p.grad.clone() for name, p in adapter_parameters(model).items()}

    expected = gradients()
    with cached_weights(model):
        if first:
            kind.run(model)
        for _ in range(2):
            computed.clear()
            found = gradients()
            assert len(computed) == len(factor_layers(model))
            for name, gradient in found.items():
                assert torch.equal(gradient, expected[name]), name


def test_training_inside_a_context():
    """Each step uses the parameters that the step before has left."""

    def train(context):
        model = PLAIN.model()
        optimizer = torch.optim.SGD(adapter_parameters(model).values(), lr=0.01)
        with context(model):
            for _ in range(3):
                optimizer.zero_grad()
                output(model(**PLAIN.batch())).square().sum().backward()
                optimizer.step()
        return PLAIN.run(model)

    assert torch.equal(train(cached_weights), train(lambda model: nullcontext()))


def test_a_base_that_is_trained_is_not_kept():
    model = PLAIN.model().requires_grad_(False)
    base = factor_layers(model)[0].get_base_layer().requires_grad_(True)
    with cached_weights(model):
        PLAIN.run(model)
        output(model(**PLAIN.batch())).sum().backward()
    assert base.weight.grad.abs().sum() > 0


@kinds
@pytest.mark.parametrize("before", [None, torch.no_grad, torch.inference_mode])
def test_the_gradient_of_an_input_through_a_frozen_adapter(kind, before, computed):
    """As guidance takes it: with the weight that is kept, or after forwards without gradients."""
    model = kind.model().requires_grad_(False)

    def gradient():
        inputs = kind.batch()
        inputs["sample"].requires_grad_()
        output(model(**inputs)).square().sum().backward()
        return inputs["sample"].grad

    expected = gradient()
    assert expected.abs().sum() > 0
    with cached_weights(model):
        if before is not None:
            with before():
                model(**kind.batch())
        computed.clear()
        assert torch.equal(gradient(), expected)
        assert torch.equal(gradient(), expected)
        assert len(computed) == (0 if before is torch.no_grad else len(factor_layers(model)))


def test_inference_mode_has_weights_of_its_own():
    """Outside of it, autograd cannot use them."""
    model = PLAIN.model()
    with cached_weights(model):
        with torch.inference_mode():
            assert output(model(**PLAIN.batch())).is_inference()
        assert not PLAIN.run(model).is_inference()
        output(model(**PLAIN.batch())).sum().backward()
        with torch.inference_mode():
            assert output(model(**PLAIN.batch())).is_inference()
    with torch.inference_mode(), cached_weights(model):
        PLAIN.run(model)
        with torch.inference_mode(False):
            output(model(**PLAIN.batch())).sum().backward()


def test_vectorized_parameters_leave_nothing_in_the_context():
    layer, x = one_layer()
    expected = layer(x)
    tensors = {name: torch.stack([p, 2 * p]) for name, p in layer.named_parameters()}
    alone = [torch.func.functional_call(layer, {n: t[i] for n, t in tensors.items()}, (x,)) for i in range(2)]
    with cached_weights(layer):
        both = torch.func.vmap(lambda values: torch.func.functional_call(layer, values, (x,)))(tensors)
        for index in range(2):
            torch.testing.assert_close(both[index], alone[index], rtol=1e-4, atol=1e-4)
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("only_adapter", [True, False])
def test_replaced_parameters_leave_nothing_in_the_context(only_adapter):
    layer, x = one_layer()
    expected = layer(x)
    names = [name for name, _ in layer.named_parameters() if "funlora_" in name or not only_adapter]
    replaced = {name: 2 * layer.get_parameter(name) for name in names}
    other = torch.func.functional_call(layer, replaced, (x,))
    assert differ(other, expected)
    with cached_weights(layer):
        assert torch.equal(torch.func.functional_call(layer, replaced, (x,)), other)
        assert torch.equal(layer(x), expected)
        assert torch.equal(torch.func.functional_call(layer, replaced, (x,)), other)


def test_forward_mode_derivatives():
    layer, x = one_layer()
    parameter = layer.funlora_A["default"]

    def derivative():
        tangents = {"funlora_A.default": torch.ones_like(parameter)}
        values = {"funlora_A.default": parameter.detach()}
        call = lambda values: torch.func.functional_call(layer, values, (x,))  # noqa: E731
        return torch.func.jvp(call, (values,), (tangents,))[1]

    expected = derivative()
    assert expected.abs().sum() > 0
    with cached_weights(layer):
        value = layer(x)
        torch.testing.assert_close(derivative(), expected)
        assert torch.equal(layer(x), value)


# Changes


def swap(model):
    hotswap_adapter(model, {name: 1.1 * value for name, value in adapter_state(model).items()})


def swap_in_the_bare_model(model):
    state = {name: 1.1 * value for name, value in adapter_state(model).items()}
    hotswap_adapter(model.base_model.model, state)


def set_scale(model):
    for layer in funlora_layers(model):
        layer.set_scale("default", 0.5)


def scale_layer(model):
    for layer in funlora_layers(model):
        layer.scale_layer(0.5)


def merge(model):
    """Into a merged weight that is not the sum of the layer's: the scale changes meanwhile."""
    model.merge_adapter()
    set_scale(model)


def merge_and_back(model):
    """Merged, changed and unmerged."""
    model.merge_adapter()
    nudge(model)
    model.unmerge_adapter()


def start_again(model):
    config = copy.deepcopy(model.peft_config["default"])
    torch.manual_seed(9)
    for layer in funlora_layers(model):
        layer.update_layer("default", config)


def load(model):
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})


def load_the_bare_model(model):
    base = model.base_model.model
    base.load_state_dict({name: 1.1 * value for name, value in base.state_dict().items()})


def load_with_assignment(model):
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()}, assign=True)


def load_adapter_tensors(model):
    set_peft_model_state_dict(model, {n: 1.1 * value for n, value in get_peft_model_state_dict(model).items()})


SEEN_INSIDE = [
    swap,
    swap_in_the_bare_model,
    set_scale,
    scale_layer,
    merge,
    merge_and_back,
    start_again,
    load,
    load_the_bare_model,
    load_with_assignment,
    load_adapter_tensors,
]


def nudge(model):
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if "funlora_A" in name:
                parameter.add_(0.1)


def nudge_data(model):
    for name, parameter in adapter_parameters(model).items():
        if "funlora_A" in name:
            parameter.data.add_(0.1)


def replace_data(model):
    for name, parameter in adapter_parameters(model).items():
        if "funlora_A" in name:
            parameter.data = parameter.data + 0.1


def nudge_base(model):
    with torch.no_grad():
        for layer in factor_layers(model):
            layer.get_base_layer().weight.mul_(1.5)


def nudge_base_data(model):
    for layer in factor_layers(model):
        layer.get_base_layer().weight.data.mul_(1.5)


def change_config(model):
    for layer in factor_layers(model):
        layer.settings["default"].function = "power"


def change_scaling(model):
    for layer in factor_layers(model):
        layer.scaling["default"] = 0.5


NOT_SEEN_INSIDE = [nudge, nudge_data, replace_data, nudge_base, nudge_base_data, change_config, change_scaling]


@kinds
@pytest.mark.parametrize("change", SEEN_INSIDE, ids=lambda change: change.__name__)
def test_a_change_takes_effect_inside(kind, change, computed):
    model = kind.model(operation="mul-add")
    with cached_weights(model):
        before = kind.run(model)
        change(model)
        after = kind.run(model)
        assert differ(after, before)
        assert torch.equal(after, without_context(kind, model))
        computed.clear()
        assert torch.equal(kind.run(model), after)
        assert not computed
    assert torch.equal(kind.run(model), after)


@kinds
@pytest.mark.parametrize("change", NOT_SEEN_INSIDE, ids=lambda change: change.__name__)
def test_other_changes_take_effect_after_the_context(kind, change):
    model = kind.model(operation="mul-add")
    with cached_weights(model):
        before = kind.run(model)
        change(model)
        assert torch.equal(kind.run(model), before)
    after = kind.run(model)
    assert differ(after, before)
    assert torch.equal(after, without_context(kind, model))
    with cached_weights(model):
        assert torch.equal(kind.run(model), after)


@kinds
@pytest.mark.parametrize("change", [*SEEN_INSIDE, *NOT_SEEN_INSIDE], ids=lambda change: change.__name__)
def test_outside_of_a_context_all_changes_take_effect(kind, change):
    model = kind.model(operation="mul-add")
    with cached_weights(model):
        before = kind.run(model)
    assert torch.equal(kind.run(model), before)
    change(model)
    after = kind.run(model)
    assert differ(after, before)
    assert torch.equal(after, without_context(kind, model))


@kinds
def test_another_dtype_takes_effect(kind):
    model = kind.model()
    with cached_weights(model):
        kind.run(model)
    model.double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in kind.batch().items()}
    expected = kind.run(copy.deepcopy(model), inputs)
    assert expected.dtype == torch.float64
    assert torch.equal(kind.run(model, inputs), expected)
    with cached_weights(model):
        assert torch.equal(kind.run(model, inputs), expected)


@kinds
def test_adapters_that_come_and_go_inside(kind):
    model = kind.model("x", "y")
    config = kind.config(operation="mul-add", function="shift")
    with cached_weights(model):
        model.set_adapter("y")
        old = kind.run(model)
        model.set_adapter("x")
        other = kind.run(model)
        model.delete_adapter("y")
        assert torch.equal(kind.run(model), other)
        model.add_adapter("y", config)
        model.set_adapter("y")
        new = kind.run(model)
        assert differ(new, old)
        assert torch.equal(new, without_context(kind, model))
        model.add_adapter("z", kind.config())
        model.set_adapter("z")
        assert torch.equal(kind.run(model), without_context(kind, model))
        model.delete_adapter("z")
        model.set_adapter("x")
        assert torch.equal(kind.run(model), other)


def test_layers_that_come_inside_act(computed):
    model = PLAIN.model("x", target_modules=["mlp.0"])
    with cached_weights(model):
        PLAIN.run(model)
        model.add_adapter("y", PLAIN.config())
        model.set_adapter("y")
        found = PLAIN.run(model)
        assert torch.equal(found, without_context(PLAIN, model))
        PLAIN.run(model)
    assert torch.equal(PLAIN.run(model), found)


@kinds
def test_disabled_and_merged_adapters_inside(kind):
    model = kind.model()
    base = kind.run(kind.base())
    with cached_weights(model):
        before = kind.run(model)
        with model.disable_adapter():
            assert torch.equal(kind.run(model), base)
        assert torch.equal(kind.run(model), before)
        model.merge_adapter()
        torch.testing.assert_close(kind.run(model), before, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(kind.run(model), before)
    with cached_weights(model):
        kind.run(model)
        unloaded = model.merge_and_unload()
        torch.testing.assert_close(kind.run(unloaded), before, rtol=1e-5, atol=1e-5)


@pytest.fixture
def bank():
    """A bank of three classes on a plain model, and its outputs by class."""
    states = {label: adapter_state(PLAIN.model(seed=label)) for label in (3, 5, 7)}
    made = AdapterBank(PLAIN.base(), PLAIN.config())
    for label, state in states.items():
        made.add_tensors(state, class_label=label)
    outputs = {None: PLAIN.run(PLAIN.base())}
    outputs |= {label: PLAIN.run(PLAIN.model(seed=label)) for label in states}
    return made, outputs


def test_classes_of_a_bank_inside(bank, computed):
    bank, outputs = bank
    with cached_weights(bank.model):
        for label in (3, 5, 5, None, 3, 7):
            bank.activate(label)
            assert torch.equal(PLAIN.run(bank.model), outputs[label])
            computed.clear()
            assert torch.equal(PLAIN.run(bank.model), outputs[label])
            assert not computed
        bank.remove(7)
        assert torch.equal(PLAIN.run(bank.model), outputs[None])
        bank.activate(5)
        assert torch.equal(PLAIN.run(bank.model), outputs[5])


def test_places_of_a_bank_inside(bank):
    """A place that another class takes, and places that are added."""
    bank, outputs = bank
    with cached_weights(bank.model):
        for labels in ([3, 3, 5], [5, 5, 7], [7, None, 3], [3, 5, 7], [7, 7, 7]):
            with bank.mixed_batch(labels):
                for _ in range(2):
                    found = PLAIN.run(bank.model)
                    for index, label in enumerate(labels):
                        torch.testing.assert_close(found[index], outputs[label][index], rtol=1e-5, atol=1e-5)


# Mixed batches


@kinds
@pytest.mark.parametrize("operation", ["mul", "mul-add"])
def test_a_mixed_batch_computes_every_weight_once(kind, operation, computed):
    model = kind.model("x", "y", operation=operation)
    inputs, names = kind.batch(4), ["x", "y", "__base__", "x"]
    expected = kind.run(model, inputs, adapter_names=names)
    once = len(computed)
    assert once == 2 * len(factor_layers(model)) * (2 if operation == "mul-add" else 1)
    computed.clear()
    with mixed_batch(model, names):
        for _ in range(3):
            assert torch.equal(kind.run(model, inputs), expected)
    assert len(computed) == once
    kind.run(model, inputs, adapter_names=names)
    assert len(computed) == 2 * once


def test_mixed_batches_inside_a_context_share(computed):
    model = PLAIN.model("x", "y", "z")
    layers = len(factor_layers(model))
    with cached_weights(model):
        for names in (["x", "y", "x"], ["y", "x", "__base__"], ["z", "x", "y"]):
            PLAIN.run(model, adapter_names=names)
    assert len(computed) == 3 * layers


def test_a_change_within_a_mixed_batch_takes_effect():
    model = UNET.model("default", "y")
    names = ["y", "default", "y"]
    with mixed_batch(model, names):
        before = UNET.run(model)
        swap(model)
        after = UNET.run(model)
    assert differ(after[1], before[1])
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert torch.equal(after, UNET.run(copy.deepcopy(model), adapter_names=names))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_training_with_gradient_checkpointing_inside(use_reentrant):
    """The reentrant kind runs forwards without gradients, which must not use what an earlier step kept."""

    def losses(around_all, around_a_step):
        layer = factor_layers(PLAIN.model("x", "y").train())[0]
        layer.set_adapter(["x", "y"])
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.05)
        sample = PLAIN.batch()["sample"].requires_grad_()
        found = []
        with around_all(layer, ["x", "y", "x"]):
            for _ in range(3):
                optimizer.zero_grad()
                with around_a_step(layer, ["x", "y", "x"]):
                    loss = checkpoint(layer, sample, use_reentrant=use_reentrant).square().mean()
                    loss.backward()
                optimizer.step()
                found.append(loss.item())
        return found

    def nothing(*args):
        return nullcontext()

    expected = losses(nothing, mixed_batch)
    assert len(set(expected)) == 3
    assert losses(mixed_batch, nothing) == expected


# Weights of which none is kept


def test_nothing_is_kept_while_a_weight_is_offloaded(computed):
    model, inputs = PLAIN.model(), PLAIN.batch()
    expected = PLAIN.run(model)
    once = len(factor_layers(model))
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(layer.get_base_layer().weight.is_meta for layer in factor_layers(model))
    computed.clear()
    with cached_weights(model):
        for count in (1, 2):
            assert torch.equal(PLAIN.run(model, inputs), expected)
            assert len(computed) == count * once


def test_layerwise_casting(computed):
    """The weight is the base's own, which is stored in another dtype between forwards."""
    base = UNET.base()
    base.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    model = UNET.model(base=base)
    expected = UNET.run(model)
    with cached_weights(model):
        for _ in range(3):
            assert torch.equal(UNET.run(model), expected)


@pytest.mark.parametrize("parametrization", ["weight_norm", "spectral_norm", "hook"])
def test_nothing_is_kept_of_a_weight_that_is_computed(parametrization, computed):
    base = PLAIN.base()
    target = base.mlp[0]
    if parametrization == "hook":
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(target)
    else:
        getattr(parametrizations, parametrization)(target)
    model = PLAIN.model(base=base)
    layers = factor_layers(model)
    computed.clear()
    with cached_weights(model):
        before = PLAIN.run(model)
        PLAIN.run(model)
        assert len(computed) == len(layers) + 1
        # What it is computed from may change.
        with torch.no_grad():
            target.bias.zero_()
            for name, tensor in target.named_parameters():
                if "original" in name or "weight" in name:
                    tensor.add_(0.1 * torch.rand_like(tensor))
        after = PLAIN.run(model)
    assert differ(after, before)
    assert torch.equal(after, PLAIN.run(model))


# Copies and files


def test_nothing_that_is_kept_is_saved_pickled_or_copied(computed, tmp_path):
    model = UNET.model()
    size, keys, buffers = len(pickle.dumps(model)), list(model.state_dict()), len(list(model.buffers()))
    attributes = [set(vars(layer)) for layer in funlora_layers(model)]
    model.save_pretrained(tmp_path / "before")
    with cached_weights(model):
        UNET.run(model)
        assert list(model.state_dict()) == keys
        assert len(list(model.buffers())) == buffers
        assert [set(vars(layer)) for layer in funlora_layers(model)] == attributes
        assert len(pickle.dumps(model)) == size
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        model.save_pretrained(tmp_path / "inside")
        computed.clear()
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for other in copies:
            assert torch.equal(UNET.run(other), UNET.run(model))
        assert len(computed) == len(copies) * len(factor_layers(model))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "inside" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


# Sampling


@pytest.fixture
def pipe(tiny_pipe, tmp_path):
    """The base's classes are 3 and 5, those of adapters 7 and 9."""
    write_adapters(tiny_pipe, tmp_path / "run", classes=[7, 9], base=False)
    for label in (7, 9):
        tiny_pipe.load_adapter(tmp_path / "run" / "adapters" / f"class_{label}", class_label=label)
    return tiny_pipe


@pytest.mark.parametrize(("solver", "nfe"), [("euler", 4), ("heun", 8), ("rk4", 16)])
def test_a_call_of_the_pipeline_computes_every_weight_once(solver, nfe, pipe, computed):
    result = pipe([7, 3, 9, 7], 4, solver, output_type="pt")
    assert result.nfe == nfe
    assert len(computed) == 2 * len(factor_layers(pipe.unet))
    computed.clear()
    pipe.interpolate(7, 9, 3, 4, solver, output_type="pt")
    assert len(computed) == 2 * len(factor_layers(pipe.unet))


@pytest.mark.parametrize("batch_size", [2, 5])
def test_draw_samples_computes_every_weight_once(batch_size, pipe, computed):
    settings = {"purpose": "probe", "seed": 0, "batch_size": batch_size, "solver": "heun", "num_inference_steps": 2}
    for _ in range(2):
        computed.clear()
        draw_samples(pipe, 7, 5, **settings)
        assert len(computed) == len(factor_layers(pipe.unet))


def test_guidance_uses_the_weights_that_are_kept(pipe, computed):
    """Its gradient is that of the state."""
    guided = []

    def score(images):
        guided.append(len(images))
        return images.square().mean(dim=(1, 2, 3))

    pipe([7, 7], 3, "euler", output_type="pt", guidance=Guidance(score, 1.0))
    assert guided
    assert len(computed) == len(factor_layers(pipe.unet))
