"""Pairs that stay, in runs of concepts: what inc_lora and o_lora come to."""

from __future__ import annotations

import pytest
import torch
from concept_strategies import contents, learn, make_strategy
from safetensors.torch import load_file


MODEL = "model/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Folder of a finished run."""
    found = {}

    def get(name, **options):
        key = (name, *options.items())
        if key not in found:
            found[key] = tmp_path_factory.mktemp(name) / "run"
            learn(make_strategy(name, found[key], strategy_options=options))
        return found[key]

    return get


def test_inc_lora_is_merge_init_kept_as_pairs(folder_of):
    kept_apart, added = (load_file(folder_of(name) / MODEL) for name in ("inc_lora", "merge_init"))
    for name, tensor in added.items():
        torch.testing.assert_close(kept_apart[name], tensor, rtol=0, atol=1e-5)


def test_a_penalty_of_zero_changes_nothing(folder_of):
    """Of all files, only those that name their strategy differ."""
    free, held, plain = (
        {path: one for path, one in contents(folder).items() if path.endswith(".safetensors")}
        for folder in (folder_of("o_lora", penalty=0), folder_of("o_lora", penalty=10), folder_of("inc_lora"))
    )
    plain = {path: one for path, one in plain.items() if not path.startswith("checkpoints/strategy")}
    assert MODEL in plain
    assert all(free[path] == one for path, one in plain.items())
    assert held[MODEL] != plain[MODEL]


@pytest.mark.parametrize("orthogonal", ["B", "A"])
def test_a_penalty_makes_pairs_more_orthogonal(orthogonal, folder_of):
    def overlap(folder):
        kept = load_file(folder / "checkpoints/model_changes/task_3.safetensors")
        both = [one if orthogonal == "A" else one.T for name, one in kept.items() if name.endswith(f"/{orthogonal}")]
        return sum((one[:8] @ one[8:].T).abs().sum() for one in both)

    assert overlap(folder_of("o_lora", penalty=10, orthogonal=orthogonal)) < overlap(folder_of("inc_lora"))
