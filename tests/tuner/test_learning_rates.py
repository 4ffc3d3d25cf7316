"""Each kind of parameters gets its own rate, and what has no such parameter is refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from funlora_hf import FunLoraConfig, parameter_groups


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv = nn.Embedding(3, 4), nn.Conv2d(2, 4, 3)

    def forward(self, images, labels):
        return self.conv(images) + self.embedding(labels)[..., None, None]


def adapted(**options):
    torch.manual_seed(0)
    config = FunLoraConfig(target_modules=["conv"], class_embedding="embedding", init_weights=False, **options)
    return get_peft_model(Small(), config)


def by_rate(groups, model):
    names = {parameter: name.removeprefix("base_model.model.") for name, parameter in model.named_parameters()}
    return {group["lr"]: {names[one] for one in group["params"]} for group in groups}


def test_a_group_for_each_rate():
    model = adapted(operation="mul-add")
    groups = parameter_groups(model, 0.25, alpha=8, omega=2, class_vector=0.5)
    assert by_rate(groups, model) == {
        0.25: {f"conv.funlora_{part}{name}.default" for part in ("", "add_") for name in "AB"},
        2.0: {"conv.funlora_alpha.default", "conv.funlora_add_alpha.default"},
        0.5: {"conv.funlora_omega.default", "conv.funlora_add_omega.default"},
        0.125: {"embedding.funlora_class_vector.default"},
    }
    assert len(parameter_groups(model, 0.25)) == 1


def test_a_step_of_sgd_moves_alpha_by_its_multiple():
    images, labels = torch.randn(2, 2, 5, 5), torch.tensor([0, 2])

    def moved(**multiples):
        model = adapted()
        before = {name: one.detach().clone() for name, one in model.named_parameters()}
        model(images, labels).square().mean().backward()
        torch.optim.SGD(parameter_groups(model, 1.0, **multiples)).step()
        return {name: one.detach() - before[name] for name, one in model.named_parameters()}

    one, ten = moved(), moved(alpha=10)
    for name, step in one.items():
        torch.testing.assert_close(ten[name], step * (10 if "alpha" in name else 1), rtol=1e-3, atol=1e-5)
    assert one["base_model.model.conv.funlora_alpha.default"].abs().max() > 0


def test_a_row_that_peft_trains_is_a_class_vector():
    config = LoraConfig(target_modules=["conv"], trainable_token_indices={"embedding": [0]})
    model = get_peft_model(Small(), config)
    rates = by_rate(parameter_groups(model, 1.0, class_vector=3), model)
    assert rates[3.0] == {"embedding.token_adapter.trainable_tokens_delta.default"}


@pytest.mark.parametrize(
    ("options", "multiples", "message"),
    [
        ({}, {"alpha": 0}, "`alpha` is 0, expected a finite number above 0"),
        ({}, {"omega": float("inf")}, "`omega` is inf, expected"),
        ({"function": "identity"}, {"alpha": 2}, "`alpha` is 2, but no trained parameter is of this kind"),
        ({"train_omega": False}, {"omega": 2}, "`omega` is 2, but no trained parameter"),
    ],
)
def test_refused(options, multiples, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(adapted(**options), 1.0, **multiples)
