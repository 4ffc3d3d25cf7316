"""Steps without a finite loss or gradient leave everything as it was; all others are those of torch alone."""

from __future__ import annotations

import copy
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from started_runs import torchrun
from torch import nn

from funlora_hf.continual.checkpoint import TrainingState
from funlora_hf.continual.guarded_steps import HALVINGS, GuardedSteps, Outcome


SOUND, BAD_LOSS, BAD_GRADIENT = 1.0, math.nan, math.inf


def make(fused):
    """A layer with statistics of its own, and all that its training keeps."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    parameters = dict(module.named_parameters())
    optimizer = torch.optim.Adam(parameters.values(), lr=0.1, fused=fused)
    ema = EMAModel(list(parameters.values()), decay=0.9, foreach=bool(fused))
    buffers = {name: buffer for name, buffer in module.named_buffers() if "running" in name}
    return module, TrainingState(parameters, optimizer, ema, buffers)


def run(module, guard, kinds):
    """Steps of the given kinds; the outcomes."""
    outcomes = []
    for step, kind in enumerate(kinds):
        torch.manual_seed(step)
        x = torch.randn(4, 3)
        guard.begin()
        loss = module(x if kind == SOUND else x * math.nan).square().mean()
        if kind == BAD_GRADIENT:
            # The loss is finite, and what comes from it is not: the root's slope at 0.
            loss = (loss.nan_to_num(0.0) * 0 + module[0].weight.sum() * 0).abs().sqrt()
        loss.backward()
        outcomes.append(Outcome(int(guard.end([loss.detach()]))))
    return outcomes


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("fused", [None, True])
def test_sound_steps_are_torch_s(fused, max_grad_norm, accelerator):
    module, state = make(fused)
    guard = GuardedSteps(state, accelerator, shared=False, max_grad_norm=max_grad_norm)
    assert run(module, guard, [SOUND] * 5) == [Outcome.DONE] * 5
    plain, expected = make(fused)
    for step in range(5):
        torch.manual_seed(step)
        plain(torch.randn(4, 3)).square().mean().backward()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm)
        expected.optimizer.step()
        expected.optimizer.zero_grad()
        expected.ema.step(plain.parameters())
    found, tensors = state.tensors(), expected.tensors()
    assert found.keys() == tensors.keys()
    assert len(found) == 2 + 5 * 4
    assert [name for name in tensors if not torch.equal(found[name], tensors[name])] == []


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize(("kind", "outcome"), [(BAD_LOSS, Outcome.NO_LOSS), (BAD_GRADIENT, Outcome.NO_GRADIENT)])
def test_a_skipped_step_leaves_no_trace(kind, outcome, fused, max_grad_norm, accelerator):
    module, state = make(fused)
    guard = GuardedSteps(state, accelerator, shared=False, max_grad_norm=max_grad_norm)
    run(module, guard, [SOUND] * 3)
    before, ema_step = state.tensors(), state.ema.optimization_step
    assert run(module, guard, [kind] * 2) == [outcome] * 2
    after = state.tensors()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    # The moving average's weight goes by the step, as the learning rate does.
    assert state.ema.optimization_step == ema_step + 2
    assert all(parameter.grad is None for parameter in module.parameters())
    assert run(module, guard, [SOUND]) == [Outcome.DONE]
    assert not torch.equal(state.tensors()["parameter/0.weight"], before["parameter/0.weight"])


@pytest.mark.parametrize("fused", [None, True])
def test_a_step_that_another_process_cannot_do_is_skipped_here_too(fused, accelerator, monkeypatch):
    module, state = make(fused)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(Accelerator, "reduce", lambda self, tensor, reduction: tensor + 1)
    guard = GuardedSteps(state, accelerator, shared=True, max_grad_norm=1.0)
    before = copy.deepcopy(state.tensors())
    assert run(module, guard, [SOUND]) == [Outcome.NO_LOSS]
    assert all(torch.equal(before[f"parameter/{name}"], value) for name, value in module.named_parameters())
    alone = GuardedSteps(state, accelerator, shared=False, max_grad_norm=1.0)
    assert run(module, alone, [SOUND]) == [Outcome.DONE]


def test_a_gradient_whose_square_overflows_is_skipped(accelerator):
    module, state = make(None)
    guard = GuardedSteps(state, accelerator, shared=False, max_grad_norm=1.0)
    guard.begin()
    (module[0].weight.sum() * 1e30).backward()
    assert torch.isfinite(module[0].weight.grad).all()
    assert guard.end([torch.tensor(1.0)]) == Outcome.NO_GRADIENT


def test_the_count_goes_by_rows(accelerator):
    _, state = make(None)
    guard = GuardedSteps(state, accelerator, shared=False, max_grad_norm=None)
    for outcome in (Outcome.NO_LOSS, Outcome.NO_GRADIENT):
        guard.count(outcome)
    assert not guard.exceed(2)
    assert guard.exceed(1)
    _, kept = make(None)
    kept.load(state.tensors(), state.numbers())
    assert kept.skipped == state.skipped == {"total": 2, "in_row": 2, "rescaled_in_row": 0}
    guard.count(Outcome.DONE)
    assert state.skipped == {"total": 2, "in_row": 0, "rescaled_in_row": 0}
    assert not guard.exceed(0)
    kept.load(state.tensors(), {"step": "4", "ema_step": "4"})  # of an old checkpoint
    assert kept.skipped == {"total": 0, "in_row": 0, "rescaled_in_row": 0}


def test_fp16_may_search_its_scale(accelerator, monkeypatch):
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu"))
    _, state = make(None)
    guard = GuardedSteps(state, accelerator, shared=False, max_grad_norm=None)
    for _ in range(HALVINGS + 3):
        guard.count(Outcome.NO_GRADIENT)
    assert state.skipped == {"total": HALVINGS + 3, "in_row": 0, "rescaled_in_row": HALVINGS + 3}
    assert not guard.exceed(3)
    assert guard.exceed(2)
    # A loss that is not finite is no matter of scale.
    guard.count(Outcome.NO_LOSS)
    assert (state.skipped["total"], state.skipped["in_row"]) == (HALVINGS + 4, 1)


def test_fp16_s_scaler_skips_the_same_steps(accelerator, monkeypatch):
    """With the scaler that fp16 takes, here one for the CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    monkeypatch.setattr(accelerator, "scaler", scaler)
    module, state = make(True)
    guard = GuardedSteps(state, accelerator, shared=False, max_grad_norm=None)

    def step(loss_seen=1.0, factor=1.0):
        guard.begin()
        loss = module[0](torch.ones(1, 3)).square().mean()
        scaler.scale(loss * factor).backward()
        # Its parameters have a part in no loss, and so no gradient.
        assert module[1].weight.grad is None
        return guard.end([torch.tensor(loss_seen)])

    assert step() == Outcome.DONE
    before = state.tensors()
    assert step(loss_seen=math.inf) == Outcome.NO_LOSS
    assert step(factor=1e38) == Outcome.NO_GRADIENT
    after = state.tensors()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert scaler.get_scale() == 2.0**8
    assert step() == Outcome.DONE
    assert not torch.equal(state.tensors()["parameter/0.weight"], before["parameter/0.weight"])


TWO_PROCESSES = """
import sys
import torch
from accelerate import Accelerator
from test_guarded_steps import GuardedSteps, make

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
module, state = make(True if sys.argv[1] == "fused" else None)
guard = GuardedSteps(state, accelerator, shared=True, max_grad_norm=1.0)
shared = accelerator.prepare_model(module)
outcomes = []
for step in range(6):
    torch.manual_seed(2 * step + accelerator.process_index)
    guard.begin()
    loss = shared(torch.randn(4, 3)).square().mean()
    # Steps 1 and 4: one process has a loss that is not finite, and a gradient that is. Step 2: a gradient.
    if accelerator.process_index == step % 2 and step == 2:
        loss = loss * float("nan")
    accelerator.backward(loss)
    lost = accelerator.process_index == step % 2 and step in (1, 4)
    before = state.tensors()
    outcomes.append(int(guard.end([torch.tensor(float("inf")) if lost else loss.detach()])))
    changed = any(not torch.equal(before[name], value) for name, value in state.tensors().items() if "parameter/" in name)
    assert changed == (outcomes[-1] == 0)
own = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
both = accelerator.gather(own).reshape(2, -1)
assert torch.equal(both[0], both[1]) and torch.isfinite(both).all()
seen = accelerator.gather(torch.tensor(outcomes)).reshape(2, -1).tolist()
assert [[min(code, 1) for code in row] for row in seen] == [[0, 1, 1, 0, 1, 0]] * 2, seen
assert seen[0][1] == seen[1][1] == seen[0][4] == seen[1][4] == 2, seen
# Else gloo may abort the process at its end.
del shared, loss
accelerator.free_memory()
accelerator.end_training()
"""


@pytest.mark.parametrize(
    "kind", [pytest.param("plain", marks=pytest.mark.slow), pytest.param("fused", marks=pytest.mark.soak)]
)
def test_two_processes_skip_alike(kind, tmp_path):
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [*torchrun(2), str(tmp_path / "script.py"), kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
