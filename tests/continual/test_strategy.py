"""What strategies share."""

import pytest
import torch
from safetensors.torch import save_file

from funlora_hf.continual.config import ContinualTrainingArguments
from funlora_hf.continual.strategy import Batch, tensor_bytes, velocity_losses


def test_a_reordered_batch_has_the_same_samples():
    sample, noise, target = torch.randn(3, 4, 1, 2, 2)
    batch = Batch(sample, torch.tensor([7, 5, 7, 5]), noise, torch.rand(4), target=target)
    order = batch.class_ids.argsort(stable=True)
    moved = batch.reordered(order)
    assert moved.class_ids.tolist() == [5, 5, 7, 7]
    for to, origin in enumerate((1, 3, 0, 2)):
        for name in ("sample", "noise", "sigma", "target"):
            assert torch.equal(getattr(moved, name)[to], getattr(batch, name)[origin])


@pytest.mark.parametrize("given", [False, True])
def test_the_loss_is_that_of_the_batch_s_target(given):
    sample, noise, other = torch.randn(3, 4, 1, 2, 2)
    batch = Batch(sample, torch.zeros(4, dtype=torch.int64), noise, torch.rand(4), target=other if given else None)
    losses = velocity_losses(lambda noisy, *_, **__: (0 * noisy,), batch, batch.class_ids)
    torch.testing.assert_close(losses, (other if given else noise - sample).square().mean(dim=(1, 2, 3)))


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (None, None),
        ([], None),
        ({}, None),
        (["merge=svd", "scaling=1e-1", "n=3"], {"merge": "svd", "scaling": 0.1, "n": 3}),
        (
            ["a=1.5E3", "b=true", "c=null", "d=[1, 2]", "e=x=y"],
            {"a": 1500.0, "b": True, "c": None, "d": [1, 2], "e": "x=y"},
        ),
        ({"merge": "svd"}, {"merge": "svd"}),
    ],
)
def test_options_are_read_as_in_a_recipe(given, options):
    assert ContinualTrainingArguments(strategy_options=given).strategy_options == options


@pytest.mark.parametrize("given", ["merge", "=1", ""])
def test_an_option_without_key_or_value_is_named(given):
    with pytest.raises(ValueError, match=f"`strategy_options` has '{given}', expected key=value"):
        ContinualTrainingArguments(strategy_options=[given])


def test_an_option_that_is_no_yaml_is_named():
    with pytest.raises(ValueError, match=r"`strategy_options` has 'a=\[1', expected a value in YAML"):
        ContinualTrainingArguments(strategy_options=["a=[1"])


def test_bytes_of_tensors_do_not_depend_on_names_or_numbers_of_them(tmp_path):
    tensors = {"a": torch.zeros(3, 5), "b" * 100: torch.zeros(7, dtype=torch.int64)}
    save_file(tensors, tmp_path / "file.safetensors")
    assert tensor_bytes(tmp_path / "file.safetensors") == 3 * 5 * 4 + 7 * 8
