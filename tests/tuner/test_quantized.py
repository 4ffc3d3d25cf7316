"""Quantized layers are refused by name, whatever quantized them, and the model stays as it was."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from peft_models import close, funlora_layers
from torch import nn
from torch.nn import functional

from funlora_hf import FunLoraConfig


class OwnForward(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight.to(x.dtype) / 127, self.bias)


class Values(torch.Tensor):
    """A tensor of a library's own, such as torchao's."""


def linear8bit():
    """By the name of bitsandbytes' class, a Linear with bytes for a weight."""
    layer = type("Linear8bitLt", (OwnForward,), {"__module__": "bitsandbytes.nn.modules"})(6, 8)
    return with_weight(layer, torch.int8)


def with_weight(layer, dtype):
    layer.weight = nn.Parameter(torch.randint(0, 100, layer.weight.shape).to(dtype), requires_grad=False)
    return layer


def of_subclass():
    layer = nn.Linear(6, 8)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Values), requires_grad=False)
    return layer


def real(module: str, make_layer):
    """A layer of the library itself, if it is installed."""

    def make_or_skip():
        pytest.importorskip(module)
        return make_layer()

    return make_or_skip


def bitsandbytes_8bit():
    from bitsandbytes.nn import Linear8bitLt

    return Linear8bitLt(6, 8, has_fp16_weights=False).to("cpu")


def bitsandbytes_4bit():
    from bitsandbytes.nn import Linear4bit

    return Linear4bit(64, 64).to("cpu")


def torchao_int8():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(6, 8))
    quantize_(model, Int8WeightOnlyConfig())
    return model[0]


def quanto_int8():
    from optimum.quanto import freeze, qint8, quantize

    model = nn.Sequential(nn.Linear(6, 8))
    quantize(model, weights=qint8)
    freeze(model)
    return model[0]


QUANTIZED = {
    "Linear8bitLt": linear8bit,
    "QLinear": lambda: type("QLinear", (OwnForward,), {"__module__": "optimum.quanto.nn.qlinear"})(6, 8),
    "Linear4bit": lambda: with_weight(type("Linear4bit", (OwnForward,), {})(6, 8), torch.uint8),
    "Values": of_subclass,
    "torch.int8": lambda: with_weight(nn.Linear(6, 8), torch.int8),
    "torch.ao.nn.qat": lambda: torch.ao.nn.qat.Linear(
        6, 8, qconfig=torch.ao.quantization.get_default_qat_qconfig("x86")
    ),
    "bitsandbytes.nn.modules.Linear8bitLt": real("bitsandbytes", bitsandbytes_8bit),
    "bitsandbytes.nn.modules.Linear4bit": real("bitsandbytes", bitsandbytes_4bit),
    "Int8Tensor": real("torchao", torchao_int8),
    "optimum.quanto.nn.qlinear.QLinear": real("optimum.quanto", quanto_int8),
}
ADDING = {
    "get_peft_model": lambda model, config: get_peft_model(model, config),
    "inject_adapter_in_model": lambda model, config: inject_adapter_in_model(config, model),
}


@pytest.mark.parametrize("quantized", QUANTIZED)
@pytest.mark.parametrize("adding", ADDING)
def test_quantized_layer_is_refused(quantized, adding):
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(plain=nn.Linear(6, 6), changed=QUANTIZED[quantized]()))
    names = [name for name, _ in model.named_modules()]
    config = FunLoraConfig(target_modules=["plain", "changed"])
    with pytest.raises(ValueError, match=rf"(?s)\bchanged\b.*{quantized}.*[Ll]oad the model without quantization"):
        ADDING[adding](model, config)
    assert [name for name, _ in model.named_modules()] == names
    assert not hasattr(model, "peft_config")
    # A layer beside it can be adapted and merged.
    model = ADDING[adding](model, FunLoraConfig(target_modules=["plain"], init_weights=False))
    for layer in funlora_layers(model):
        x = torch.randn(3, 6)
        expected = layer(x)
        layer.merge()
        close(layer(x), expected)


class OwnLookup(nn.Embedding):
    """As bitsandbytes' Embedding8bit: rows of bytes, and a scale for each label."""

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return functional.embedding(labels, self.weight).float() * (1 + labels)[:, None] / 127


@pytest.mark.parametrize("embedding", ["bytes", "own forward", "subclass"])
def test_quantized_class_embedding_is_refused(embedding):
    layer = {"bytes": OwnLookup, "own forward": OwnLookup, "subclass": nn.Embedding}[embedding](5, 6)
    if embedding == "bytes":
        with_weight(layer, torch.int8)
    if embedding == "subclass":
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Values))
    model = nn.Sequential(OrderedDict(labels=layer, plain=nn.Linear(6, 6)))
    with pytest.raises(ValueError, match=r"\blabels\b"):
        get_peft_model(model, FunLoraConfig(target_modules=["plain"], class_embedding="labels"))
    assert not funlora_layers(model)
