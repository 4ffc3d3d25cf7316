"""Gradient fusion: its minimum, the inputs that it is given, and the pipelines that draw with its result."""

from __future__ import annotations

import pytest
import torch
from concept_strategies import SAMPLING, contents, learn, make_pipe, make_strategy, samples
from diffusers import StableDiffusionPipeline

from funlora_hf.continual.strategies.merging_rules import only
from funlora_hf.continual.strategies.weight_changes import Pair, product
from funlora_hf.personalization.drawing import draw
from funlora_hf.personalization.export import export_concepts
from funlora_hf.personalization.load_concept import load_concept
from funlora_hf.personalization.sampling import sample_prompts
from funlora_hf.personalization.strategies.mix_of_show import fused_change, recorded


def problem(concepts, inputs=3):
    draw = torch.Generator().manual_seed(0)
    shapes = ((concepts, 6, 8), (concepts, 8, inputs))
    return (list(torch.randn(*shape, generator=draw, dtype=torch.float64)) for shape in shapes)


def solve(changes, X, ridge):
    grams = [one @ one.T for one in X]
    wanted = sum(change @ gram for change, gram in zip(changes, grams, strict=True))
    return fused_change(wanted, sum(grams), ridge).double()


@pytest.mark.parametrize(("ridge", "tolerance"), [(0.0, 1e-5), (1e-6, 1e-3)])
def test_one_concept_keeps_its_outputs(ridge, tolerance):
    """With fewer inputs than dimensions; other inputs change as little as they can."""
    (change,), X = problem(1)
    fused = solve([change], X, ridge)
    torch.testing.assert_close(fused @ X[0], change @ X[0], rtol=0, atol=tolerance)
    outside = torch.linalg.svd(X[0].T).Vh[3:]
    torch.testing.assert_close(fused @ outside.T, torch.zeros(6, 5, dtype=torch.float64), rtol=0, atol=tolerance)


def test_concepts_on_independent_inputs_all_keep_theirs():
    changes, X = problem(2)
    fused = solve(changes, X, 0.0)
    for change, of_concept in zip(changes, X, strict=True):
        torch.testing.assert_close(fused @ of_concept, change @ of_concept, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_the_minimum_is_that_of_lbfgs(ridge):
    """As the authors solve it, from no change, with more inputs than can be met."""
    changes, X = problem(3, inputs=5)
    W = torch.zeros(6, 8, dtype=torch.float64, requires_grad=True)
    weight = ridge * sum((x @ x.T).diagonal() for x in X).mean()
    optimizer = torch.optim.LBFGS(
        [W], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = sum(((D - W) @ x).square().sum() for D, x in zip(changes, X, strict=True)) + weight * W.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(solve(changes, X, ridge), W.detach(), rtol=0, atol=1e-5)


def test_inputs_are_summed_up():
    layer = torch.nn.Linear(4, 2)
    model, inputs = torch.nn.Sequential(layer), torch.randn(3, 5, 4)
    with recorded(model, ["0"]) as found:
        for one in inputs:
            model(one[None])
    model(inputs)
    X = inputs.flatten(0, 1).double()
    torch.testing.assert_close(found["0"], X.T @ X)


def test_a_run_of_one_concept_is_its_lora(tmp_path):
    """The fused weights give the states of its prompts what W0 + alpha B A gives, and other layers their inputs likewise."""
    options = {"merge_weight": 0.7, "fusion_steps": 2, "ridge": 0.0}
    strategy = learn(make_strategy("mix_of_show", tmp_path / "run", nouns="b", strategy_options=options))
    kept, concept = strategy.load(strategy.setting.tasks), strategy.setting.concepts[0]
    own, fused = strategy.rule.own(kept, 0), only(kept, "delta")
    assert fused.keys() == own.keys() == set(strategy.target_modules())
    A, B = (only(kept, f"{part}_0") for part in "AB")
    strategy.load_rows([0])
    layers = strategy.rows.layers
    for name, change in own.items():
        torch.testing.assert_close(change, 0.7 * product(Pair(A[name], B[name])))
    for name in strategy.model.layers("kv"):
        for prompt in ("<v0> b", "photo of a <v0> b"):
            states = layers.own(layers.names.index(name.removesuffix(name[-5:])), strategy.states(prompt)[-3:])
            wanted = states @ own[name].double().T
            assert wanted.abs().max() > 1e-3
            torch.testing.assert_close(states @ fused[name].double().T, wanted, rtol=0, atol=1e-5)
    others = sorted(own.keys() - set(strategy.model.layers("kv")))
    for name, gram in strategy._grams(
        others, {**own, **fused, **{name: own[name] for name in others}}, concept
    ).items():
        error = fused[name].double() - own[name].double()
        squares = [((change @ gram) * change).sum() for change in (error, own[name].double())]
        assert squares[0] < 1e-6 * squares[1], name


def test_each_and_end_give_one_model(tmp_path):
    """Until the end, a concept is drawn with its own LoRA."""
    seen, fused = {}, {}
    for fuse in ("each", "end"):
        options = {"fuse": fuse, "fusion_steps": 2, "ridge": 1e-6}
        strategy = make_strategy("mix_of_show", tmp_path / fuse, nouns="bc", strategy_options=options)

        class Listener:
            def end_task(self, task, strategy=strategy, fuse=fuse):
                seen[fuse, task.index] = samples(strategy, 0)
                fused[fuse, task.index] = bool(only(strategy.load(strategy.setting.tasks), "delta"))

        learn(strategy, listeners=[Listener()])
    assert fused == {("each", 0): True, ("each", 1): True, ("end", 0): False, ("end", 1): True}
    each, end = (
        {k: v for k, v in contents(tmp_path / fuse).items() if not k.endswith(".json")} for fuse in ("each", "end")
    )
    assert each == end
    # One concept alone: its LoRA on its inputs, up to rounding and the ridge.
    assert (seen["each", 0].int() - seen["end", 0].int()).abs().float().mean() < 3
    assert not torch.equal(seen["end", 0], seen["end", 1])


def test_the_model_and_the_rows_draw_the_runs_images(tmp_path):
    """In a stock pipeline, by load_concept and by `funlora sample`."""
    strategy = learn(make_strategy("mix_of_show", tmp_path / "run", nouns="bc", strategy_options={"fusion_steps": 2}))
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "run/model")
    pipe.set_progress_bar_config(disable=True)
    for name in ("b0", "c1"):
        load_concept(pipe, tmp_path / "run/concepts" / name)
    found = draw(pipe, ["a <v1> c"], 2, purpose="test", seed=0, resolution=8, config=SAMPLING)
    # Weights that were read from a file lie elsewhere in memory, which may change the last bit of a sum.
    assert (found.int() - samples(strategy, 1).int()).abs().max() <= 1
    with strategy.sampling(1) as own:
        how = {"purpose": "funlora sample", "seed": 0, "resolution": 8, "config": SAMPLING}
        expected = draw(own, ["a <v1> c"], 2, **how)
    sampled = sample_prompts(tmp_path / "run", ["a <v1> c"], num_images=2, num_inference_steps=2)
    assert (sampled[0].images.int() - expected.int()).abs().max() <= 1
    with pytest.raises(ValueError, match="has a token with rows for each cross-attention layer"):
        export_concepts(tmp_path / "run", tmp_path / "exported")


def test_the_base_without_its_tokens_is_refused(tmp_path):
    learn(make_strategy("mix_of_show", tmp_path / "run", nouns="b", strategy_options={"fusion_steps": 1}))
    card = (tmp_path / "run/concepts/b0/README.md").read_text()
    assert 'from_pretrained("path/to/the/run/model")\nload_concept(pipe, "path/to/this/folder")' in card
    with pytest.raises(ValueError, match="its strategy 'mix_of_show' changed the model"):
        load_concept(make_pipe(), tmp_path / "run/concepts/b0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fuse": "never"}, "`fuse` is 'never'"),
        ({"ridge": -1.0}, "`ridge` is -1.0, expected a number of at least 0"),
        ({"fusion_steps": 0}, "`fusion_steps`"),
        ({"merge_weight": 0}, "`merge_weight` is 0, expected a number above 0"),
        ({"alpha": 1}, "has 'alpha'"),
    ],
)
def test_refused_options(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_strategy("mix_of_show", tmp_path / "run", strategy_options=options)


def test_convolutions_and_other_families_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"which is no linear layer, and `strategy` 'mix_of_show' fuses linear layers only"
    ):
        make_strategy("mix_of_show", tmp_path / "run", arguments={"target_modules": "convolutions"})
    with pytest.raises(ValueError, match="family 'sdxl', expected 'sd'"):
        make_strategy("mix_of_show", tmp_path / "run", family="sdxl")
