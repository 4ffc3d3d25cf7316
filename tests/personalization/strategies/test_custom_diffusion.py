"""The merge in closed form: its constraint, its minimum, and that it is what a run samples with."""

from __future__ import annotations

import pytest
import torch
from concept_strategies import learn, make_strategy
from diffusers import UNet2DConditionModel
from text_encoders import PIPELINES

from funlora_hf.continual.strategies.merging_rules import only
from funlora_hf.personalization.strategies.custom_diffusion import constrained_merge


def problem():
    """Fewer usual states than dimensions, and a target that is there twice."""
    draw = torch.Generator().manual_seed(0)
    base, regular, targets, change = (
        torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((6, 16), (12, 16), (5, 16), (6, 16))
    )
    targets[3] = targets[1]
    return base, regular, targets, change


def test_the_targets_are_met():
    base, regular, targets, change = problem()
    values = (base + change) @ targets.T
    merged = constrained_merge(base, regular, targets, values)
    torch.testing.assert_close(merged @ targets.T, values, rtol=0, atol=1e-5)
    other = constrained_merge(base, regular, targets, base @ targets.T)
    torch.testing.assert_close(other, base, rtol=0, atol=1e-12)


def test_usual_states_change_least():
    """No other weight that meets the targets changes them less."""
    base, regular, targets, change = problem()
    merged = constrained_merge(base, regular, targets, (base + change) @ targets.T)
    least = ((merged - base) @ regular.T).norm()
    _, _, right = torch.linalg.svd(targets)
    free = right[4:]  # the targets have rank 4
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        move = 0.1 * torch.randn(6, len(free), generator=draw, dtype=torch.float64) @ free
        torch.testing.assert_close((merged + move) @ targets.T, merged @ targets.T)
        assert ((merged + move - base) @ regular.T).norm() > least - 1e-6


def test_constrained_run(tmp_path):
    """Each task starts from the base; the model gives a concept's states the values of its own weights."""
    strategy = make_strategy(
        "custom_diffusion", tmp_path / "run", nouns="b", strategy_options={"merge": "constrained"}
    )
    learn(strategy)
    kept, concept = strategy.load(strategy.setting.tasks), strategy.setting.concepts[0]
    norms = strategy.details()["change_norms"]
    own = torch.cat([one.flatten() for one in only(kept, "own_0").values()])
    assert norms["own"] == [pytest.approx(own.norm().item())]
    assert norms["merged"] != norms["own"][0]
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "run/model/unet")
    strategy.load_rows([0])
    for prompt in (f"{concept.token} b", f"a photo of {concept.token} b"):
        states = strategy.states(prompt)
        assert len(states) == len(prompt.replace(concept.token, "x").replace(" ", "")) + 1
        for name, own in only(kept, "own_0").items():
            base = strategy._originals[name]
            wanted = states @ (base + own).double().T
            assert not torch.allclose(states @ base.double().T, wanted, rtol=0, atol=1e-3)
            torch.testing.assert_close(
                states @ unet.get_parameter(f"{name}.weight").double().T, wanted, rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("merge", ["sequential", "constrained"])
def test_what_is_kept(merge, tmp_path):
    strategy = make_strategy("custom_diffusion", tmp_path / "run", nouns="bc", strategy_options={"merge": merge})
    starts = []
    build = strategy.build

    def recorded(phase):
        trainable = build(phase)
        starts.append({name: one.detach().clone() for name, one in trainable.parameters.items() if "attn2" in name})
        return trainable

    strategy.build = recorded
    learn(strategy)
    kept = strategy.load(strategy.setting.tasks)
    kinds = {name.rpartition("/")[2] for name in kept}
    assert kinds == ({"delta", "own_0", "own_1"} if merge == "constrained" else {"delta"})
    same = all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    assert same == (merge == "constrained")


def test_states_of_several_vectors(tmp_path):
    one, two = (
        make_strategy("custom_diffusion", tmp_path / str(n), nouns="b", arguments={"num_vectors": n}) for n in (1, 2)
    )
    assert len(two.states("<v0> b")) == len(one.states("<v0> b")) + 1 == 4


@pytest.mark.parametrize("family", [family for family in PIPELINES if family not in ("sd", "sdxl")])
def test_transformers_have_no_constrained_merge(family, tmp_path):
    with pytest.raises(ValueError, match=r"'custom_diffusion' .*constrained.* needs layers that read the states"):
        make_strategy("custom_diffusion", tmp_path / "run", family=family, strategy_options={"merge": "constrained"})
