"""The two losses of CIDM against NumPy, and the images of a run: with one concept, with several, in stock pipelines."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from concept_strategies import SAMPLING, contents, learn, make_pipe, make_strategy, samples
from safetensors.torch import load_file

from funlora_hf.personalization.drawing import draw
from funlora_hf.personalization.export import export_concepts
from funlora_hf.personalization.load_concept import load_concept
from funlora_hf.personalization.sampling import sample_prompts
from funlora_hf.personalization.strategies.cidm import overlap


def factors(*shapes):
    numbers = np.random.default_rng(0)
    return [{name: torch.tensor(numbers.normal(size=(out, 3))) for name, out in shapes} for _ in range(3)]


def by_numpy(new, earlier, loss):
    terms = []
    for old in earlier:
        for layer in old:
            B, past = new[layer].detach().numpy(), old[layer].numpy()
            if loss == "orthogonal":
                terms.append(np.linalg.norm(B.T @ past) ** 2)
            else:
                terms.append(np.mean(np.abs(B @ past.T)) + np.mean((B - 1) ** 2))
    return np.mean(terms)


@pytest.mark.parametrize("loss", ["orthogonal", "released"])
def test_the_losses_equal_their_formulas(loss):
    new, *earlier = factors(("a", 5), ("b", 7))
    np.testing.assert_allclose(overlap(new, earlier, loss), by_numpy(new, earlier, loss))
    assert overlap(new, [], loss) == 0
    B = new["a"].requires_grad_()
    assert torch.autograd.gradcheck(lambda one: overlap({**new, "a": one}, earlier, loss), B)


def test_orthogonal_columns_cost_nothing():
    Q = torch.linalg.qr(torch.randn(8, 6, dtype=torch.float64)).Q
    assert overlap({"a": Q[:, :3]}, [{"a": Q[:, 3:]}], "orthogonal") < 1e-25
    assert overlap({"a": Q[:, :3]}, [{"a": Q[:, :3]}], "orthogonal") == pytest.approx(3)


@pytest.mark.parametrize("loss", ["orthogonal", "released"])
def test_the_penalty_of_a_run(loss, tmp_path):
    """0 in the first task; later, of the LoRAs in the folders of earlier concepts."""
    options = {"loss": loss, "penalty": 2.0}
    strategy = make_strategy("cidm", tmp_path / "run", strategy_options=options)
    seen, end = [], strategy.end_phase

    def note(phase, trainable):
        of_task = {
            key.split(".lora_B")[0]: one.detach() for key, one in trainable.parameters.items() if "lora_B" in key
        }
        past = [
            {
                key.removeprefix("base_model.model.").split(".lora_B")[0]: one
                for key, one in load_file(tmp_path / f"run/concepts/{name}/adapter_model.safetensors").items()
                if "lora_B" in key
            }
            for name in ("b0", "c1")[: len(seen)]
        ]
        expected = 2.0 * by_numpy(of_task, past, loss) if past else 0.0
        assert float(torch.as_tensor(strategy.penalty()).detach()) == pytest.approx(expected, rel=1e-4)
        seen.append(expected)
        end(phase, trainable)

    strategy.end_phase = note
    learn(strategy)
    assert len(seen) == 3
    assert min(seen[1:]) > 0


def test_one_concept_is_its_lora(tmp_path):
    """W + merge_weight B A, whatever the prompt."""
    strategy = learn(make_strategy("cidm", tmp_path / "run", nouns="b", strategy_options={"merge_weight": 0.5}))
    found = samples(strategy, 0)
    folder = tmp_path / "run/concepts/b0"
    tensors = load_file(folder / "adapter_model.safetensors")
    strategy._remove(["b0"])
    with torch.no_grad():
        for name in strategy.target_modules():
            A, B = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
            assert B.abs().max() > 0
            strategy.model.denoiser.get_parameter(f"{name}.weight").add_(0.5 * B @ A)
    expected = draw(strategy.model.pipeline(), ["a <v0> b"], 2, purpose="test", seed=0, resolution=8, config=SAMPLING)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert json.loads((folder / "concept.json").read_text())["mixture_power"] == 4


def test_a_prompt_has_the_same_images_whichever_concepts_are_asked_for(tmp_path):
    """With the default, which differs from equal weights."""
    strategy = learn(make_strategy("cidm", tmp_path / "run", nouns="bc"))
    images = []
    for asked in ((0,), (0, 1), ()):
        with strategy.sampling(*asked) as pipe:
            images.append(draw(pipe, ["a <v0> b"], 2, purpose="test", seed=0, resolution=8, config=SAMPLING))
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


def test_pipelines_with_all_concepts_draw_the_runs_images(tmp_path):
    """By load_concept and by `funlora sample`; the order in which LoRAs are added up may change the last bit."""
    strategy = learn(make_strategy("cidm", tmp_path / "run", nouns="bc"))
    pipe = make_pipe()
    pipe.set_progress_bar_config(disable=True)
    own = samples(strategy, 1)
    for name in ("b0", "c1"):
        load_concept(pipe, tmp_path / "run/concepts" / name)
    assert pipe.unet.active_adapters() == ["b0", "c1"]
    found = draw(pipe, ["a <v1> c"], 2, purpose="test", seed=0, resolution=8, config=SAMPLING)
    assert (found.int() - own.int()).abs().max() <= 1
    card = " ".join((tmp_path / "run/concepts/b0/README.md").read_text().split())
    assert "load the others into the same pipeline, too" in card
    with pytest.raises(ValueError, match="has a token with rows for each cross-attention layer"):
        export_concepts(tmp_path / "run", tmp_path / "exported")


def test_funlora_sample_mixes_all_concepts(tmp_path, monkeypatch):
    strategy = learn(make_strategy("cidm", tmp_path / "run", nouns="bc"))
    monkeypatch.setattr("funlora_hf.personalization.sampling.base_pipeline", lambda *_, **__: make_pipe())
    sampled = sample_prompts(tmp_path / "run", ["a <v1> c", "a b"], num_images=2, num_inference_steps=2)
    assert [one.adapters for one in sampled] == [["b0", "c1"]] * 2
    assert sampled[0].concepts == ["c1"]
    how = {"purpose": "funlora sample", "seed": 0, "resolution": 8, "config": SAMPLING}
    with strategy.sampling() as pipe:
        for one in sampled:
            assert (one.images.int() - draw(pipe, [one.prompt], 2, **how).int()).abs().max() <= 1


def test_earlier_concepts_are_not_trained_further(tmp_path):
    strategy = make_strategy("cidm", tmp_path / "run", nouns="bc")
    files = []

    class Listener:
        def end_task(self, task):
            files.append({k: v for k, v in contents(tmp_path / "run").items() if "/b0/" in k})

    learn(strategy, listeners=[Listener()])
    assert files[0]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "paper"}, "`loss` is 'paper'"),
        ({"penalty": -1}, "`penalty` is -1, expected a number of at least 0"),
        ({"power": -4}, "`power` is -4, expected a number of at least 0"),
        ({"power": 101}, "`power` is 101, .* at most 100"),
        ({"merge_weight": 0}, "`merge_weight` is 0, expected a number above 0"),
        ({"alpha": 1}, "has 'alpha'"),
    ],
)
def test_refused_options(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_strategy("cidm", tmp_path / "run", strategy_options=options)


def test_other_layers_and_families_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`target_modules` has '.*attn1.*', which is no layer of cross-attention"):
        make_strategy("cidm", tmp_path / "run", arguments={"target_modules": "attention"})
    with pytest.raises(ValueError, match="family 'sdxl', expected 'sd'"):
        make_strategy("cidm", tmp_path / "run", family="sdxl")


def test_a_record_of_a_mixture_without_layerwise_rows_is_refused(tmp_path):
    learn(make_strategy("cidm", tmp_path / "run", nouns="b"))
    path = tmp_path / "run/concepts/b0/concept.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layerwise": False}))
    with pytest.raises(ValueError, match=r"is damaged: `mixture_power` is 4.0, expected None without"):
        load_concept(make_pipe(), path.parent)
