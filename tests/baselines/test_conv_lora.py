from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from funlora_hf.baselines import ConvLoraConfig


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def adapted(conv: nn.Conv2d, **config) -> PeftModel:
    model = nn.Sequential(conv)
    return get_peft_model(model, ConvLoraConfig(target_modules=["0"], init_weights=False, **config)).eval()


def expected_weight(model: PeftModel, scale: float) -> np.ndarray:
    """The weight by loralib's layout, in NumPy: entry (o, i, u, v) of the change is number ((o I + i) k + u) k + v of B A."""
    layer = model.base_model.model[0]
    product = (
        layer.conv_lora_B["default"].detach().double().numpy() @ layer.conv_lora_A["default"].detach().double().numpy()
    )
    weight = layer.weight.detach().double().numpy()
    flat = product.reshape(-1)
    change = np.empty_like(weight)
    for number, index in enumerate(np.ndindex(*weight.shape)):
        change[index] = flat[number]
    return weight + scale * change


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        ({"bottleneck": "kernel", "r": 2}, ((6, 12), (18, 6))),
        ({"bottleneck": "rank", "r": 2}, ((2, 12), (18, 2))),
    ],
)
def test_factors_and_output(config, shapes):
    conv = nn.Conv2d(4, 6, 3, padding=1, stride=2)
    model = adapted(conv, lora_alpha=3, **config)
    layer = model.base_model.model[0]
    assert (layer.conv_lora_A["default"].shape, layer.conv_lora_B["default"].shape) == shapes
    x = torch.randn(2, 4, 5, 5)
    weight = torch.from_numpy(expected_weight(model, 3 / 2))
    expected = nn.functional.conv2d(x.double(), weight, conv.bias.double(), stride=2, padding=1)
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bottleneck", ["kernel", "rank"])
def test_starts_as_the_base_to_the_bit_and_learns(bottleneck):
    conv = nn.Conv2d(4, 6, 3)
    x = torch.randn(2, 4, 5, 5)
    before = conv(x)
    model = get_peft_model(nn.Sequential(conv), ConvLoraConfig(target_modules=["0"], bottleneck=bottleneck))
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    assert model.base_model.model[0].conv_lora_B["default"].grad.abs().sum() > 0


@pytest.mark.parametrize("bottleneck", ["kernel", "rank"])
def test_autocast_changes_no_weight(bottleneck):
    layer = adapted(nn.Conv2d(4, 6, 3), bottleneck=bottleneck, r=2).base_model.model[0]
    with torch.no_grad():
        expected = layer.adapted_weight(["default"], layer.get_base_layer().weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            weight = layer.adapted_weight(["default"], layer.get_base_layer().weight)
    assert torch.equal(weight, expected)


def test_groups_and_dilation():
    conv = nn.Conv2d(4, 6, 3, groups=2, dilation=2)
    model = adapted(conv)
    x = torch.randn(1, 4, 7, 7)
    weight = torch.from_numpy(expected_weight(model, 1.0))
    expected = nn.functional.conv2d(x.double(), weight, conv.bias.double(), dilation=2, groups=2)
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_merge_and_unmerge_are_exact():
    conv = nn.Conv2d(4, 6, 3)
    original = conv.weight.detach().clone()
    model = adapted(conv)
    x = torch.randn(2, 4, 5, 5)
    before = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), before)
    assert not torch.equal(conv.weight, original)
    model.unmerge_adapter()
    assert torch.equal(conv.weight, original)


def test_scale_blends_from_the_base():
    conv = nn.Conv2d(4, 6, 3)
    x = torch.randn(2, 4, 5, 5)
    base = conv(x)
    model = adapted(conv)
    full = model(x)
    model.base_model.model[0].set_scale("default", 0.25)
    torch.testing.assert_close(model(x), base + 0.25 * (full - base), rtol=1e-4, atol=1e-5)


def test_save_and_load_is_equal_to_the_bit(tmp_path):
    conv = nn.Conv2d(4, 6, 3)
    base = nn.Sequential(nn.Conv2d(4, 6, 3))
    base[0].load_state_dict(conv.state_dict())
    model = adapted(conv, bottleneck="rank")
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 4, 5, 5)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert isinstance(loaded.peft_config["default"], ConvLoraConfig)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 0}, "`r` should be a positive integer value"),
        ({"lora_alpha": 0}, "`lora_alpha` should be a positive integer value"),
        ({"bottleneck": "neck"}, "`bottleneck` is 'neck', expected one of: 'kernel', 'rank'"),
    ],
)
def test_bad_configurations(config, words):
    with pytest.raises(ValueError, match=words):
        ConvLoraConfig(target_modules=["0"], **config)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Conv2d(4, 6, (1, 3)), "has a kernel of 1 x 3, expected a square one"),
        (nn.ConvTranspose2d(4, 6, 3), "is not supported"),
        (nn.Linear(4, 6), "is not supported"),
    ],
)
def test_bad_targets(module, words):
    with pytest.raises(ValueError, match=words):
        get_peft_model(nn.Sequential(module), ConvLoraConfig(target_modules=["0"]))


def test_targets_must_be_named():
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 3)), ConvLoraConfig())
