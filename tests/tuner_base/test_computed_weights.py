"""Weights that are computed from others or shared: never a stale one, none merged by half, none restored in part."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from peft_models import close, differ, funlora_layers
from torch import nn
from torch.nn import functional
from torch.nn.utils import (
    parametrizations,
    parametrize,
    prune,
    remove_spectral_norm,
    remove_weight_norm,
    spectral_norm,
    weight_norm,
)

from funlora_hf import FunLoraConfig, cached_weights


pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


class Two(nn.Module):
    """A plain layer and one whose weight tests replace, both convolutions or both linear."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        if kind == "conv":
            self.plain, self.changed = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect")
        else:
            self.plain, self.changed = nn.Linear(6, 6), nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.changed(torch.tanh(self.plain(x)))


def inputs(kind):
    generator = torch.Generator().manual_seed(1)
    return torch.randn((2, 6, 5, 5) if kind == "conv" else (3, 6), generator=generator)


def adapt(model, *targets, seed=2, **config):
    torch.manual_seed(seed)
    return get_peft_model(model, FunLoraConfig(target_modules=list(targets), init_weights=False, **config)).eval()


def run(model, x):
    with torch.no_grad():
        return model(x)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_state(model, expected):
    found = model.state_dict()
    assert list(found) == list(expected)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


# Computed weights: how they are put on, and taken off again.
COMPUTED = {
    "weight_norm": (parametrizations.weight_norm, None),
    "spectral_norm": (parametrizations.spectral_norm, None),
    "orthogonal": (parametrizations.orthogonal, None),
    "old weight_norm": (weight_norm, remove_weight_norm),
    "old spectral_norm": (spectral_norm, remove_spectral_norm),
    "pruning": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
        lambda layer: prune.remove(layer, "weight"),
    ),
}


def take_off(name, layer):
    remove = COMPUTED[name][1]
    return parametrize.remove_parametrizations(layer, "weight") if remove is None else remove(layer)


def make(name, kind):
    model = Two(kind)
    COMPUTED[name][0](model.changed)
    return model.eval()


def weight_now(layer, x):
    """The weight that the base computes now, by a call of it."""
    base = layer.get_base_layer()
    run(base, x)
    return base.weight.detach().clone()


def by_hand(kind, layer, x):
    """The layer's output with the weight times F, from torch's own functions."""
    base, weight = layer.get_base_layer(), weight_now(layer, x)
    matrix = layer.functional_matrix("default").detach()
    if kind == "linear":
        return functional.linear(x, weight * matrix, base.bias)
    return functional.conv2d(functional.pad(x, (1, 1, 1, 1), mode="reflect"), weight * matrix, base.bias)


def change(model):
    """Change what the weight is computed from, as training or loading does."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".changed." in name and "funlora_" not in name and "bias" not in name:
                p.add_(0.5 * torch.randn(p.shape, generator=generator).abs())


computed = pytest.mark.parametrize("name", COMPUTED)
layer_kinds = pytest.mark.parametrize("kind", ["conv", "linear"])


@computed
@layer_kinds
def test_output_with_a_computed_weight(name, kind):
    model, x = adapt(make(name, kind), "changed"), inputs(kind)
    layer = model.base_model.model.changed
    close(run(layer, x), by_hand(kind, layer, x))
    with model.disable_adapter():
        assert torch.equal(run(model, x), run(make(name, kind), x))
    assert torch.equal(run(copy.deepcopy(model), x), run(model, x))


@computed
@layer_kinds
def test_change_of_what_the_weight_is_computed_from_takes_effect(name, kind):
    model, x = adapt(make(name, kind), "changed"), inputs(kind)
    layer = model.base_model.model.changed
    delta = layer.get_delta_weight("default").detach()
    with torch.no_grad(), cached_weights(model):
        before = layer(x)
        change(model)
        after = layer(x)
    assert differ(after, before)
    close(after, by_hand(kind, layer, x))
    changed = layer.get_delta_weight("default").detach()
    assert differ(changed, delta)
    close(changed, weight_now(layer, x) * (layer.functional_matrix("default").detach() - 1))


@computed
@layer_kinds
def test_training_with_a_computed_weight(name, kind):
    model, x = adapt(make(name, kind), "changed"), inputs(kind)
    layer = model.base_model.model.changed
    weight = weight_now(layer, x)
    layer(x).square().sum().backward()
    found = {key: p.grad.clone() for key, p in layer.named_parameters() if p.requires_grad}
    layer.zero_grad()
    plain = Two(kind).eval().changed
    plain.weight.data = weight
    reference = adapt(nn.Sequential(plain), "0").base_model.model[0]
    reference.load_state_dict({key: p for key, p in layer.state_dict().items() if "funlora_" in key}, strict=False)
    reference(x).square().sum().backward()
    assert found
    for key, p in reference.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[key], p.grad, rtol=1e-4, atol=1e-5 * p.grad.abs().max().item())


@computed
@layer_kinds
@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
def test_merging_a_computed_weight_is_refused_and_changes_nothing(name, kind, way):
    model, x = adapt(make(name, kind), "plain", "changed"), inputs(kind)
    before, kept, layers = run(model, x), state(model), funlora_layers(model)
    with pytest.raises(ValueError, match=r"(?s)Cannot merge into .*\bchanged\b.*Remove"):
        getattr(model, way)()
    assert len(funlora_layers(model)) == 2
    assert [layer.merged_adapters for layer in layers] == [[], []]
    assert_state(model, kept)
    assert torch.equal(run(model, x), before)


@computed
@layer_kinds
def test_merging_once_the_weight_is_plain(name, kind):
    base, x = make(name, kind), inputs(kind)
    expected = run(adapt(make(name, kind), "plain", "changed"), x)
    take_off(name, base.changed)
    model = adapt(base, "plain", "changed")
    model.merge_adapter()
    close(run(model, x), expected)


@computed
def test_delta_weight_in_training_mode_changes_no_buffer(name):
    model = adapt(make(name, "linear"), "changed").train()
    kept = state(model)
    model.base_model.model.changed.get_delta_weight("default")
    assert_state(model, kept)


def test_parametrization_with_a_layer_of_its_own():
    """Its linear layer is not the one that the adapter changes."""

    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return self.layer(weight)

    model, x = Two("linear"), inputs("linear")
    parametrize.register_parametrization(model.changed, "weight", Computed())
    layer = adapt(model, "changed").base_model.model.changed
    close(run(layer, x), by_hand("linear", layer, x))


def test_hook_with_a_layer_of_its_own():
    """A probe on the base's layer runs as it is."""
    torch.manual_seed(0)
    model, probe, found = Two("linear"), nn.Linear(8, 6), []
    model.changed.register_forward_hook(lambda module, args, output: found.append((output, probe(output))))
    x = inputs("linear")
    run(adapt(model, "changed"), x)
    ((output, probed),) = found
    close(probed, run(probe, output))


# Shared weights


class Shared(nn.Module):
    """`first` and `second` share a parameter or are one module; as an embedding, `first` shares with the last layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        if how == "embedding":
            self.first, self.middle, self.second = nn.Embedding(5, 6), nn.Linear(6, 6), nn.Linear(6, 5, bias=False)
            self.second.weight = self.first.weight
        elif how == "block":
            self.first = nn.Sequential(nn.Linear(6, 6))
            self.second = self.first
        else:
            self.first = nn.Linear(6, 6)
            self.second = self.first if how == "module" else nn.Linear(6, 6)
            self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "embedding":
            return self.second(torch.tanh(self.middle(self.first(x))))
        return self.second(torch.tanh(self.first(x)))


SHARED = {
    "both": ("parameter", {"target_modules": ["first", "second"]}),
    "the first": ("parameter", {"target_modules": ["first"]}),
    "the second": ("parameter", {"target_modules": ["second"]}),
    "one module": ("module", {"target_modules": ["first"]}),
    "one block": ("block", {"target_modules": ["0"]}),
    "embedding": ("embedding", {"target_modules": ["middle"], "class_embedding": "first"}),
    "embedding and head": ("embedding", {"target_modules": ["second"], "class_embedding": "first"}),
    "head": ("embedding", {"target_modules": ["second"]}),
}
shared = pytest.mark.parametrize("case", SHARED)


def make_shared(case):
    how, targets = SHARED[case]
    model = Shared(how).eval()
    x = torch.tensor([0, 3, 1]) if how == "embedding" else inputs("linear")
    return model, FunLoraConfig(init_weights=False, **targets), x


def parameters(model):
    """Those called weight, by name, also where one has several names."""
    named = model.named_parameters(remove_duplicate=False)
    return {name.replace(".base_layer", ""): p for name, p in named if name.endswith("weight")}


@shared
@pytest.mark.parametrize("copied", [False, True], ids=["", "a copy"])
def test_unmerging_restores_shared_weights_and_that_they_are_shared(case, copied):
    base, config, x = make_shared(case)
    own = parameters(base)
    values = {name: p.detach().clone() for name, p in own.items()}
    shared_ones = len(own) - len(set(own.values()))
    assert shared_ones == 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(base, config).eval()
        adapted = run(model, x)
        model.merge_adapter()
    warned = " ".join(str(warning.message) for warning in caught)
    if differ(run(model, x), adapted):
        assert "first" in warned
        assert "second" in warned
    model = copy.deepcopy(model) if copied else model
    model.unmerge_adapter()
    assert torch.equal(run(model, x), adapted)
    found = parameters(model.unload())
    assert list(found) == list(own)
    assert len(found) - len(set(found.values())) == 1
    for name, p in found.items():
        assert torch.equal(p, values[name])
        assert copied or p is own[name]


@shared
def test_merging_warns_only_of_weights_that_stay_shared_no_longer(case):
    base, config, x = make_shared(case)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(base, config).eval()
        injected = [str(warning.message) for warning in caught if warning.category is UserWarning]
        adapted = run(model, x)
        caught.clear()
        merged = model.merge_adapter() or run(model, x)
        when_merged = [str(warning.message) for warning in caught]
    if case == "one module":
        # The adapter acts in one of two places, the merged weight in both: said when it is added.
        assert differ(merged, adapted)
        assert any("first" in text and "second" in text for text in injected)
        return
    assert torch.equal(merged, adapted)
    assert injected == []
    if case == "one block":
        assert when_merged == []
        return
    assert when_merged
    assert all("first" in text and "second" in text for text in when_merged)


# The delta of a weight


@layer_kinds
@pytest.mark.parametrize("operation", ["mul", "add", "mul-add"])
@pytest.mark.parametrize("computed", [None, "weight_norm", "old weight_norm"])
def test_delta_weight_is_effective_minus_base_and_differentiable(kind, operation, computed):
    base = Two(kind) if computed is None else make(computed, kind)
    layer = adapt(base, "changed", operation=operation).base_model.model.changed
    layer.set_scale("default", 0.7)
    x = inputs(kind)
    delta, weight = layer.get_delta_weight("default"), weight_now(layer, x)
    assert delta.shape == weight.shape
    close(delta.detach(), layer.adapted_weight(["default"], weight).detach() - weight)
    wanted = [p for name, p in layer.named_parameters() if "funlora_" in name]
    found = torch.autograd.grad(delta.square().sum(), wanted)
    expected = torch.autograd.grad((layer.adapted_weight(["default"], weight) - weight).square().sum(), wanted)
    for gradient, other in zip(found, expected, strict=True):
        assert gradient.abs().sum() > 0
        close(gradient, other)
