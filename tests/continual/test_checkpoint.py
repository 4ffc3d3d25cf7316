from __future__ import annotations

import hashlib
import os

import pytest
import torch
from diffusers.training_utils import EMAModel

from funlora_hf.continual.checkpoint import (
    TrainingState,
    latest_checkpoint,
    load_newest,
    save_checkpoint,
)


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
    save_checkpoint(tmp_path, 4, first, total_limit=2)

    resumed = start(fused=fused)
    done = load_newest(tmp_path, resumed)
    assert done == 4
    train(resumed, range(done, 10))
    for name, tensor in uninterrupted.tensors().items():
        assert torch.equal(resumed.tensors()[name], tensor), name


def test_what_the_optimizer_keeps_lies_as_its_parameter_does(tmp_path):
    first, resumed = start(), start()
    train(first, range(2))
    save_checkpoint(tmp_path, 2, first, total_limit=2)
    load_newest(tmp_path, resumed)
    for name, parameter in resumed.parameters.items():
        for key, value in resumed.optimizer.state[parameter].items():
            assert key == "step" or value.stride() == parameter.stride(), (name, key)


def test_the_seconds_of_earlier_processes_count(tmp_path):
    first, resumed = start(), start()
    first.started -= 100
    save_checkpoint(tmp_path, 1, first, total_limit=2)
    load_newest(tmp_path, resumed)
    resumed.started -= 1000
    assert 1100 <= resumed.seconds() < 1200


def test_what_has_another_shape_than_its_parameter(tmp_path):
    """As 8-bit optimisers keep scales of blocks."""
    first, resumed = start(), start()
    train(first, range(1))
    scales = torch.arange(7.0)
    first.optimizer.state[first.parameters["a"]]["scales"] = scales
    save_checkpoint(tmp_path, 1, first, total_limit=2)
    load_newest(tmp_path, resumed)
    assert torch.equal(resumed.optimizer.state[resumed.parameters["a"]]["scales"], scales)


@pytest.mark.parametrize(
    ("limit", "kept"), [(1, ["step_100"]), (2, ["step_10", "step_100"]), (None, ["step_10", "step_100", "step_5"])]
)
def test_the_newest_are_kept(limit, kept, tmp_path):
    state = start()
    for step in (5, 10, 100):
        train(state, range(1))
        save_checkpoint(tmp_path, step, state, total_limit=limit)
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    assert sorted(path.name for path in (tmp_path / "step_100").iterdir()) == ["state.safetensors", "state.sha256"]


def test_the_checksum_is_what_sha256sum_reads(tmp_path):
    path = save_checkpoint(tmp_path, 1, start(), total_limit=None)
    expected = hashlib.sha256((path / "state.safetensors").read_bytes()).hexdigest()
    assert (path / "state.sha256").read_text() == f"{expected}  state.safetensors\n"


def flip(path, share):
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "bit": lambda path, share: flip(path / "state.safetensors", share),
    "bit of the checksum": lambda path, share: flip(
        path / "state.sha256", share / 2
    ),  # the name behind it says nothing
    "cut short": lambda path, share: os.truncate(path / "state.safetensors", int(share * 1000)),
    "empty checksum": lambda path, share: (path / "state.sha256").write_bytes(b""),
    "no text": lambda path, share: (path / "state.sha256").write_bytes(b"\xff\xfe" * 40),
    "no tensors": lambda path, share: (path / "state.safetensors").unlink(),
    "no checksum": lambda path, share: (path / "state.sha256").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage, share, tmp_path, caplog):
    state, expected = start(), {}
    for step in (1, 2):
        train(state, range(1))
        expected[step] = state.tensors()
        newest = save_checkpoint(tmp_path, step, state, total_limit=2)
    DAMAGE[damage](newest, share)
    resumed = start()
    assert load_newest(tmp_path, resumed) == 1
    assert f"The checkpoint {newest} is damaged" in caplog.text
    for name, tensor in resumed.tensors().items():
        assert torch.equal(tensor, expected[1][name]), name

    DAMAGE[damage](tmp_path / "step_1", share)
    untouched = start()
    assert load_newest(tmp_path, untouched) == 0
    for name, tensor in start().tensors().items():
        assert torch.equal(untouched.tensors()[name], tensor), name


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    (tmp_path / ".writing-1-step_5").mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_another_configuration_is_named(tmp_path):
    save_checkpoint(tmp_path, 1, start(size=3), total_limit=None)
    with pytest.raises(ValueError, match=r"another configuration: for a it has shape \(3,\), expected shape \(4,\)"):
        load_newest(tmp_path, start(size=4))
