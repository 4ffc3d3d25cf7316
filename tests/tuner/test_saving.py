"""Adapters on disk: saving, every way PEFT has to load them, and files that do not fit."""

import json
import os
import subprocess
import sys

import huggingface_hub.constants
import peft
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from packaging.version import Version
from peft import (
    AutoPeftModel,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft_models import (
    CONDITION_UNET,
    PLAIN,
    UNET,
    adapter_parameters,
    adapter_state,
    assert_equal,
    base_weights,
    differ,
    funlora_layers,
    kinds,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from funlora_hf import FunLoraConfig


WEIGHTS = "adapter_model.safetensors"
low_cpu_mem = pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem"])


def change_whole(model, kind, adapter="default"):
    with torch.no_grad():
        model.base_model.model.get_submodule(kind.whole).modules_to_save[adapter].weight.add_(1)


# What works


@kinds
@low_cpu_mem
def test_save_and_load_is_equal_to_the_bit(kind, low_cpu_mem_usage, tmp_path):
    model = kind.model(operation="mul-add", r=2, ratio=3, modules_to_save=[kind.whole])
    change_whole(model, kind)
    expected = kind.run(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(kind.base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not loaded.training
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert not any(p.requires_grad for p in loaded.parameters())
    assert_equal(adapter_state(loaded), adapter_state(model))
    assert torch.equal(kind.run(loaded), expected)


@kinds
@low_cpu_mem
def test_is_trainable(kind, low_cpu_mem_usage, tmp_path):
    model = kind.model(modules_to_save=[kind.whole])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(kind.base(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trainable
    assert not loaded.peft_config["default"].inference_mode
    loaded.train()
    result = loaded(**kind.batch())
    (result if isinstance(result, torch.Tensor) else result.sample).square().sum().backward()
    # Several parts start with no gradient only where init_weights is True.
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter_parameters(loaded).values())


@kinds
@low_cpu_mem
def test_load_adapter_beside_another(kind, low_cpu_mem_usage, tmp_path):
    saved = kind.model("x", seed=7, function="power", modules_to_save=[kind.whole])
    change_whole(saved, kind, "x")
    expected = kind.run(saved)
    saved.save_pretrained(tmp_path / "adapters", selected_adapters=["x"])
    model = kind.model("first")
    before = kind.run(model)
    result = model.load_adapter(
        tmp_path / "adapters", "y", subfolder="x", is_trainable=False, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(kind.run(model), before)  # loaded, not activated
    assert not any(p.requires_grad for p in adapter_parameters(model, "y").values())
    model.set_adapter("y")
    assert torch.equal(kind.run(model), expected)
    model.load_adapter(tmp_path / "adapters", "z", subfolder="x", is_trainable=True)
    assert [model.peft_config[name].inference_mode for name in "yz"] == [True, False]
    if Version(peft.__version__) >= Version("0.21"):  # before, a loaded adapter is trainable once it is active
        assert all(p.requires_grad for p in adapter_parameters(model, "z").values())


@kinds
def test_subfolder(kind, tmp_path):
    model = kind.model("x")
    expected = kind.run(model)
    model.save_pretrained(tmp_path / "adapters")  # PEFT puts any but "default" into a folder of its name
    loaded = PeftModel.from_pretrained(kind.base(), tmp_path / "adapters", subfolder="x")
    assert torch.equal(kind.run(loaded), expected)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(kind.base(), tmp_path / "adapters")


@kinds
def test_several_adapters_are_saved_apart(kind, tmp_path):
    model = kind.model("default", "other")
    outputs = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        outputs[name] = kind.run(model)
    assert differ(outputs["default"], outputs["other"])
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("other", tmp_path / "other")):
        assert torch.equal(kind.run(PeftModel.from_pretrained(kind.base(), folder)), outputs[name])


@pytest.mark.parametrize(("kind", "unet_cls"), [(UNET, UNet2DModel), (CONDITION_UNET, UNet2DConditionModel)])
def test_auto_peft_model(kind, unet_cls, tmp_path, monkeypatch):
    """Works where the base is the U-Net's own folder, which diffusers does not note by itself."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    kind.base().save_pretrained(tmp_path / "unet")
    unet = unet_cls.from_pretrained(tmp_path / "unet")
    unet.name_or_path = str(tmp_path / "unet")
    model = kind.model(base=unet)
    expected = kind.run(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert type(loaded.get_base_model()) is unet_cls
    assert torch.equal(kind.run(loaded), expected)
    trainable = AutoPeftModel.from_pretrained(tmp_path / "adapter", is_trainable=True)
    assert all(p.requires_grad for p in adapter_parameters(trainable).values())


@kinds
@low_cpu_mem
def test_inject_adapter_in_model_and_state_dict(kind, low_cpu_mem_usage):
    source = kind.model(seed=4, modules_to_save=[kind.whole])
    change_whole(source, kind)
    expected = kind.run(source)
    base = kind.base()
    inject_adapter_in_model(kind.config(modules_to_save=[kind.whole]), base, low_cpu_mem_usage=low_cpu_mem_usage)
    state = {name.removeprefix("base_model.model."): value for name, value in adapter_state(source).items()}
    result = set_peft_model_state_dict(base, dict(state), low_cpu_mem_usage=low_cpu_mem_usage)
    assert result.unexpected_keys == []
    assert torch.equal(kind.run(base), expected)
    assert_equal(get_peft_model_state_dict(base), state)


@kinds
def test_whole_checkpoint(kind):
    """torch's own state_dict of everything, with several adapters, one of them merged."""
    model = kind.model("x", "y", modules_to_save=[kind.whole])
    model.merge_adapter(["y"])
    other = kind.model("x", "y", seed=8, modules_to_save=[kind.whole])
    other.load_state_dict(model.state_dict())
    assert_equal(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("function", ["cosine", "shift", "identity"])
def test_file_holds_the_adapter_and_nothing_else(tmp_path, function):
    model = UNET.model("default", "other", function=function)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    tensors = load_file(tmp_path / WEIGHTS)
    expected = {name.removesuffix(".default"): p for name, p in adapter_parameters(model).items()}
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name])


@kinds
def test_a_merged_model_saves_the_same_adapter(kind, tmp_path):
    model = kind.model()
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    files = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("before", "merged")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_files_do_not_depend_on_the_hash_seed(tmp_path):
    script = (
        "import sys, torch; from diffusers import UNet2DModel; from peft import get_peft_model; "
        "from funlora_hf import FunLoraConfig; torch.set_num_threads(1); torch.manual_seed(0); "
        "unet = UNet2DModel(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, num_class_embeds=2, "
        "down_block_types=('DownBlock2D',) * 2, up_block_types=('UpBlock2D',) * 2); "
        "config = FunLoraConfig(class_embedding='class_embedding', exclude_modules=['conv_in', 'conv_out', 'conv2']); "
        "model = get_peft_model(unet, config); model.save_pretrained(sys.argv[1]); "
        "model.add_adapter('all', FunLoraConfig(target_modules='all-conv')); model.save_pretrained(sys.argv[1])"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / seed)], env={**os.environ, "PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2")
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    for name in ("adapter_config.json", WEIGHTS, "all/adapter_config.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


# What does not fit


def rewrite(folder, change):
    """Let `change` work on the tensors of a saved adapter."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def reconfigure(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


WAYS = [
    (UNET, "from_pretrained"),
    (CONDITION_UNET, "load_adapter"),
    (PLAIN, "from_pretrained"),
    (PLAIN, "low_cpu_mem"),
    (PLAIN, "load_adapter"),
    (PLAIN, "set_peft_model_state_dict"),
    (PLAIN, "injected"),
]
ways = pytest.mark.parametrize(("kind", "way"), WAYS, ids=lambda value: getattr(value, "name", value))


@pytest.fixture
def refused():
    """Loads a saved adapter in one of PEFT's ways, which has to fail; returns what is said of it."""

    def load(kind, way, folder):
        base = kind.base()
        before = base_weights(base)
        tensors = load_file(folder / WEIGHTS)
        config = FunLoraConfig.from_pretrained(folder)
        with pytest.raises(ValueError, match="do not fit") as raised:
            if way == "load_adapter":
                model = kind.model("first", base=base)
                model.load_adapter(folder, "second")
            elif way == "set_peft_model_state_dict":
                model = kind.model(base=base, **{name: getattr(config, name) for name in ("function", "ratio")})
                set_peft_model_state_dict(model, tensors)
            elif way == "injected":
                inject_adapter_in_model(config, base)
                set_peft_model_state_dict(
                    base, {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
                )
            else:
                PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=way == "low_cpu_mem")
        after = {name.replace("base_layer.", ""): value for name, value in base_weights(base).items()}
        assert_equal(after, before)
        assert all(torch.isfinite(p).all() for p in base.parameters() if not p.is_meta)
        return str(raised.value)

    return load


def save(kind, folder, **config):
    """A saved adapter, and the name of one of its layers."""
    model = kind.model(**config)
    model.save_pretrained(folder)
    names = [name.removeprefix("base_model.model.") for name, m in model.named_modules() if m in funlora_layers(model)]
    return names[-1]


@ways
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(kind, way, value, refused, tmp_path):
    layer = save(kind, tmp_path)

    def spoil(tensors):
        tensors[f"base_model.model.{layer}.funlora_B"][0, -1] = value

    rewrite(tmp_path, spoil)
    message = refused(kind, way, tmp_path)
    assert f"{layer}.funlora_B" in message
    assert "NaN or infinity" in message


@ways
@pytest.mark.parametrize("part", ["funlora_A", "funlora_omega"])
def test_a_missing_tensor_is_refused(kind, way, part, refused, tmp_path):
    layer = save(kind, tmp_path)
    shape = tuple(load_file(tmp_path / WEIGHTS)[f"base_model.model.{layer}.{part}"].shape)
    rewrite(tmp_path, lambda tensors: tensors.pop(f"base_model.model.{layer}.{part}"))
    message = refused(kind, way, tmp_path)
    assert f"{layer}.{part}" in message
    assert "missing" in message
    assert str(shape) in message


@ways
@pytest.mark.parametrize(
    ("saved", "stated", "tensor", "said"),
    [
        ("cosine", "shift", "funlora_omega", "found a tensor of shape (10,), expected none"),
        ("shift", "cosine", "funlora_omega", "missing, expected a tensor of shape (10,)"),
        ("identity", "power", "funlora_alpha", "missing, expected a tensor of shape (10,)"),
    ],
)
def test_a_file_of_another_function_is_refused(kind, way, saved, stated, tensor, said, refused, tmp_path):
    save(kind, tmp_path, function=saved)
    reconfigure(tmp_path, function=stated)
    message = refused(kind, way, tmp_path)
    lines = [line for line in message.splitlines() if f".{tensor}" in line]
    assert lines
    for line in lines:
        assert said in line
        assert kind.base().get_submodule(line[2:].removeprefix("base_model.model.").partition(".funlora_")[0])


@kinds
@pytest.mark.parametrize("stated", [{"ratio": 2}, {"r": 3}])
def test_a_file_of_other_shapes_is_refused_in_torchs_words(kind, stated, tmp_path):
    layer = save(kind, tmp_path)
    found = list(load_file(tmp_path / WEIGHTS)[f"base_model.model.{layer}.funlora_A"].shape)
    expected = [-(-found[0] // stated.get("ratio", 1)), stated.get("r", 1)]
    reconfigure(tmp_path, **stated)
    for low_cpu_mem_usage in (False, True):
        with pytest.raises(RuntimeError) as raised:
            PeftModel.from_pretrained(kind.base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        line = next(line for line in str(raised.value).splitlines() if f"{layer}.funlora_A" in line)
        assert "size mismatch" in line
        assert f"torch.Size({found}) from checkpoint" in line
        assert f"current model is torch.Size({expected})" in line


@kinds
def test_a_file_for_another_model_is_refused(kind, tmp_path):
    """A layer that the file has and the model does not adapt, and the other way round."""
    layer = save(kind, tmp_path)
    rewrite(
        tmp_path,
        lambda tensors: [
            tensors.update({name.replace(layer, "elsewhere"): tensors.pop(name)})
            for name in list(tensors)
            if f".{layer}." in name
        ],
    )
    with pytest.raises(ValueError, match="do not fit") as raised:
        PeftModel.from_pretrained(kind.base(), tmp_path)
    lines = str(raised.value).splitlines()
    assert sum(f"{layer}." in line and "missing" in line for line in lines) == 4
    assert sum("elsewhere." in line and "expected none" in line for line in lines) == 4


@kinds
def test_modules_to_save_that_are_not_finite_are_refused(kind, tmp_path):
    save(kind, tmp_path, modules_to_save=[kind.whole])
    rewrite(tmp_path, lambda tensors: tensors[f"base_model.model.{kind.whole}.weight"].fill_(float("nan")))
    with pytest.raises(ValueError, match=rf"{kind.whole}\.modules_to_save.*NaN"):
        PeftModel.from_pretrained(kind.base(), tmp_path)


def test_a_refused_file_leaves_the_adapter_in_the_model_as_it_was(tmp_path):
    save(PLAIN, tmp_path, seed=6)
    model = PLAIN.model()
    expected, state = PLAIN.run(model), adapter_state(model)
    rewrite(tmp_path, lambda tensors: tensors.pop("base_model.model.mlp.2.funlora_A"))
    with pytest.raises(ValueError, match=r"mlp\.2\.funlora_A.*missing"):
        set_peft_model_state_dict(model, load_file(tmp_path / WEIGHTS))
    assert_equal(adapter_state(model), state)
    assert torch.equal(PLAIN.run(model), expected)


def test_long_lists_of_what_does_not_fit_are_cut(tmp_path):
    save(CONDITION_UNET, tmp_path)
    rewrite(tmp_path, lambda tensors: [t.fill_(float("nan")) for t in tensors.values()])
    with pytest.raises(ValueError, match=r"and \d+ more") as raised:
        PeftModel.from_pretrained(CONDITION_UNET.base(), tmp_path)
    assert str(raised.value).count("NaN or infinity") == 10


def test_a_base_whose_names_begin_like_an_adapters_loads():
    """PEFT tells adapters by their prefix; a user's own module may have it, too."""

    class Base(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.funlora_head = torch.nn.Linear(3, 3)
            self.body = torch.nn.Linear(3, 3)

        def forward(self, x):
            return self.funlora_head(self.body(x))

    base = inject_adapter_in_model(FunLoraConfig(target_modules=["body"]), Base())
    base.load_state_dict(base.state_dict())
    model = PLAIN.model(base=Base(), target_modules=["body"], class_embedding=None)
    model.load_state_dict(model.state_dict())
    model.load_state_dict({k: v for k, v in model.state_dict().items() if "funlora_head" in k}, strict=False)


# The model itself


@pytest.mark.parametrize("kind", [UNET, CONDITION_UNET], ids=lambda kind: kind.name)
def test_a_model_without_its_adapters_is_saved_as_the_base(kind, tmp_path):
    base = kind.base()
    expected = {name: value.clone() for name, value in base.state_dict().items()}
    model = kind.model(base=base)
    model.merge_adapter()
    model.unmerge_adapter()
    model.unload().save_pretrained(tmp_path)
    loaded, info = type(base).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_equal(loaded.state_dict(), expected)


def test_saving_a_model_with_adapters_inside_is_diffusers_own(tmp_path):
    """As with LoRA: nothing of the model's is replaced. What reads bases refuses the file, see `test_base_model.py`."""
    base = UNET.base()
    UNET.model(base=base)
    assert "save_pretrained" not in vars(base)
    base.save_pretrained(tmp_path)
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert any(".base_layer." in name for name in file.keys())  # noqa: SIM118
