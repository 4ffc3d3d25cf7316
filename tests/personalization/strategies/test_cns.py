"""CNS as it is reconstructed: its masks, what they leave alone, and the term that ties entries."""

from __future__ import annotations

import random

import pytest
import torch
from concept_strategies import contents, learn, make_strategy

from funlora_hf.personalization.strategies import cns


def make_cns(folder, nouns=("b", "c", "b"), **options):
    training = {name: options.pop(name) for name in ("concept_learning_rate",) if name in options}
    options = {"base_fraction": 0.4, "general_share": 1.0, **options}
    return make_strategy("cns", folder, nouns=nouns, strategy_options=options, **training)


def masks(strategy, class_id=0):
    return strategy.masks(class_id, strategy.support({}))


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def spy(strategy):
    """The weights of each task at its start and its end, and its masks."""
    found, build, end = [], strategy.build, strategy.end_phase

    def values():
        return {name: strategy.weight(name).detach().clone() for name in strategy._masks}

    def built(phase):
        trainable = build(phase)
        found.append((values(), strategy._masks))
        return trainable

    def ended(phase, trainable):
        found[-1] = (*found[-1], values())
        end(phase, trainable)

    strategy.build, strategy.end_phase = built, ended
    return found


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_entries_outside_the_mask_stay(tmp_path, penalty):
    """To the bit, with Adam's momentum and the moving average; so do entries of earlier concepts in what is kept."""
    strategy = make_cns(tmp_path / "run", penalty=penalty)
    tasks = spy(strategy)
    learn(strategy)
    assert len(tasks) == 3
    for before, mask, after in tasks:
        assert 0 < sum(int(one.sum()) for one in mask.values()) < strategy.trained_numbers()
        for name, one in mask.items():
            assert torch.equal(before[name][~one], after[name][~one])
        assert any(bool((before[name] != after[name])[one].any()) for name, one in mask.items())
    assert equal(tasks[0][1], tasks[2][1])
    assert strategy.details()["mask_overlaps"][2] == 1.0
    support = strategy.support(strategy.load(strategy.setting.tasks))
    assert equal(support, {name: tasks[0][1][name] | tasks[1][1][name] for name in support})


def test_general_entries_are_left_out(tmp_path):
    strategy = make_cns(tmp_path / "run")
    general = strategy.general_masks()
    assert all(
        bool(one.any()) and not bool((one & mask).any())
        for one, mask in zip(general.values(), masks(strategy).values(), strict=True)
    )
    everything = make_cns(tmp_path / "all", general_share=1.5)
    assert equal(masks(everything), everything.base_masks(0))
    with pytest.raises(
        ValueError, match=r"finds no entry to train for the concept 'b0', with base_fraction=0.4 and general_share=0"
    ):
        make_cns(tmp_path / "none", general_share=0.0)
    assert not (tmp_path / "none").exists()


def test_all_entries_without_penalty_are_custom_diffusion(tmp_path):
    one = make_cns(tmp_path / "cns", base_fraction=1.0, general_share=2.0, penalty=0.0)
    other = make_strategy("custom_diffusion", tmp_path / "custom")
    tasks, weights = spy(one), []
    end = other.end_phase

    def ended(phase, trainable):
        weights.append({name: other.weight(name).detach().clone() for name in other._originals})
        end(phase, trainable)

    other.end_phase = ended
    learn(one)
    learn(other)
    # Step for step: losses, rows, weights.
    assert all(equal(mine[2], theirs) for mine, theirs in zip(tasks, weights, strict=True))
    found, expected = contents(tmp_path / "cns"), contents(tmp_path / "custom")
    same = [path for path in expected if path.startswith(("concepts", "model")) and path.endswith(".safetensors")]
    assert len(same) == 3 + 3
    assert all(found[path] == expected[path] for path in same)


def test_masks_depend_on_the_base_and_the_noun_only(tmp_path, monkeypatch):
    strategy = make_cns(tmp_path / "run")
    other = make_cns(tmp_path / "other", nouns=("c", "b"))
    assert equal(masks(strategy, 0), masks(other, 1))
    captions = cns.usual_captions(tiny=False)
    random.Random(0).shuffle(captions)
    monkeypatch.setattr(cns, "usual_captions", lambda tiny: captions)
    shuffled = make_cns(tmp_path / "shuffled")
    assert equal(shuffled.general_masks(), strategy.general_masks())
    texts = ["a b", "c d", "a photo of a b"]
    assert equal(strategy._top(texts), strategy._top(texts[::-1]))


def test_excluded_entries_never_change(tmp_path):
    strategy = make_cns(tmp_path / "run", nouns=("b", "c", "d"), overlap="excluded")
    tasks = spy(strategy)
    learn(strategy)
    for i, (_, mask, _) in enumerate(tasks):
        for _, other, _ in tasks[:i]:
            assert not any(bool((mask[name] & other[name]).any()) for name in mask)
    values = strategy.deltas(strategy.load(strategy.setting.tasks))
    for _, mask, after in tasks:
        for name, one in mask.items():
            assert torch.equal(tasks[-1][2][name][one], after[name][one])
            original = strategy._originals[name]
            assert torch.equal(values[name][one], (after[name] - original)[one])
    with pytest.raises(
        ValueError, match=r"for the concept 'b2', .* overlap=excluded, since earlier concepts have them all: take"
    ):
        make_cns(tmp_path / "same", overlap="excluded")
    assert not (tmp_path / "same").exists()


def test_the_term_that_ties(tmp_path):
    """It is 0, without a gradient, where a task starts; with a large weight, entries stay within two steps of Adam."""
    strategy = make_cns(tmp_path / "run", penalty=1e6, concept_learning_rate=1e-2)
    tasks, build, starts = spy(strategy), strategy.build, []

    def built(phase):
        trainable = build(phase)
        penalty = strategy.penalty()
        penalty.backward()
        gradients = [strategy.weight(name).grad for name in strategy._masks]
        starts.append((penalty.item(), max(one.abs().max().item() for one in gradients)))
        for name in strategy._masks:
            strategy.weight(name).grad = None
        return trainable

    strategy.build = built
    learn(strategy)
    # Of the third, all entries are also those of the first.
    assert starts[0] == starts[2] == (0.0, 0.0)
    for before, _, after in tasks:
        assert max((after[name] - before[name]).abs().max().item() for name in after) <= 2e-2


def test_the_term_by_hand(tmp_path):
    strategy = make_cns(tmp_path / "run", penalty=2.0, gamma=0.5)
    learn(strategy)
    again = make_cns(tmp_path / "run", penalty=2.0, gamma=0.5)
    again.kept.path(strategy.setting.tasks[2]).rename(again.kept.path(strategy.setting.tasks[0]))
    (phase,) = again.phases(again.setting.tasks[1])
    trainable = again.build(phase)
    support, expected = again.support(again.kept_before(phase)), 0.0
    for name, mask in again._masks.items():
        weight, start = again.weight(name), again.weight(name).detach().clone()
        draw = torch.Generator().manual_seed(0)
        weight.data += torch.randn(weight.shape, generator=draw)
        for w, s, o, m, u in zip(
            *(one.detach().flatten().tolist() for one in (weight, start, again._originals[name], mask, support[name])),
            strict=True,
        ):
            expected += m * ((w - s) ** 2 if u else 0.5 * (w - o) ** 2)
    assert again.penalty().item() == pytest.approx(2 * expected, rel=1e-4)
    again.release_phase(phase, trainable)


def test_scores(tmp_path, monkeypatch):
    """|W| times the size of the states: a larger row wins, larger states change nothing, K and V differ by W only."""
    strategy = make_cns(tmp_path / "run")
    before, states = strategy.base_masks(0), strategy.states
    monkeypatch.setattr(strategy, "states", lambda text: 3 * states(text))
    assert equal(strategy.base_masks(0), before)
    key, value = list(strategy._originals)[:2]
    assert key.endswith("to_k")
    assert value == key[:-1] + "v"
    strategy._originals[key][0] *= 1e6
    assert strategy.base_masks(0)[key][0].all()
    strategy._originals[value] = -strategy._originals[key]
    found = strategy.base_masks(0)
    assert torch.equal(found[key], found[value])
