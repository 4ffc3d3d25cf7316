from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel

from funlora_hf.continual.checkpoint import TrainingState, latest_checkpoint, load_checkpoint, save_checkpoint


def start(size: int = 3, fused: bool | None = None) -> TrainingState:
    torch.manual_seed(0)
    weight = torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last)
    parameters = {"a": torch.randn(size), "b/c.d": torch.randn(2, 2), "e": weight}
    parameters = {name: torch.nn.Parameter(value) for name, value in parameters.items()}
    values = list(parameters.values())
    return TrainingState(parameters, torch.optim.Adam(values, lr=0.1, fused=fused), EMAModel(values, decay=0.9))


def train(state: TrainingState, steps: range) -> None:
    for step in steps:
        loss = sum((parameter - step).square().sum() for parameter in state.parameters.values())
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.ema.step(list(state.parameters.values()))


@pytest.mark.parametrize("fused", [None, True])
def test_a_resumed_state_trains_on_as_if_nothing_had_happened(fused, tmp_path):
    uninterrupted = start(fused=fused)
    train(uninterrupted, range(10))
    first = start(fused=fused)
    train(first, range(4))
    save_checkpoint(tmp_path, 4, first)

    resumed = start(fused=fused)
    done = load_checkpoint(latest_checkpoint(tmp_path), resumed)
    assert done == 4
    train(resumed, range(done, 10))
    for name, tensor in uninterrupted.tensors().items():
        assert torch.equal(resumed.tensors()[name], tensor), name


def test_what_the_optimizer_keeps_lies_as_its_parameter_does(tmp_path):
    first, resumed = start(), start()
    train(first, range(2))
    load_checkpoint(save_checkpoint(tmp_path, 2, first), resumed)
    for name, parameter in resumed.parameters.items():
        for key, value in resumed.optimizer.state[parameter].items():
            assert key == "step" or value.stride() == parameter.stride(), (name, key)


def test_only_the_newest_is_kept(tmp_path):
    state = start()
    for step in (5, 10, 100):
        train(state, range(1))
        save_checkpoint(tmp_path, step, state)
    assert [path.name for path in tmp_path.iterdir()] == ["step_100"]
    assert sorted(path.name for path in (tmp_path / "step_100").iterdir()) == ["state.json", "state.safetensors"]


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    (tmp_path / ".writing-1-step_5").mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_another_configuration_is_named(tmp_path):
    save_checkpoint(tmp_path, 1, start(size=3))
    with pytest.raises(ValueError, match=r"another configuration: for a it holds shape \(3,\), expected shape \(4,\)"):
        load_checkpoint(tmp_path / "step_1", start(size=4))
