"""All weights of a denoiser, trained by the rules of classes: equal to `finetune` where a rule does nothing, and exact files."""

from __future__ import annotations

import pytest
import torch
from concept_strategies import Batches, learn, make_pipe, make_strategy, weights
from diffusers import UNet2DConditionModel

from funlora_hf.continual.strategies.hft import blocks
from funlora_hf.text_to_image.model import TextToImageModel


NOTHING = {
    "l2": {"penalty": 0},
    "ewc": {"penalty": 0, "fisher_batches": 1},
    "hft": {"share": 0},
    "mofo": {"share": 1},
}


def generator(strategy):
    """The denoiser after the last task."""
    return strategy.deltas(strategy.load(strategy.setting.tasks))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return generator(learn(make_strategy("finetune", tmp_path_factory.mktemp("plain") / "run")))


@pytest.mark.parametrize("name", NOTHING)
def test_with_nothing_to_protect_it_is_finetune(name, plain, tmp_path):
    found = generator(learn(make_strategy(name, tmp_path / "run", strategy_options=NOTHING[name])))
    assert found.keys() == plain.keys()
    assert [key for key in plain if not torch.equal(found[key], plain[key])] == []
    other = {"l2": {"penalty": 100}, "ewc": {"penalty": 100, "fisher_batches": 1}}.get(name)
    other = generator(learn(make_strategy(name, tmp_path / "other", strategy_options=other)))
    assert not all(torch.equal(other[key], plain[key]) for key in plain)


def test_all_parameters_are_trained_and_written(plain, tmp_path):
    strategy = make_strategy("finetune", tmp_path / "run")
    base = {name: one.clone() for name, one in strategy.model.denoiser.named_parameters()}
    assert plain.keys() == base.keys()
    assert [name for name in base if torch.equal(base[name], plain[name])] == []
    learn(strategy)
    saved = dict(UNet2DConditionModel.from_pretrained(tmp_path / "run/model/unet").named_parameters())
    assert all(torch.equal(saved[name], plain[name]) for name in plain)


@pytest.mark.parametrize("name", ["finetune", "ewc"])
def test_a_base_in_half_precision_is_put_back(name, tmp_path):
    """Weights are trained and kept in float32."""
    model = TextToImageModel(make_pipe()).to(torch.bfloat16)
    strategy = make_strategy(name, tmp_path / "run", nouns="bc", model=model)
    base = weights(model)
    learn(strategy)
    for key, one in weights(model).items():
        assert one.dtype == base[key].dtype, key
        assert torch.equal(one, base[key]), key
    kept = generator(strategy)
    assert {one.dtype for one in kept.values()} == {torch.float32}
    assert any(not torch.equal(one.bfloat16().float(), one) for one in kept.values())


def test_frozen_tensors_are_equal_to_the_bit(tmp_path):
    strategy = make_strategy("hft", tmp_path / "run")
    base = {name: one.clone() for name, one in strategy.model.denoiser.named_parameters()}
    build, trained, states = strategy.build, [], [base]

    def built(phase):
        trainable = build(phase)
        trained.append(set(trainable.parameters))
        return trainable

    class Listener:
        def end_task(self, task):
            states.append(generator(strategy))

    strategy.build = built
    learn(strategy, listeners=[Listener()])
    for names, before, after in zip(trained, states, states[1:], strict=False):
        assert any(name.startswith("rows.") for name in names)
        assert {name for name in base if not torch.equal(before[name], after[name])} == names & base.keys()
        for block, members in blocks(base).items():
            assert len(set(members) - names) == len(members) // 2, block
    assert len({frozenset(names & base.keys()) for names in trained}) == 3


def test_a_huge_penalty_holds_the_weights_and_not_the_token(tmp_path):
    rate = 1e-3
    strategy = make_strategy(
        "l2", tmp_path / "run", nouns="b", strategy_options={"penalty": 1e6}, concept_learning_rate=rate
    )
    base = {name: one.clone() for name, one in strategy.model.denoiser.named_parameters()}
    start = strategy.rows.parameters_of("<v0>")["text_encoder"].clone()
    found = generator(learn(strategy))
    assert all((found[name] - one).abs().max() <= 2 * rate for name, one in base.items())
    strategy.load_rows([0])
    assert (strategy.rows.parameters_of("<v0>")["text_encoder"] - start).abs().max() > 2 * rate


def test_fisher(tmp_path):
    """Of the second task, its part in the mean: with the rows of both tokens, at the weights after the task."""
    strategy = make_strategy("ewc", tmp_path / "run", nouns="bc", strategy_options={"fisher_batches": 2})
    first = {}

    class Listener:
        def end_task(self, task):
            first.update(strategy.fisher.load(task)) if task.index == 0 else None

    learn(strategy, listeners=[Listener()])
    again = make_strategy("ewc", tmp_path / "run", nouns="bc", strategy_options={"fisher_batches": 2})
    model, setting = again.model, again.setting
    with torch.no_grad():
        for name, one in generator(strategy).items():
            model.denoiser.get_parameter(name).copy_(one)
    again.load_rows([0, 1])
    *_, phase = again.phases(setting.tasks[1])
    assert phase.name == "fisher_2"
    batches, own = Batches(again)(phase), dict.fromkeys(first.keys() - {"count"}, 0.0)
    model.denoiser.requires_grad_(True)
    for number in range(2):
        batch = batches.batch(number)
        noisy = setting.objective.noisy(batch.latents, batch.noise, batch.times)
        predicted = model(noisy, batch.times, batch.captions)
        model.zero_grad()
        (predicted - batch.noise).square().mean().backward()
        for name in own:
            own[name] = own[name] + model.denoiser.get_parameter(name).grad.square() / 2
    mean = strategy.fisher.load(setting.tasks[1])
    assert mean["count"] == 2
    for name, one in own.items():
        torch.testing.assert_close(mean[name], (first[name] + one) / 2, rtol=1e-3, atol=1e-9, msg=name)


def test_what_is_kept_is_counted(tmp_path):
    reports = {}
    for name in ("finetune", "ewc"):
        options = {"fisher_batches": 1} if name == "ewc" else None
        strategy = learn(make_strategy(name, tmp_path / name, nouns="bc", strategy_options=options))
        reports[name] = strategy.memory_report()
    numbers = sum(one.numel() for one in strategy.model.denoiser.parameters())
    assert reports["finetune"]["persistent"] == 4 * numbers + reports["finetune"]["per_class"]
    assert reports["ewc"]["persistent"] == reports["finetune"]["persistent"] + 4 * numbers + 4
    assert reports["ewc"]["transient"] == reports["finetune"]["transient"] + 4 * numbers
