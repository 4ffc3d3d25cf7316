from __future__ import annotations

import pytest
import torch

from funlora_hf.sampling.drawing import draw_samples, tensor_sha256, to_uint8


def draw(pipe, **overrides):
    settings = {
        "count": 5,
        "purpose": "probe",
        "seed": 0,
        "batch_size": 2,
        "solver": "euler",
        "num_inference_steps": 2,
        "tolerance": 1e-3,
    }
    settings |= overrides
    return draw_samples(pipe, 3, settings.pop("count"), **settings).images


def test_samples_repeat_to_the_bit_and_differ_by_purpose(tiny_pipe):
    first = draw(tiny_pipe)
    assert first.shape == (5, 1, 8, 8)
    assert tensor_sha256(first) == tensor_sha256(draw(tiny_pipe))
    assert tensor_sha256(first) != tensor_sha256(draw(tiny_pipe, purpose="synthetic"))
    assert tensor_sha256(first) != tensor_sha256(draw(tiny_pipe, seed=1))


def test_fewer_samples_are_the_first_of_more(tiny_pipe):
    assert torch.equal(draw(tiny_pipe, count=4), draw(tiny_pipe)[:4])


def test_evaluations_are_those_of_a_batch(tiny_pipe):
    settings = {"purpose": "probe", "seed": 0, "batch_size": 2, "num_inference_steps": 3, "tolerance": 1e-3}
    for solver, nfe in (("euler", 3), ("heun", 6), ("rk4", 12)):
        assert draw_samples(tiny_pipe, 3, 5, solver=solver, **settings).nfe == nfe


def test_the_hash_sees_one_bit_the_shape_and_the_dtype():
    tensor = torch.tensor([0.0, 1.0])
    changed = tensor.clone()
    changed[0] = -0.0
    hashes = {tensor_sha256(x) for x in (tensor, changed, tensor[None], tensor.double())}
    assert len(hashes) == 4


def test_bytes_are_rounded():
    assert to_uint8(torch.tensor([0.0, 0.499 / 255, 0.5, 1.0])).tolist() == [0, 0, 128, 255]


def test_every_precision_has_a_hash_of_its_own():
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.bool)
    tensors = [torch.ones(2, 3, dtype=dtype) for dtype in dtypes]
    assert len({tensor_sha256(tensor) for tensor in tensors}) == len(dtypes)
    assert tensor_sha256(tensors[0].t().contiguous().t()) == tensor_sha256(tensors[0])
    assert tensor_sha256(torch.tensor(1.0)) != tensor_sha256(torch.tensor(1.0).reshape(1))


@pytest.mark.parametrize("field", ["count", "batch_size"])
def test_less_than_one_image_is_refused(field, tiny_pipe):
    with pytest.raises(ValueError, match=f"`{field}`"):
        draw(tiny_pipe, **{field: 0})
