from __future__ import annotations

import copy
import hashlib

import accelerate
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from text_to_image import make_model
from torch import nn

from funlora_hf import FunLoraConfig
from funlora_hf.adapters.base_fingerprint import (
    BaseMismatchError,
    FingerprintCheck,
    base_fingerprint,
    base_fingerprints,
    base_tensors,
)


def by_hand(model: nn.Module) -> str:
    """Written out, from the plain model's own state dict."""
    parts = b""
    for name, tensor in sorted(model.state_dict().items()):
        numbers = tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32).numpy()
        parts += f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode() + numbers.tobytes()
    return hashlib.sha256(parts).hexdigest()


def plain_config(unet: UNet2DModel) -> dict:
    """The arguments that made it."""
    return {name: value for name, value in unet.config.items() if not name.startswith("_")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_hash_of_the_state_dict(tiny_unet, dtype):
    expected = by_hand(copy.deepcopy(tiny_unet).to(dtype))
    assert base_fingerprint(tiny_unet, dtype=dtype) == expected
    assert base_fingerprint(tiny_unet.to(dtype)) == expected


@pytest.mark.parametrize(
    "config",
    [
        FunLoraConfig(class_embedding="class_embedding"),
        FunLoraConfig(target_modules="all-conv", modules_to_save=["time_embedding"]),
        LoraConfig(target_modules=["time_embedding.linear_1"], trainable_token_indices={"class_embedding": [0]}),
    ],
    ids=["funlora", "modules_to_save", "lora with tokens"],
)
def test_adapters_do_not_count(tiny_unet, config):
    plain = {name: tensor.clone() for name, tensor in tiny_unet.state_dict().items()}
    expected = base_fingerprint(tiny_unet)
    model = get_peft_model(tiny_unet, config)
    for adapted in (model, model.base_model, tiny_unet):
        assert base_fingerprint(adapted) == expected
        tensors = base_tensors(adapted)
        assert tensors.keys() == plain.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in plain.items())


def test_it_does_not_depend_on_files_or_memory(tiny_unet, tmp_path):
    expected = base_fingerprint(tiny_unet)
    tiny_unet.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = UNet2DModel.from_pretrained(tmp_path)
    assert base_fingerprint(again.to(memory_format=torch.channels_last)) == expected


def test_every_tensor_name_shape_and_number_counts():
    torch.manual_seed(0)

    def model(**changes) -> nn.Module:
        parts = {"a": nn.Linear(2, 3), "norm": nn.BatchNorm1d(3)}
        parts["a"].weight.data.fill_(1.0)
        parts["a"].bias.data.fill_(2.0)
        return nn.ModuleDict({**parts, **changes})

    plain = base_fingerprint(model())
    assert base_fingerprint(model()) == plain
    others = [model(), model(), model(b=nn.Flatten(), norm=nn.Identity()), model(b=nn.Linear(1, 1))]
    others[0]["norm"].running_mean[0] += 1e-6
    others[1]["a"].weight.data = others[1]["a"].weight.data.reshape(2, 3)
    renamed = model()
    renamed["c"] = renamed["a"]
    del renamed["a"]
    assert plain not in [base_fingerprint(other) for other in [*others, renamed]]


def test_merged_adapters_are_refused(tiny_unet):
    model = get_peft_model(tiny_unet, FunLoraConfig(init_weights=False))
    expected = base_fingerprint(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        base_fingerprint(model)
    model.unmerge_adapter()
    assert base_fingerprint(model) == expected


def test_a_check_sees_another_base_and_every_change(tiny_unet):
    config = FunLoraConfig(base_fingerprint=base_fingerprints(tiny_unet), revision="v1")
    config.base_model_name_or_path = "user/base"
    check = FingerprintCheck(tiny_unet)
    for dtype in (torch.float32, torch.bfloat16):
        check.check(config, "mine")
        tiny_unet.to(dtype)
    check.check(config, "mine")
    tiny_unet.to(torch.float32)  # where what was lost in bfloat16 does not come back
    with pytest.raises(BaseMismatchError, match="fingerprint") as caught:
        check.check(config, "mine")
    for part in ("'mine'", config.base_fingerprint["float32"], base_fingerprint(tiny_unet), "ignore_base_fingerprint"):
        assert part in str(caught.value)
    assert "'user/base' at revision 'v1'" in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_check_sees_a_change_of_one_number(tiny_unet):
    config = FunLoraConfig(base_fingerprint=base_fingerprints(tiny_unet))
    check = FingerprintCheck(tiny_unet)
    check.check(config, "mine")
    weight = tiny_unet.conv_in.weight
    before = weight[0, 0, 0, 0].item()
    with torch.no_grad():
        weight[0, 0, 0, 0] += 1
    with pytest.raises(BaseMismatchError):
        check.check(config, "mine")
    with torch.no_grad():
        weight[0, 0, 0, 0] = before
    check.check(config, "mine")


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        ({"act_fn": "relu"}, False),
        ({"norm_eps": 1e-3}, False),
        ({"flip_sin_to_cos": False}, False),
        ({"mid_block_scale_factor": 2.0}, False),
        ({"sample_size": 16, "dropout": 0.1}, True),
    ],
    ids=str,
)
def test_settings_that_change_what_the_same_tensors_give_are_another_base(tiny_unet, changes, is_same):
    fingerprints = base_fingerprints(tiny_unet)
    other = UNet2DModel(**{**plain_config(tiny_unet), **changes})
    other.load_state_dict(tiny_unet.state_dict())
    assert (base_fingerprints(other) == fingerprints) is is_same
    check = FingerprintCheck(other)
    earlier = {name: value for name, value in fingerprints.items() if name != "config"}
    check.check(FunLoraConfig(base_fingerprint=earlier), "of an earlier version")
    if not is_same:
        with pytest.raises(BaseMismatchError, match="of its config"):
            check.check(FunLoraConfig(base_fingerprint=fingerprints), "mine")


class Model(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, act_fn="silu"):
        super().__init__()


class LaterModel(Model):
    @register_to_config
    def __init__(self, act_fn="silu", new=(1, 2)):
        super().__init__(act_fn)


@pytest.mark.parametrize("act_fn", ["silu", "relu"])
def test_an_argument_that_a_later_diffusers_adds_changes_no_fingerprint(act_fn):
    own = base_fingerprints(Model(act_fn))
    assert base_fingerprints(LaterModel(act_fn, new=[1, 2])) == own
    assert base_fingerprints(LaterModel(act_fn, new=[1])) != own


@pytest.mark.parametrize("part", ["", "mid_block"])
def test_a_compiled_model_is_the_same_base(tiny_unet, part):
    fingerprints = base_fingerprints(tiny_unet)
    if part:
        setattr(tiny_unet, part, torch.compile(getattr(tiny_unet, part)))
    assert base_fingerprints(tiny_unet if part else torch.compile(tiny_unet)) == fingerprints


def test_float64_is_compared_by_its_float32(tiny_unet):
    config = FunLoraConfig(base_fingerprint=base_fingerprints(tiny_unet))
    FingerprintCheck(tiny_unet.to(torch.float64)).check(config, "mine")


def test_without_a_fingerprint_nothing_is_checked(tiny_unet):
    FingerprintCheck(tiny_unet).check(FunLoraConfig(), "mine")
    FingerprintCheck(tiny_unet).check(LoraConfig(target_modules=["x"]), "mine")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_fingerprint", {"float32": "abc"}),
        ("base_fingerprint", {"int8": "0" * 64}),
        ("base_fingerprint", {}),
        ("base_fingerprint", "0" * 64),
        ("class_label", "7"),
        ("class_label", -1),
        ("class_label", 2**63),
        ("class_label", True),
        ("class_name", 7),
        ("class_embedding", ["class_embedding"]),
        ("target_modules", 5),
        ("target_modules", [5]),
        ("modules_to_save", "conv_out"),
        ("train_omega", "yes"),
        ("init_weights", 1),
    ],
)
def test_a_config_refuses_fields_of_another_type(field, value):
    with pytest.raises(ValueError, match=f"`{field}` is "):
        FunLoraConfig(**{field: value})


@pytest.mark.parametrize("hashed_before", [False, True])
def test_offloaded_weights_are_not_hashed(tiny_unet, hashed_before):
    fingerprints = base_fingerprints(tiny_unet)
    mine, other = FunLoraConfig(base_fingerprint=fingerprints), FunLoraConfig(base_fingerprint={"float32": "0" * 64})
    check = FingerprintCheck(tiny_unet)
    if hashed_before:
        check.check(mine, "mine")
    accelerate.cpu_offload(tiny_unet, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="are offloaded, so it has no fingerprint"):
        base_fingerprint(tiny_unet)
    if hashed_before:
        check.check(mine, "mine")
        with pytest.raises(BaseMismatchError):
            check.check(other, "other")
    else:
        with pytest.warns(UserWarning, match="'other' belongs to this base: the base's weights are offloaded"):
            check.check(other, "other")


@pytest.mark.parametrize(
    "name", ["UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel", "PixArtTransformer2DModel"]
)
def test_fused_projections_do_not_count_unless_they_differ(name):
    model = make_model(name)
    expected = by_hand(model)
    assert base_fingerprint(model) == expected
    model.fuse_qkv_projections()
    assert by_hand(model) != expected
    assert base_fingerprint(model) == expected
    assert base_fingerprint(inject_adapter_in_model(LoraConfig(target_modules=["to_qkv"]), model)) == expected
    fused = next(module for key, module in model.named_modules() if key.endswith("to_qkv"))
    with torch.no_grad():
        fused.weight[0, 0] += 1e-3
    assert base_fingerprint(model) != expected
