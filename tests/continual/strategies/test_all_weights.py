"""Where the strategies that protect the weights meet `finetune`: a penalty or share that does nothing gives its run to the bit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from strategies import OPTIONS, TASKS, learn, make_strategy

from funlora_hf.continual.strategies.sequential import CLASS_VECTORS


NOTHING = {
    "l2": {"penalty": 0},
    "ewc": {**OPTIONS["ewc"], "penalty": 0},
    "hft": {"share": 0},
    "mofo": {"share": 1},
}
RATE = 1e-3


def generator(folder, task=3):
    return load_file(folder / f"checkpoints/generator/task_{task}.safetensors")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    learn(make_strategy("finetune", folder))
    return generator(folder)


@pytest.mark.parametrize("name", NOTHING)
def test_with_nothing_to_protect_it_is_finetune(name, plain, tmp_path):
    learn(make_strategy(name, tmp_path, strategy_options=NOTHING[name]))
    found = generator(tmp_path)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[key], plain[key]) for key in plain)


@pytest.mark.parametrize("name", NOTHING)
def test_by_default_it_is_not(name, plain, tmp_path):
    learn(make_strategy(name, tmp_path))
    found = generator(tmp_path)
    assert any(not torch.equal(found[key], plain[key]) for key in plain)


@pytest.mark.parametrize("name", ["l2", "ewc"])
def test_a_huge_penalty_holds_the_weights_but_no_class_vectors(name, tmp_path, monkeypatch):
    """Adam makes steps of a learning rate, however large the gradient."""
    tasks = TASKS[:2]
    options = {"base_warmup_steps": 1, "base_learning_rate": RATE, "adapter_train_steps": 10, "base_ema_decay": 0.0}
    strategy = make_strategy(
        name, tmp_path, tasks=tasks, strategy_options={**NOTHING[name], "penalty": 1e6}, **options
    )
    if name == "ewc":  # with the same Fisher for all weights
        before = strategy._before
        strategy._before = lambda task: {key: torch.ones_like(one) for key, one in before(task).items()}
    learn(strategy)
    base = load_file(tmp_path / "base/unet/diffusion_pytorch_model.safetensors")
    found = generator(tmp_path, task=2)
    for key in base.keys() - {CLASS_VECTORS}:
        assert (found[key] - base[key]).abs().max() <= 2 * RATE, key
    new, mean = found[CLASS_VECTORS][2:], base[CLASS_VECTORS].mean(dim=0)
    assert (new - mean).abs().max() > 2 * RATE
