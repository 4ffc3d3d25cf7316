"""Effective weights are computed once, and again after any change; outputs are those without a cache, to the bit."""

import copy
import pickle

import pytest
import torch
from peft_models import PLAIN, UNET, adapter_parameters, adapter_state, differ, funlora_layers, kinds
from torch import nn

from funlora_hf import hotswap_adapter, mixed_batch
from funlora_hf.tuner.layer import FunLoraFactorLayer
from funlora_hf.tuner.weight_cache import WeightCache


# The cache alone


class Counted:
    """Sums its sources, and counts how often."""

    def __init__(self, capacity=1):
        self.cache, self.calls = WeightCache(capacity), 0
        self.small, self.large = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))

    def get(self, key="x"):
        def compute():
            self.calls += 1
            return self.small.sum() + self.large.sum()

        with torch.no_grad():
            return self.cache.get(key, compute, by_value=[self.small], by_version=[self.large])


def test_nothing_is_computed_twice():
    counted = Counted()
    first = counted.get()
    assert counted.get() is first
    assert counted.calls == 1
    assert len(counted.cache) == 1


def replace(counted, name):
    setattr(counted, name, nn.Parameter(2 * getattr(counted, name).detach()))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.small.data.mul_(2),  # what torch does not count
        lambda c: c.small.detach().mul_(2),
        lambda c: c.large.detach().mul_(2),
        lambda c: replace(c, "small"),
        lambda c: replace(c, "large"),
        lambda c: setattr(c.large, "data", 2 * c.large.data),
        lambda c: setattr(c.large, "data", c.large.data.to(torch.bfloat16) * 2),
        lambda c: setattr(c.small, "data", c.small.data.double() * 2),
    ],
)
def test_any_change_is_seen(change):
    counted = Counted()
    before = counted.get()
    change(counted)
    assert counted.get() == counted.small.sum() + counted.large.sum() != before
    assert counted.calls == 2


def test_another_storage_at_the_same_place_is_not_taken_for_the_old_one():
    """Were the old storage freed, the next one of its size could come to lie where it lay."""
    counted = Counted()
    counted.get()
    for value in range(2, 20):
        counted.large.data = torch.full((4,), float(value))
        assert counted.get() == 3 + 4 * value


def test_the_least_used_goes_first():
    counted = Counted(capacity=2)
    for key in ("x", "y", "x", "z"):
        counted.get(key)
    assert counted.calls == 3
    counted.get("x")
    assert counted.calls == 3
    counted.get("y")
    assert counted.calls == 4
    assert len(counted.cache) == 2
    counted.cache.capacity = 1
    assert len(counted.cache) == 1
    counted.cache.clear()
    assert len(counted.cache) == 0


def test_capacity_0_keeps_nothing():
    counted = Counted(capacity=0)
    counted.get()
    counted.get()
    assert counted.calls == 2
    assert len(counted.cache) == 0


def test_nothing_is_kept_where_gradients_may_be_wanted():
    counted = Counted()
    kept = counted.get()
    with_gradient = counted.cache.get(
        "x", lambda: counted.small.sum(), by_value=[counted.small], by_version=[counted.large]
    )
    assert with_gradient.requires_grad
    assert counted.get() is kept


def test_what_was_made_in_inference_mode_stays_there():
    """Outside, autograd could not use it, not even for the gradient of an input."""
    counted = Counted()
    with torch.inference_mode():
        assert counted.get().is_inference()
    assert not counted.get().is_inference()


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_are_empty(copier):
    counted = Counted(capacity=3)
    counted.get()
    other = copier(counted.cache)
    assert (len(other), other.capacity, len(counted.cache)) == (0, 3, 1)


def test_vectorised_parameters_are_left_alone():
    layer = next(layer for layer in funlora_layers(PLAIN.model()) if hasattr(layer, "funlora_A"))
    tensors = {name: torch.stack([p, 2 * p]).detach() for name, p in layer.named_parameters()}
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        both = torch.func.vmap(lambda values: torch.func.functional_call(layer, values, (x,)))(tensors)
        for index in range(2):
            alone = torch.func.functional_call(layer, {n: t[index].clone() for n, t in tensors.items()}, (x,))
            torch.testing.assert_close(both[index], alone, rtol=1e-4, atol=1e-4)


# Layers


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


def without_cache(kind, model, **kwargs):
    """The output of a copy that has nothing kept."""
    return kind.run(copy.deepcopy(model), **kwargs)


@kinds
def test_the_second_forward_computes_nothing(kind, computed):
    model = kind.model()
    first = kind.run(model)
    assert computed
    computed.clear()
    assert torch.equal(kind.run(model), first)
    assert not computed
    assert torch.equal(without_cache(kind, model), first)
    assert computed


@kinds
def test_gradients_are_never_those_of_a_kept_weight(kind, computed):
    model = kind.model()
    kind.run(model)
    computed.clear()
    out = model(**kind.batch())
    (out if isinstance(out, torch.Tensor) else out.sample).square().sum().backward()
    assert computed
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter_parameters(model).values())


def nudge(model):
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if "funlora_A" in name:
                parameter.add_(0.1)


def nudge_data(model):
    for name, parameter in adapter_parameters(model).items():
        if "funlora_A" in name:
            parameter.data.add_(0.1)


def nudge_base(model):
    with torch.no_grad():
        for layer in funlora_layers(model):
            layer.get_base_layer().weight.mul_(1.5)


def nudge_base_data(model):
    model.train()
    for layer in funlora_layers(model):
        layer.get_base_layer().weight.data.mul_(1.5)
    model.eval()


def swap(model):
    hotswap_adapter(model, {name: 1.1 * value for name, value in adapter_state(model).items()})


def load(model):
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})


def rescale(model):
    for layer in funlora_layers(model):
        layer.set_scale("default", 0.5)


def merge_and_back(model):
    """Merged, changed and unmerged."""
    model.merge_adapter()
    nudge(model)
    model.unmerge_adapter()


def start_anew(model):
    config = copy.deepcopy(model.peft_config["default"])
    for layer in funlora_layers(model):
        layer.update_layer("default", config)


CHANGES = [nudge, nudge_data, nudge_base, nudge_base_data, swap, load, rescale, merge_and_back, start_anew]


@kinds
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_takes_effect(kind, change):
    model = kind.model(operation="mul-add")
    before = kind.run(model)
    change(model)
    after = kind.run(model)
    assert differ(after, before)
    assert torch.equal(after, without_cache(kind, model))


@kinds
def test_another_dtype_takes_effect(kind):
    model = kind.model()
    kind.run(model)
    model.double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in kind.batch().items()}
    after = kind.run(model, inputs)
    assert after.dtype == torch.float64
    assert torch.equal(after, kind.run(copy.deepcopy(model), inputs))


@kinds
def test_other_adapters_take_effect(kind):
    model = kind.model("x", "y")
    for names in (["x"], ["y"], ["x", "y"], ["x"]):
        model.base_model.set_adapter(names)
        assert torch.equal(kind.run(model), without_cache(kind, model))


@kinds
def test_a_mixed_batch_computes_every_weight_once(kind, computed):
    model = kind.model("x", "y")
    inputs, names = kind.batch(4), ["x", "y", "__base__", "x"]
    kind.run(model, inputs, adapter_names=names)
    expected = len(computed)
    computed.clear()
    with mixed_batch(model, names):
        first = kind.run(model, inputs)
        for _ in range(3):
            assert torch.equal(kind.run(model, inputs), first)
    assert len(computed) <= expected
    assert all(len(layer._weights) <= 1 and layer._weights.capacity == 1 for layer in funlora_layers(model))


def test_a_change_within_a_mixed_batch_takes_effect():
    model = UNET.model("default", "y")
    names = ["y", "default", "y"]
    with mixed_batch(model, names):
        before = UNET.run(model)
        nudge(model)
        after = UNET.run(model)
    assert differ(after[1], before[1])
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert torch.equal(after, UNET.run(copy.deepcopy(model), adapter_names=names))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_can_have_a_gradient_after_sampling(mode):
    """Guidance takes gradients through a frozen adapter, with the weight that is kept."""
    model = PLAIN.model().requires_grad_(False)
    inputs = PLAIN.batch()
    with mode():
        model(**inputs)
    inputs["sample"].requires_grad_()
    model(**inputs).sum().backward()
    assert inputs["sample"].grad.abs().sum() > 0


def test_nothing_kept_is_saved_or_copied():
    model = UNET.model()
    size, keys = len(pickle.dumps(model)), list(model.state_dict())
    UNET.run(model)
    assert list(model.state_dict()) == keys
    assert len(pickle.dumps(model)) < 1.01 * size
    assert all(len(layer._weights) == 0 for layer in funlora_layers(copy.deepcopy(model)))
