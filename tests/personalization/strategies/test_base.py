"""The loss of all strategies of concepts: prior pictures, penalties, processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from concept_strategies import Batches, contents, learn, make_strategy, write_pictures
from safetensors.torch import load_file

from funlora_hf.personalization.prior import Prior


@pytest.mark.parametrize("shares", [1, 2])
def test_prior_and_penalty_add_up(shares, tmp_path):
    """The mean over the concept's pictures, the prior's weight times the mean over its pictures, and the penalty, once."""
    strategy = make_strategy("naive_lora", tmp_path / "run", nouns="b", arguments={"snr_gamma": 5.0})
    drawn = write_pictures(tmp_path / "class", 2, seed=9)
    prior = Prior({0: dict.fromkeys(drawn, "a b")}, loss_weight=0.7, batch_size=5)
    (phase,) = strategy.phases(strategy.setting.tasks[0])
    batches = Batches(strategy, prior)(phase)
    strategy.penalty = lambda: torch.tensor(11.0)
    trainable = strategy.build(phase)
    with torch.no_grad():
        batch = batches.batch(0)
        noisy = strategy.setting.objective.noisy(batch.latents, batch.noise, batch.times)
        prediction = trainable.module(noisy, batch.times, batch.captions)
        losses = strategy.setting.objective.losses(prediction, batch.latents, batch.noise, batch.times)
        assert batch.captions == ["a <v0> b"] * 3 + ["a b"] * 5
        expected = losses[:3].mean() + 0.7 * losses[3:].mean() + 11
        parts = [batches.batch(0, share=share, num_shares=shares) for share in range(shares)]
        # As the trainer and DDP do.
        found = sum(strategy.training_step(phase, part, trainable.module).sum() / 3 for part in parts)
    torch.testing.assert_close(found, expected)
    strategy.release_phase(phase, trainable)


_PROCESS = """
import sys
from pathlib import Path
from concept_strategies import learn, make_strategy
folder = Path(sys.argv[1])
for name in ("funlora", "joint", "cns", "replay"):
    learn(make_strategy(name, folder / name / "run", concept_batch_size=4))
from accelerate import Accelerator
Accelerator(cpu=True).end_training()
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """To the bit where a process has a concept for itself, else up to rounding: of Adam, in the direction of small gradients."""
    places = {"one": tmp_path / "one", "two": tmp_path / "two"}
    for name in ("funlora", "joint", "cns", "replay"):
        learn(make_strategy(name, places["one"] / name / "run", concept_batch_size=4))
    (tmp_path / "process.py").write_text(_PROCESS)
    for place in places.values():
        place.mkdir(exist_ok=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {
        **os.environ,
        "PYTHONPATH": ":".join([str(Path(__file__).parents[2] / "support"), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }
    done = subprocess.run(
        [*launcher, str(tmp_path / "process.py"), str(places["two"])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (contents(place / "funlora/run") for place in places.values())
    assert one == two
    for name in ("joint", "cns", "replay"):
        files = [path.relative_to(places["one"]) for path in (places["one"] / name).rglob("*.safetensors")]
        assert files
        for path in files:
            expected, found = (load_file(place / path) for place in places.values())
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)
        for file in (places["one"] / name).rglob("seconds/*.json"):
            # The losses of the whole batch, of which each process has a half.
            expected, found = (
                json.loads((place / file.relative_to(places["one"])).read_text()) for place in places.values()
            )
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3)
