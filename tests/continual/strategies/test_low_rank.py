"""Strategies of one LoRA after another, on a tiny U-Net: starts that change nothing, and what is left of a task."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from runs import make_tiny_unet
from safetensors.torch import load_file
from strategies import learn, make_strategy

from funlora_hf.continual.strategies.low_rank import add_deltas, get_pairs, set_pairs
from funlora_hf.continual.strategies.merging_rules import pack, unpack
from funlora_hf.continual.strategies.weight_changes import Pair


STARTING_FRESH = [
    ("merge_init", {}),
    ("merge_orthogonal", {}),
    ("merge_orthogonal", {"merge": "svd"}),
    ("merge_orthogonal", {"merge": "dense"}),
    ("merge_orthogonal", {"merge": "factor_sum", "orthogonal": "released"}),
    ("magmax", {}),
    ("magmax", {"compared": "cumulative"}),
    ("inc_lora", {}),
    ("o_lora", {}),
    ("clora", {}),
]
TARGETS = ["attention", "convolutions", "both"]


def learned_pairs(strategy, seed):
    """What a task might have learned: pairs of every layer that the strategy adapts."""
    torch.manual_seed(seed)
    layers = dict(make_tiny_unet().named_modules())
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name in strategy.target_modules(make_tiny_unet()):
        weight = layers[name].weight.flatten(1)
        A = torch.randn(strategy.rank, weight.shape[1], generator=generator) / 4
        pairs[name] = Pair(A, torch.randn(len(weight), strategy.rank, generator=generator) / 4)
    return pairs


def output(module):
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(4, 1, 8, 8, generator=generator)
    with torch.no_grad():
        return module.eval()(sample, torch.tensor(500.0), torch.tensor([0, 1, 0, 1]), return_dict=False)[0]


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize(("name", "options"), STARTING_FRESH)
def test_a_fresh_pair_changes_no_output_by_a_bit(name, options, targets, tmp_path):
    strategy = make_strategy(name, tmp_path, strategy_options={"targets": targets, **options})
    kept = strategy.rule.merge({}, learned_pairs(strategy, 1))
    expected = make_tiny_unet()
    add_deltas(expected, strategy.rule.training_deltas(kept))
    assert not torch.equal(output(expected), output(make_tiny_unet()))
    trainable = strategy.trainable(make_tiny_unet(), kept)
    pairs = get_pairs(trainable.module)
    assert all(not B.any() and A.any() for A, B in pairs.values())
    assert torch.equal(output(trainable.module), output(expected))


def test_naive_lora_goes_on_with_its_pair_on_the_base(tmp_path):
    strategy = make_strategy("naive_lora", tmp_path)
    learned = learned_pairs(strategy, 1)
    kept = strategy.rule.merge({}, learned)
    trainable = strategy.trainable(make_tiny_unet(), kept)
    for layer, pair in get_pairs(trainable.module).items():
        assert torch.equal(pair.A, learned[layer].A)
        assert torch.equal(pair.B, learned[layer].B)
    merged = make_tiny_unet()
    strategy.load(merged, kept)
    torch.testing.assert_close(output(trainable.module), output(merged))


@pytest.mark.parametrize(("name", "options"), [("naive_lora", {}), *STARTING_FRESH])
def test_only_the_lora_and_the_class_vectors_are_trained(name, options, tmp_path):
    strategy = make_strategy(name, tmp_path, strategy_options=options)
    trainable = strategy.trainable(make_tiny_unet(), {})
    required = {name for name, p in trainable.module.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "class_embedding" in name for name in required)
    assert len(required) == len(trainable.parameters) == 2 * len(get_pairs(trainable.module)) + 1
    numbers = sum(p.numel() for name, p in trainable.parameters.items() if "lora_" in name)
    assert strategy.trained_bytes(0) == 4 * numbers


@pytest.mark.parametrize("targets", TARGETS)
def test_targets_are_attention_and_the_convolutions_that_funlora_adapts(targets, tmp_path):
    convolution = "up_blocks.0.resnets.0.conv1"
    model = {} if targets == "attention" else {"target_modules": [convolution]}
    strategy = make_strategy("naive_lora", tmp_path, strategy_options={"targets": targets}, model=model)
    attention = [f"mid_block.attentions.0.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    expected = {"attention": attention, "convolutions": [convolution], "both": [*attention, convolution]}[targets]
    assert sorted(strategy.target_modules(make_tiny_unet())) == sorted(expected)


@pytest.mark.parametrize(
    ("given", "count"), [(["conv1", "conv2"], None), (["up_blocks.*conv1"], None), (["0-1"], 2), (None, None)]
)
def test_convolutions_are_named_as_for_funlora(given, count, tmp_path):
    """By the ends of names, one regex, or a preset: PEFT puts FunLoRA onto the same ones."""
    strategy = make_strategy(
        "naive_lora", tmp_path, strategy_options={"targets": "convolutions"}, model={"target_modules": given}
    )
    names = strategy.target_modules(make_tiny_unet())
    funlora = make_strategy("funlora", tmp_path, model={"target_modules": given, "rank": 1})
    model = get_peft_model(make_tiny_unet(), funlora.adapter_config(0))
    assert sorted(names) == sorted(set(model.targeted_module_names) - {"class_embedding"})
    assert len(names) == (count or len(names)) > 0


def test_a_released_start_of_rank_one_is_refused(tmp_path):
    options = {"orthogonal": "released", "merge": "factor_sum"}
    with pytest.raises(ValueError, match="`rank` is 1, for which orthogonal='released' starts A at zero"):
        make_strategy("merge_orthogonal", tmp_path, strategy_options=options, model={"rank": 1})


def test_layers_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"`target_modules` \['conv_nowhere'\], which name no layer of the U-Net"):
        make_strategy(
            "naive_lora",
            tmp_path,
            strategy_options={"targets": "convolutions"},
            model={"target_modules": ["conv_nowhere"]},
        )


def products(pairs):
    return {layer: pair.B @ pair.A for layer, pair in pairs.items()}


def test_merge_init_adds_products(tmp_path):
    strategy = make_strategy("merge_init", tmp_path)
    first, second = learned_pairs(strategy, 1), learned_pairs(strategy, 2)
    kept = strategy.rule.merge(strategy.rule.merge({}, first), second)
    for layer, delta in strategy.rule.deltas(kept).items():
        torch.testing.assert_close(delta, products(first)[layer] + products(second)[layer])


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """The weights at the end of a short run with some options."""
    found = {}

    def get(name, **options):
        key = (name, *options.items())
        if key not in found:
            folder = tmp_path_factory.mktemp(name)
            learn(make_strategy(name, folder, strategy_options=options))
            found[key] = load_file(folder / "model/unet/diffusion_pytorch_model.safetensors")
        return found[key]

    return get


def test_inc_lora_is_merge_init_kept_as_pairs(generator):
    kept_apart, added = generator("inc_lora"), generator("merge_init")
    for name, tensor in added.items():
        torch.testing.assert_close(kept_apart[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "plain"), [("o_lora", "inc_lora"), ("clora", "merge_init")])
def test_a_penalty_of_zero_changes_nothing(name, plain, generator):
    free, held, expected = generator(name, penalty=0), generator(name, penalty=10), generator(plain)
    assert all(torch.equal(free[key], tensor) for key, tensor in expected.items())
    assert not all(torch.equal(held[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", ["o_lora", "clora"])
def test_a_penalty_acts_in_its_phase_only(name, tmp_path):
    strategy = make_strategy(name, tmp_path, strategy_options={"penalty": 2.0, "targets": "both"})
    assert strategy.penalty() == 0.0
    learned, other = learned_pairs(strategy, 1), learned_pairs(strategy, 2)
    trainable = strategy.trainable(make_tiny_unet(), {})
    assert strategy.penalty() == 0.0
    kept = strategy.rule.merge({}, learned)
    trainable = strategy.trainable(make_tiny_unet(), kept)
    set_pairs(trainable.module, other)
    torch.testing.assert_close(strategy.penalty(), strategy.rule.penalty(kept, other))
    strategy.penalty().backward()
    assert trainable.parameters["class_embedding.weight"].grad is None
    strategy.release_phase(None, trainable)
    assert strategy.penalty() == 0.0


def test_clora_logs_the_norm_of_a_product(tmp_path, caplog):
    strategy = make_strategy("clora", tmp_path)
    trainable, pairs = strategy.trainable(make_tiny_unet(), {}), learned_pairs(strategy, 1)
    set_pairs(trainable.module, pairs)
    with caplog.at_level("INFO"):
        strategy.learned(trainable, {})
    norm = torch.cat([one.flatten() for one in products(pairs).values()]).norm()
    assert float(caplog.messages[-1].rpartition(" ")[2]) == pytest.approx(norm.item(), rel=1e-2)


@pytest.mark.parametrize("merge", ["concat", "dense", "svd", "factor_sum"])
def test_merge_orthogonal_keeps_the_sum_in_the_form_asked_for(merge, tmp_path):
    strategy = make_strategy("merge_orthogonal", tmp_path, strategy_options={"merge": merge})
    first, second = learned_pairs(strategy, 1), learned_pairs(strategy, 2)
    kept = strategy.rule.merge(strategy.rule.merge({}, first), second)
    rank = {"concat": 4, "svd": 2, "factor_sum": 2}.get(merge)
    for layer, delta in strategy.rule.deltas(kept).items():
        total = products(first)[layer] + products(second)[layer]
        if merge == "factor_sum":
            cross = first[layer].B @ second[layer].A + second[layer].B @ first[layer].A
            torch.testing.assert_close(delta, total + cross)
        elif merge == "svd":
            error = torch.linalg.svdvals(total)[2:].norm()
            torch.testing.assert_close((delta - total).norm(), error)
        else:
            torch.testing.assert_close(delta, total)
        assert rank is None or kept[f"{layer}/A"].shape[0] == rank


@pytest.mark.parametrize("merge", ["concat", "dense", "svd"])
def test_a_task_starts_where_earlier_ones_react_to_nothing(merge, tmp_path):
    strategy = make_strategy("merge_orthogonal", tmp_path, strategy_options={"merge": merge})
    kept = strategy.rule.merge(strategy.rule.merge({}, learned_pairs(strategy, 1)), learned_pairs(strategy, 2))
    start = get_pairs(strategy.trainable(make_tiny_unet(), kept).module)
    for layer, delta in strategy.rule.deltas(kept).items():
        assert (delta @ start[layer].A.T).norm() < 1e-5 * delta.norm() * start[layer].A.norm()


@pytest.mark.parametrize("merge", ["concat", "dense", "svd"])
def test_a_nullspace_that_would_run_out_is_refused_before_the_start(merge, tmp_path):
    """Two later tasks of 9 dimensions each, and attention of 16 inputs."""
    with pytest.raises(ValueError, match=r"before the last of 2 tasks with `rank` 9 .* would have 9 of its 16"):
        make_strategy("merge_orthogonal", tmp_path, strategy_options={"merge": merge}, model={"rank": 9})
    make_strategy("merge_orthogonal", tmp_path, strategy_options={"merge": merge}, model={"rank": 8})
    assert not list(tmp_path.iterdir())


def test_magmax_compares_a_task_s_own_change_or_all_changes(tmp_path):
    running, cumulative = (
        make_strategy("magmax", tmp_path, strategy_options=options)
        for options in ({}, {"compared": "cumulative", "scaling": 0.5})
    )
    pairs = [learned_pairs(running, seed) for seed in (1, 2, 3)]
    kept, kept_all = {}, {}
    for learned in pairs:
        kept, kept_all = running.rule.merge(kept, learned), cumulative.rule.merge(kept_all, learned)
    layer = next(iter(pairs[0]))
    changes = torch.stack([products(learned)[layer] for learned in pairs])
    sums = changes.cumsum(dim=0)
    for strategy, state, candidates, scale in ((running, kept, changes, 1), (cumulative, kept_all, sums, 0.5)):
        largest = candidates.abs().argmax(dim=0, keepdim=True)
        expected = candidates.gather(0, largest)[0] * scale
        torch.testing.assert_close(strategy.rule.deltas(state)[layer], expected)
    torch.testing.assert_close(running.rule.training_deltas(kept)[layer], running.rule.deltas(kept)[layer])
    torch.testing.assert_close(cumulative.rule.training_deltas(kept_all)[layer], sums[-1])


def test_pairs_survive_the_file_and_the_model(tmp_path):
    strategy = make_strategy("naive_lora", tmp_path, strategy_options={"targets": "both"})
    pairs = learned_pairs(strategy, 1)
    assert list(unpack(pack(pairs))) == list(pairs)
    model = strategy.trainable(make_tiny_unet(), {}).module
    set_pairs(model, unpack(pack(pairs)))
    for layer, pair in get_pairs(model).items():
        assert torch.equal(pair.A, pairs[layer].A)
        assert torch.equal(pair.B, pairs[layer].B)


def test_adding_deltas_is_merging_the_lora(tmp_path):
    """PEFT's own merge gives the same weights."""
    strategy = make_strategy("naive_lora", tmp_path, strategy_options={"targets": "both"})
    pairs = learned_pairs(strategy, 1)
    trainable = strategy.trainable(make_tiny_unet(), {})
    set_pairs(trainable.module, pairs)
    config = trainable.module.peft_config["default"]
    other = get_peft_model(make_tiny_unet(), copy.deepcopy(config))
    set_pairs(other, pairs)
    merged, added = other.merge_and_unload(), make_tiny_unet()
    add_deltas(added, products(pairs))
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(added.state_dict()[key], tensor)
