"""Merging into the base's weights and back: to the bit, with several adapters, and refusals."""

import pytest
import torch
from peft import get_model_status
from peft_models import UNET, assert_equal, base_weights, close, differ, funlora_layers, kinds


OPERATIONS = pytest.mark.parametrize("operation", ["mul", "add", "mul-add"])


@kinds
@OPERATIONS
@pytest.mark.parametrize("names", [["x"], ["x", "y"]], ids=["one", "two"])
def test_merge_and_unmerge_are_exact(kind, operation, names):
    model = kind.model("x", "y", operation=operation)
    before = base_weights(model)
    model.base_model.set_adapter(names)
    expected = kind.run(model)
    model.merge_adapter()
    assert all(layer.merged_adapters == names for layer in funlora_layers(model))
    merged = base_weights(model)
    assert any(differ(merged[name], before[name]) for name in before)
    close(kind.run(model), expected, 1e-4)
    model.unmerge_adapter()
    assert_equal(base_weights(model), before)
    assert torch.equal(kind.run(model), expected)


@kinds
def test_weights_that_vanish_when_merged_come_back(kind):
    """W * 0 cannot be divided back: the weight itself has to be kept."""
    model = kind.model()
    before = base_weights(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "funlora_alpha" in name:
                parameter.zero_()
    model.merge_adapter()
    model.unmerge_adapter()
    assert_equal(base_weights(model), before)


@kinds
def test_merging_twice_changes_nothing(kind):
    model = kind.model()
    before, expected = base_weights(model), kind.run(model)
    model.merge_adapter()
    merged = base_weights(model)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert_equal(base_weights(model), merged)
    close(kind.run(model), expected, 1e-4)
    model.unmerge_adapter()
    assert_equal(base_weights(model), before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert_equal(base_weights(model), before)


@kinds
@OPERATIONS
def test_merging_one_after_the_other_is_merging_both(kind, operation):
    model = kind.model("x", "y", operation=operation)
    before = base_weights(model)
    model.base_model.set_adapter(["x", "y"])
    expected = kind.run(model)
    model.merge_adapter(["x"])
    assert get_model_status(model).merged_adapters == ["x"]
    with pytest.warns(UserWarning, match="Already following adapters were merged x"):
        model.merge_adapter(["x", "y"])
    assert get_model_status(model).merged_adapters == ["x", "y"]
    close(kind.run(model), expected, 1e-4)
    model.unmerge_adapter()
    assert_equal(base_weights(model), before)


@kinds
def test_merging_an_adapter_that_is_not_active(kind):
    model = kind.model("x", "y")
    model.set_adapter("y")
    expected = kind.run(model)
    model.set_adapter("x")
    model.merge_adapter(["y"])
    close(kind.run(model), expected, 1e-4)


@kinds
def test_disabling_a_merged_model_gives_the_base(kind):
    model = kind.model()
    expected = kind.run(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(kind.run(model), kind.run(kind.base()))
    assert torch.equal(kind.run(model), expected)


@kinds
def test_safe_merge_refuses_and_changes_nothing(kind):
    model = kind.model()
    before = base_weights(model)
    last = [layer for layer in funlora_layers(model) if hasattr(layer, "funlora_alpha")][-1]
    with torch.no_grad():
        last.funlora_alpha["default"][0] = float("nan")  # the layers before it are sound
    with pytest.raises(ValueError, match="broken"):
        model.merge_adapter(safe_merge=True)
    assert_equal(base_weights(model), before)
    assert not any(layer.merged for layer in funlora_layers(model))


def test_safe_merge_that_fails_keeps_what_was_merged_before():
    model = UNET.model("x", "y")
    model.merge_adapter(["x"])
    merged = base_weights(model)
    with torch.no_grad():
        funlora_layers(model)[-1].funlora_alpha["y"][0] = float("nan")
    with (
        pytest.warns(UserWarning, match="Already following adapters were merged x"),
        pytest.raises(ValueError, match="broken"),
    ):
        model.merge_adapter(["y"], safe_merge=True)
    assert_equal(base_weights(model), merged)
    assert get_model_status(model).merged_adapters == ["x"]


@kinds
@OPERATIONS
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload(kind, operation, safe_merge):
    base = kind.base()
    state = base.state_dict()
    names, kinds_of_modules = list(state), [type(module) for module in base.modules()]
    model = kind.model(base=base, operation=operation, modules_to_save=[kind.whole])
    with torch.no_grad():
        base.get_submodule(kind.whole).modules_to_save["default"].bias.add_(1)
    expected = kind.run(model)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert merged is base
    assert list(merged.state_dict()) == names
    assert [type(module) for module in merged.modules()] == kinds_of_modules
    assert not hasattr(merged, "peft_config")
    close(kind.run(merged), expected, 1e-4)


def test_merge_and_unload_of_one_of_two():
    model = UNET.model("x", "y")
    model.set_adapter("y")
    expected = UNET.run(model)
    model.set_adapter("x")
    close(UNET.run(model.merge_and_unload(adapter_names=["y"])), expected, 1e-4)


@kinds
def test_merge_and_unload_refuses_what_is_not_finite(kind):
    model = kind.model()
    with torch.no_grad():
        layer = next(layer for layer in funlora_layers(model) if hasattr(layer, "funlora_alpha"))
        layer.funlora_alpha["default"][0] = float("inf")
    with pytest.raises(ValueError, match="broken"):
        model.merge_and_unload(safe_merge=True)


@kinds
def test_unload_gives_the_base_back(kind):
    base = kind.base()
    before, expected = {name: value.clone() for name, value in base.state_dict().items()}, kind.run(base)
    unloaded = kind.model(base=base).unload()
    assert unloaded is base
    assert not funlora_layers(unloaded)
    assert_equal(unloaded.state_dict(), before)
    assert torch.equal(kind.run(unloaded), expected)


def test_a_model_that_was_unloaded_can_be_adapted_again():
    model = UNET.model()
    expected = UNET.run(model)
    assert torch.equal(UNET.run(UNET.model(base=model.unload())), expected)
