from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from funlora_hf.baselines import ScaleShiftConfig
from funlora_hf.tuner import mixed_batch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def adapted(conv: nn.Conv2d, **config) -> PeftModel:
    return get_peft_model(
        nn.Sequential(conv), ScaleShiftConfig(target_modules=["0"], init_weights=False, **config)
    ).eval()


def test_the_convolution_sees_scaled_and_shifted_channels():
    conv = nn.Conv2d(4, 6, 3, padding=1, stride=2)
    model = adapted(conv)
    layer = model.base_model.model[0]
    scale, shift = (getattr(layer, f"scale_shift_{part}")["default"].detach() for part in ("scale", "shift"))
    x = torch.randn(2, 4, 5, 5)
    seen = torch.stack([x[:, c] * scale[c] + shift[c] for c in range(4)], dim=1)
    torch.testing.assert_close(model(x), conv(seen))
    # The padding is not shifted: that is why no weight and bias can do the same.
    assert not torch.allclose(model(x), conv(seen - shift[:, None, None]))


def test_starts_as_the_base_to_the_bit_and_learns():
    conv = nn.Conv2d(4, 6, 3)
    x = torch.randn(2, 4, 5, 5)
    before = conv(x)
    model = get_peft_model(nn.Sequential(conv), ScaleShiftConfig(target_modules=["0"]))
    assert torch.equal(model(x), before)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 8
    model(x).square().sum().backward()
    layer = model.base_model.model[0]
    assert layer.scale_shift_scale["default"].grad.abs().min() > 0
    assert layer.scale_shift_shift["default"].grad.abs().min() > 0


def test_scale_blends_from_the_base():
    conv = nn.Conv2d(4, 6, 3)
    x = torch.randn(2, 4, 5, 5)
    base = conv(x)
    model = adapted(conv)
    full = model(x)
    model.base_model.model[0].set_scale("default", 0.25)
    torch.testing.assert_close(model(x), base + 0.25 * (full - base), rtol=1e-4, atol=1e-5)


def test_it_cannot_be_merged_and_says_so():
    conv = nn.Conv2d(4, 6, 3, padding=1)
    original = conv.weight.detach().clone()
    model = adapted(conv)
    with pytest.raises(ValueError, match=r"scale and shift \(default\) cannot be merged"):
        model.merge_adapter()
    assert torch.equal(conv.weight, original)
    assert not model.base_model.model[0].merged


def test_mixed_batch():
    conv = nn.Conv2d(4, 6, 3)
    model = adapted(conv)
    model.add_adapter("other", ScaleShiftConfig(target_modules=["0"], init_weights=False))
    x = torch.randn(3, 4, 5, 5)
    with mixed_batch(model, ["other", "__base__", "default"]):
        mixed = model(x)
    assert torch.equal(mixed[1:2], conv(x[1:2]))
    torch.testing.assert_close(mixed[2:], model(x[2:]))
    model.set_adapter("other")
    torch.testing.assert_close(mixed[:1], model(x[:1]))


def test_save_and_load_is_equal_to_the_bit(tmp_path):
    conv = nn.Conv2d(4, 6, 3)
    base = nn.Sequential(nn.Conv2d(4, 6, 3))
    base[0].load_state_dict(conv.state_dict())
    model = adapted(conv)
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 4, 5, 5)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert isinstance(loaded.peft_config["default"], ScaleShiftConfig)
    assert torch.equal(loaded(x), model(x))


def test_unloading_gives_the_base_back_also_with_a_trained_row_of_an_embedding():
    class WithClasses(nn.Module):
        def __init__(self):
            super().__init__()
            self.classes = nn.Embedding(2, 4)
            self.conv = nn.Conv2d(4, 6, 3)

        def forward(self, x, labels):
            return self.conv(x + self.classes(labels)[:, :, None, None])

    base = WithClasses()
    x, labels = torch.randn(2, 4, 5, 5), torch.tensor([0, 1])
    before = base(x, labels)
    config = ScaleShiftConfig(target_modules=["conv"], trainable_token_indices={"classes": [0]}, init_weights=False)
    model = get_peft_model(base, config)
    assert not torch.allclose(model(x, labels), before)
    assert torch.equal(model.unload()(x, labels), before)
