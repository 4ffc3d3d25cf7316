"""Costs: the counts are what runs really do, and the FLOPs what layers really do; shipped recipes are counted without their data."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import UNet2DModel
from runs import TINY_UNET, short_run
from torch.optim.optimizer import register_optimizer_step_post_hook

import funlora_hf.run
from funlora_hf.continual import costs
from funlora_hf.recipes.reading import recipe_names
from funlora_hf.run import dry_run, run
from funlora_hf.train import parse


def counted(arguments, monkeypatch):
    """The parts of a dry run that measures nothing, by name."""
    found = {}

    def measure(parts, *args, **kwargs):
        for part in parts:
            part.seconds = 1.0
            found[part.name] = part

    with monkeypatch.context() as patched:
        patched.setattr(funlora_hf.run, "measure_parts", measure)
        dry_run(arguments)
    return found


@pytest.mark.parametrize("strategy", ["funlora", pytest.param("replay", marks=pytest.mark.slow)])
def test_counts_are_what_a_run_does(strategy, tmp_path, monkeypatch):
    epochs = {"adapter_train_steps": None, "adapter_epochs": 2, "gradient_accumulation_steps": 2}
    arguments = short_run(output_dir=str(tmp_path), strategy=strategy, **epochs)
    parts = counted(arguments, monkeypatch)
    assert not list(tmp_path.iterdir())

    done = {"evaluations": 0, "classifier": 0}
    forward = UNet2DModel.forward

    def count_images(unet, sample, *args, **kwargs):
        done["evaluations"] += 0 if torch.is_grad_enabled() else len(sample)
        return forward(unet, sample, *args, **kwargs)

    def count_steps(optimizer, *_):
        done["classifier"] += isinstance(optimizer, torch.optim.SGD)

    monkeypatch.setattr(UNet2DModel, "forward", count_images)
    hook = register_optimizer_step_post_hook(count_steps)
    try:
        run(arguments)
    finally:
        hook.remove()
    steps = {}
    for path in (tmp_path / "checkpoints" / "seconds").glob("*.json"):
        kind = f"training: {path.stem.rstrip('_0123456789')}"
        steps[kind] = steps.get(kind, 0) + json.loads(path.read_text())["steps"]
    assert {name: part.count for name, part in parts.items() if part.phase} == steps
    assert sum(part.count for part in parts.values() if part.unit == "evaluations") == done["evaluations"]
    assert parts["classifiers"].count == done["classifier"]


def test_the_papers_recipe_for_cifar10(monkeypatch):
    parts = counted(parse(["--config", "cifar10_2-2"]), monkeypatch)
    base, adapters = parts["training: base"], parts["training: class"]
    assert (base.count, base.images) == (39_500, 128)
    assert (adapters.count, adapters.images) == (96_000, 128)
    assert parts["sampling 50,160 images"].count == 50_160 * 280


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_counted_without_a_download(name, monkeypatch):
    # A process has one precision.
    own = ["--dataset_name", "digits"] if name == "own_images" else []
    arguments = parse(["--config", name, "--mixed_precision", "no", *own])
    assert all(part.count > 0 for part in counted(arguments, monkeypatch).values())


def test_flops_seconds_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "MEASURED_SECONDS", 0.0)
    measured = {}

    def keep(parts, *args, **kwargs):
        costs.measure_parts(parts, *args, **kwargs)
        measured.update({part.name: part for part in parts})

    monkeypatch.setattr(funlora_hf.run, "measure_parts", keep)
    text = dry_run(short_run(output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    assert all(name in text for name in (*measured, "time", "together"))
    assert all(part.seconds > 0 for part in measured.values())
    base, adapter = measured["training: base"], measured["training: class"]
    unet = UNet2DModel(**TINY_UNET, num_class_embeds=4)
    weights = sum(parameter.nbytes for parameter in unet.parameters())
    assert base.memory > 5 * weights > adapter.memory / 4
    assert adapter.memory < base.memory
    sampling = next(part for name, part in measured.items() if name.startswith("sampling"))
    # Attention's products, without layers, are the rest.
    assert sampling.flops / sampling.count == pytest.approx(layer_flops(unet), rel=0.03)
    assert 2.5 < base.flops / (base.count * base.images) / layer_flops(unet) < 3.5


def layer_flops(unet: UNet2DModel) -> int:
    """Of the convolutions and linear layers for one image, by their shapes."""
    total = 0

    def add(layer, inputs, output):
        nonlocal total
        total += 2 * output.numel() * layer.weight[0].numel()

    for module in unet.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(add)
    size = TINY_UNET["sample_size"]
    with torch.no_grad():
        unet(torch.zeros(1, 1, size, size), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    return total


def test_an_update_is_refused():
    with pytest.raises(ValueError, match="`dry_run` and `update_class` are both given"):
        dry_run(short_run(update_class=7))
