"""Which tensors hft freezes, and that they stay equal to the bit."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from strategies import TASKS, learn, make_strategy

from funlora_hf.continual.strategies.hft import blocks
from funlora_hf.continual.strategies.sequential import CLASS_VECTORS


def test_blocks():
    """Those of a U-Net with attention, and of a transformer whose blocks have tensors of their own."""
    transformer = "down.0.attentions.0.transformer_blocks.0"
    expected = {
        "": ["conv_in.weight", "conv_in.bias", "conv_out.weight"],
        "time": ["time.linear_1.weight", "time.linear_2.weight"],
        "down.0.resnets.0": ["down.0.resnets.0.norm1.weight", "down.0.resnets.0.conv1.weight"],
        "down.0.attentions.0": ["down.0.attentions.0.norm.weight", "down.0.attentions.0.proj_in.weight"],
        transformer: [f"{transformer}.norm1.weight", f"{transformer}.norm2.bias"],
        f"{transformer}.attn1": [f"{transformer}.attn1.to_q.weight", f"{transformer}.attn1.to_out.0.weight"],
        f"{transformer}.ff.net": [f"{transformer}.ff.net.0.proj.weight", f"{transformer}.ff.net.2.weight"],
        "down.0": ["down.0.downsamplers.0.conv.weight"],
        "blocks.0": ["blocks.0.table"],
        "blocks.0.attn": ["blocks.0.attn.to_q.weight", "blocks.0.attn.to_k.weight"],
    }
    assert blocks([name for names in expected.values() for name in names]) == expected


def trained_in(folder, **options):
    """Names that each task trains, and the generator before and after the tasks, of a run."""
    strategy = make_strategy("hft", folder, **options)
    build, end_phase, trained, generators = strategy.build, strategy.end_phase, [], []

    def built(phase):
        trainable = build(phase)
        trained.append(list(trainable.parameters))
        return trainable

    def ended(phase, trainable):
        end_phase(phase, trainable)
        generators.append({name: one.detach().clone() for name, one in trainable.module.named_parameters()})

    strategy.build, strategy.end_phase = built, ended
    learn(strategy)
    return trained, generators


def test_frozen_tensors_are_equal_to_the_bit(tmp_path):
    (base, *trained), generators = trained_in(tmp_path)
    weights = [name for name in base if name != CLASS_VECTORS]
    for names, before, after in zip(trained, generators, generators[1:], strict=False):
        assert CLASS_VECTORS in names
        for name in weights:
            assert torch.equal(before[name], after[name]) == (name not in names), name
        for block, members in blocks(weights).items():
            assert len(set(members) - set(names)) == len(members) // 2, block
    assert trained[0] != trained[1]
    last = load_file(tmp_path / "model/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(last[name], one) for name, one in generators[-1].items())


def test_the_draw_belongs_to_the_seed(tmp_path):
    runs = [trained_in(tmp_path / str(number), tasks=TASKS[:2], seed=seed)[0] for number, seed in enumerate((0, 0, 1))]
    assert runs[0] == runs[1] != runs[2]


def test_share_1_trains_class_vectors_only(tmp_path):
    (_, names), (before, after) = trained_in(tmp_path, tasks=TASKS[:2], strategy_options={"share": 1})
    assert names == [CLASS_VECTORS]
    assert [name for name in before if name != CLASS_VECTORS and not torch.equal(before[name], after[name])] == []
