"""Rivals train what they are said to train, and a row that cannot be measured is skipped with its reason."""

import pytest
import torch
from peft import LoHaConfig, LoKrConfig

from funlora_hf import select_layers


@pytest.fixture
def rivals(benchmark, monkeypatch, small_unet):
    module = benchmark("rivals")
    monkeypatch.setattr(module, "paper_unet", small_unet)
    return module


def lora(rivals):
    return rivals.peft_lora()


def lokr_of_peft(rivals):
    return rivals.of_peft(LoKrConfig, r=1, alpha=1)


def loha_of_peft(rivals):
    return rivals.of_peft(LoHaConfig, r=1, alpha=1, use_effective_conv2d=True)


def lokr_of_lycoris(rivals):
    pytest.importorskip("lycoris")
    return rivals.lycoris_lokr()


@pytest.mark.parametrize("make", [lora, lokr_of_peft, loha_of_peft, lokr_of_lycoris])
def test_a_step_moves_the_adapters_of_all_layers_and_the_class_vector_alone(rivals, small_unet, make):
    model = make(rivals)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    vector = small_unet().class_embedding.embedding_dim
    rivals.step(model, 2)()
    rivals.step(model, 2)()  # factors that start at zero keep the others still for one step
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    vectors = [p for name, p in model.named_parameters() if name in moved and "class_embedding" in name]
    assert sum(p.numel() for p in vectors) == vector
    layers = select_layers(small_unet())
    for layer in layers:
        assert any(layer in name or layer.replace(".", "_") in name for name in moved) or make is lokr_of_lycoris
    if make is lokr_of_lycoris:
        assert len(model.lycoris.loras) == len(layers)


def test_other_forms_of_F_are_in_force_within_their_context_only(rivals, small_unet):
    calls = []

    def counting(*arguments, function):
        calls.append(function)
        return rivals.functional_matrix(*arguments, function=function)

    model = rivals.funlora()
    rivals.step(model, 2, lambda: rivals.functional_matrix_by(counting))()
    assert calls == ["cosine"] * len(select_layers(small_unet()))
    rivals.step(model, 2)()
    assert len(calls) == len(select_layers(small_unet()))


def test_rows_without_package_or_compiler_are_skipped(rivals, monkeypatch):
    def fails(*arguments, **settings):
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(rivals, "compiled", lambda: fails)
    row = object()

    def against(rival):
        if "lycoris" in rival.name:
            raise ModuleNotFoundError("No module named 'lycoris'")
        if "compile" in rival.name:
            rival.make()
        return row

    monkeypatch.setattr(rivals, "against", against)
    findings = rivals.measure()
    assert findings.rows == [row] * 5
    assert [(skipped.name, skipped.reason) for skipped in findings.skipped] == [
        ("LoKr of lycoris-lora, r = 3", "No module named 'lycoris'"),
        ("FunLoRA, F by torch.compile", "torch.compile fails here: No working C++ compiler found"),
    ]
