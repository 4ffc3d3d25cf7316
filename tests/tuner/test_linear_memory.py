"""What adapted Linear layers keep: no copy of their weight unless asked, and for the backward pass one matrix at most."""

from __future__ import annotations

import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from funlora_hf import FunLoraConfig, cached_weights


SIZE = 512  # F is interpolated, and the plain product separates
ARGUMENTS = {
    "cosine": {},
    "cosine, r = 4": {"r": 4},
    "power": {"function": "power"},
    "shift": {"function": "shift"},
    "identity": {"function": "identity"},
    "identity, r = 4": {"function": "identity", "r": 4},
}
# Besides the matrix: A, B and, of "cosine", the coefficients of its interpolation, which are small in larger layers.
MATRICES = {**dict.fromkeys(ARGUMENTS, 1.3), "identity": 0.1}


def make(**config):
    torch.manual_seed(0)
    return get_peft_model(
        nn.Sequential(nn.Linear(SIZE, SIZE)), FunLoraConfig(target_modules=["0"], init_weights=False, **config)
    )


def run(model, tokens=4):
    """An output that gradients flow through, to the input as well, and the storages that autograd keeps for it, without those of the
    input and the base."""
    x = torch.randn(tokens, SIZE, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    for tensor in (x, *model.base_model.model.parameters()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return output, list(kept.values())


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_backward_pass_keeps_one_matrix_at_most(name):
    matrix = 4 * SIZE * SIZE
    output, kept = run(make(**ARGUMENTS[name]))
    assert sum(kept) < MATRICES[name] * matrix
    assert sum(size >= matrix for size in kept) == (0 if name == "identity" else 1)
    output.sum().backward()


def test_identity_keeps_one_output_more_than_lora():
    tokens = 64
    lora = get_peft_model(nn.Sequential(nn.Linear(SIZE, SIZE)), LoraConfig(target_modules=["0"], r=1))
    outputs = [sum(run(model, tokens)[1]) / (4 * tokens * SIZE) for model in (make(function="identity"), lora)]
    assert outputs == pytest.approx([1, 0], abs=0.1)


def matrices() -> int:
    """Tensors as large as the weight that are alive."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter)]
    return len({tensor.data_ptr() for tensor in tensors if tensor.shape == (SIZE, SIZE)})


@pytest.mark.parametrize("name", ARGUMENTS)
def test_no_copy_of_the_weight_is_kept_unless_asked(name):
    before = matrices()
    model, x = make(**ARGUMENTS[name]).eval(), torch.randn(4, SIZE)
    with torch.no_grad():
        model(x)
        assert matrices() == before + 1  # the base's own
        with cached_weights(model):
            model(x)
            model(x)
            assert matrices() == before + 2
    assert matrices() == before + 1
