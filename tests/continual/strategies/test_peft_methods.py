from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from runs import TINY_UNET, digests, short_run
from safetensors.torch import load_file

from funlora_hf import FunLoraConfig, FunLoraPipeline
from funlora_hf.baselines import ConvLoraConfig, ScaleShiftConfig
from funlora_hf.continual.config import ModelArguments
from funlora_hf.continual.strategies.funlora import start_class_vectors
from funlora_hf.continual.strategies.peft_methods import PEFT_METHODS, fuse_attention, peft_method
from funlora_hf.run import run


# Two tasks, and one step of each adapter: what is tested does not depend on how well they learn.
SHORTER = {"unet_config": None, "num_tasks": 2, "adapter_train_steps": 2}


def make_config(unet, method, **arguments):
    return peft_method(method).config(unet, ModelArguments(peft_method=method, **arguments))


def test_every_method_is_in_the_help():
    text = ModelArguments.__dataclass_fields__["peft_method"].metadata["help"]
    assert all(f"'{name}'" in text for name in PEFT_METHODS)


def test_an_unknown_method_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"`peft_method` is 'dora', expected one of: 'funlora', .*'lora_conv_v2'"):
        peft_method("dora")


@pytest.mark.parametrize(
    ("method", "cls", "fields"),
    [
        ("funlora", FunLoraConfig, {"function": "cosine", "operation": "mul", "r": 1}),
        ("vanilla_add", FunLoraConfig, {"function": "identity", "operation": "add", "r": 1}),
        ("vanilla_mul", FunLoraConfig, {"function": "identity", "operation": "mul", "r": 1}),
        ("class_vector", FunLoraConfig, {"target_modules": set()}),
        ("scale_shift", ScaleShiftConfig, {"trainable_token_indices": {"class_embedding": [0]}}),
        ("lora_attention", LoraConfig, {"r": 2, "target_modules": {"to_q", "to_k", "to_v", "to_out.0"}}),
        ("lora_attention_fused", LoraConfig, {"r": 2, "target_modules": {"to_qkv", "to_out.0"}}),
        ("lora_conv_v1", ConvLoraConfig, {"r": 1, "bottleneck": "kernel"}),
        ("lora_conv_v2", ConvLoraConfig, {"r": 1, "bottleneck": "rank"}),
    ],
)
def test_configurations(tiny_unet, method, cls, fields):
    config = make_config(tiny_unet, method)
    assert type(config) is cls
    assert {name: getattr(config, name) for name in fields} == fields


def test_rank_and_presets_reach_the_configuration(tiny_unet):
    assert make_config(tiny_unet, "lora_attention", rank=5).r == 5
    config = make_config(tiny_unet, "vanilla_add", rank=2, target_modules=["decoder"])
    assert config.r == 2
    assert config.target_modules == {
        name
        for name, m in tiny_unet.named_modules()
        if name.startswith("up_blocks") and isinstance(m, torch.nn.Conv2d)
    }
    assert make_config(tiny_unet, "scale_shift", target_modules=["0-1"]).target_modules == {
        "conv_in",
        "down_blocks.0.resnets.0.conv1",
    }


@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [
        (
            "scale_shift",
            {"function": "power"},
            "`function` is 'power', but `peft_method` 'scale_shift' does not use it",
        ),
        ("vanilla_mul", {"ratio": 2}, "`ratio` is 2, but `peft_method` 'vanilla_mul' does not use it"),
        ("lora_conv_v1", {"target_modules": ["decoder"]}, "`peft_method` 'lora_conv_v1' does not use it"),
        ("funlora", {"target_modules": ["90-99"]}, "expected two rising indices"),
    ],
)
def test_arguments_that_do_not_fit_are_named(tiny_unet, method, arguments, words):
    with pytest.raises(ValueError, match=words):
        make_config(tiny_unet, method, **arguments)


def test_attention_methods_need_attention(tiny_unet):
    arguments = {**TINY_UNET, "add_attention": False, "num_class_embeds": 2}
    with pytest.raises(ValueError, match="adapts attention, and the U-Net has none"):
        make_config(UNet2DModel(**arguments), "lora_attention")


def test_fusing_changes_no_bit(tiny_unet):
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    with torch.no_grad():
        before = tiny_unet(x, torch.tensor([3.0, 500.0]), labels).sample
        fuse_attention(tiny_unet)
        after = tiny_unet(x, torch.tensor([3.0, 500.0]), labels).sample
    assert torch.equal(before, after)
    assert any(name.endswith("to_qkv") for name, _ in tiny_unet.named_modules())


def test_vectors_trained_as_tokens_start_at_the_mean_of_the_rows(tiny_unet):
    rows = tiny_unet.class_embedding.weight.detach().clone()
    model = get_peft_model(tiny_unet, make_config(tiny_unet, "scale_shift"))
    start_class_vectors(model)
    (layer,) = (module for module in model.modules() if isinstance(module, TrainableTokensLayer))
    torch.testing.assert_close(layer.trainable_tokens_delta["default"][0], rows.mean(dim=0))
    assert torch.equal(layer.get_base_layer().weight, rows)


@pytest.fixture(scope="module")
def funlora_run(tmp_path_factory):
    """A finished run whose base the others share."""
    folder = tmp_path_factory.mktemp("base")
    run(short_run(output_dir=str(folder / "out"), num_tasks=1))
    return folder / "out"


@pytest.mark.parametrize("method", ["scale_shift", "lora_attention", "lora_attention_fused", "lora_conv_v2"])
def test_a_run_learns_class_after_class_and_forgets_nothing(method, funlora_run, tmp_path):
    arguments = {"base_model": str(funlora_run / "base"), **SHORTER, "peft_method": method}
    results = run(short_run(output_dir=str(tmp_path / "out"), **arguments))
    assert results["peft_method"] == method
    assert results["zero_forgetting"]["identical"] is True
    assert results["zero_forgetting"]["classes_compared"] == 8

    # What a file holds is what results.json counts, and the adapters differ from each other.
    folders = sorted((tmp_path / "out" / "adapters").iterdir())
    assert len(folders) == 4
    for folder in folders:
        numbers = sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values())
        assert numbers == results["parameters_per_class_with_vector"]
    assert (
        len({digest for name, digest in digests(tmp_path / "out" / "adapters").items() if "safetensors" in name}) == 4
    )


def test_stock_peft_and_the_pipeline_read_another_methods_adapters(funlora_run, tmp_path):
    arguments = {"base_model": str(funlora_run / "base"), **SHORTER, "peft_method": "lora_attention"}
    run(short_run(output_dir=str(tmp_path / "out"), **arguments))
    adapters = tmp_path / "out" / "adapters"
    pipe = FunLoraPipeline.from_pretrained(funlora_run / "base")
    pipe.set_progress_bar_config(disable=True)
    x, sigma = torch.randn(1, 1, 8, 8), torch.tensor([0.5])
    with torch.no_grad():
        base = pipe.predict_velocity(x, sigma, [0])
        for class_id in (4, 7):
            pipe.load_adapter(adapters / f"class_{class_id}", class_label=class_id)
        mixed = pipe.predict_velocity(x.expand(3, -1, -1, -1), sigma.expand(3), [7, 0, 4])
    assert torch.allclose(mixed[1:2], base, atol=1e-6)
    for index, class_id in ((0, 7), (2, 4)):
        unet = UNet2DModel.from_pretrained(funlora_run / "base", subfolder="unet")
        model = PeftModel.from_pretrained(unet, adapters / f"class_{class_id}").eval()
        with torch.no_grad():
            alone = model(x, 1000 * sigma, torch.tensor([0])).sample
        torch.testing.assert_close(mixed[index : index + 1], alone, atol=1e-5, rtol=0)
        assert not torch.allclose(alone, base, atol=1e-5)

    # Taking them off again leaves the base, and saving with them on writes it untouched.
    pipe.save_pretrained(tmp_path / "saved")
    again = FunLoraPipeline.from_pretrained(tmp_path / "saved")
    assert again.classes.keys() == pipe.classes.keys()
    for class_id in (4, 7):
        pipe.unload_adapter(class_id)
    with torch.no_grad():
        assert torch.equal(pipe.predict_velocity(x, sigma, [0]), base)
        torch.testing.assert_close(again.predict_velocity(x, sigma, [0]), base)


def test_later_tasks_leave_the_adapters_alone(funlora_run, tmp_path):
    arguments = {"base_model": str(funlora_run / "base"), **SHORTER, "peft_method": "lora_conv_v1"}
    run(short_run(output_dir=str(tmp_path / "a"), **arguments))
    run(short_run(output_dir=str(tmp_path / "b"), **arguments | {"num_tasks": 3}))
    first, second = digests(tmp_path / "a" / "adapters"), digests(tmp_path / "b" / "adapters")
    assert first.items() < second.items()


def test_updating_a_class_of_another_method(funlora_run, tmp_path):
    out = tmp_path / "out"
    arguments = {"base_model": str(funlora_run / "base"), **SHORTER, "peft_method": "scale_shift"}
    run(short_run(output_dir=str(out), **arguments))
    before = digests(out / "adapters")
    run(short_run(output_dir=str(out), update_class=5, **arguments))
    after = digests(out / "adapters")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"class_5/adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"peft_method": "dora"}, "`peft_method` is 'dora', expected one of"),
        ({"peft_method": "scale_shift", "class_batches": "mixed"}, "`class_batches` is 'mixed'.*'homogeneous'"),
        ({"peft_method": "scale_shift", "strategy": "joint"}, "`strategy` 'joint' ignores"),
        ({"rank": 0}, "`rank` should be a positive integer"),
        ({"num_tasks": 0}, "`num_tasks` should be a positive integer"),
    ],
)
def test_runs_that_cannot_work_are_refused_before_they_write(arguments, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        run(short_run(output_dir=str(tmp_path / "out"), **arguments))
    assert not (tmp_path / "out").exists()
