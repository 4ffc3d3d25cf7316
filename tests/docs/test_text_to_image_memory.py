"""The table of memory savers in docs/guides/text_to_image.md: each row is a test of LoRA, and of FunLoRA.

On a CPU: offloading takes it for both devices, and what is offloaded is NaN in between, not by chance the right values.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import accelerate
import diffusers.hooks.group_offloading as group_offloading
import pytest
import torch
from both_methods import FUNLORA, LORA, Rows, adapted, close, far, two_pipelines
from text_to_image import arguments, component, make_pipeline, sample


pytestmark = pytest.mark.usefixtures("nan_in_empty_tensors")
CPU = torch.device("cpu")
FLOAT8 = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
row = Rows()
# A U-Net and a transformer, one for each order.
orders = pytest.mark.parametrize(("name", "order"), [("SDXL", "adapter first"), ("SD3", "adapter last")])
levels = pytest.mark.parametrize("level", ["leaf_level", "block_level"])


@pytest.fixture
def sequential(monkeypatch):
    """Turns `enable_sequential_cpu_offload` on, whose call for the device "cpu:0" accelerate does not take."""
    cpu_offload = accelerate.cpu_offload
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, device, **options: cpu_offload(model, CPU, **options))
    return lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu")


def in_groups(pipe, level, folder=None):
    options = {"offload_type": level, "num_blocks_per_group": 1, "offload_to_disk_path": folder}
    pipe.enable_group_offload(onload_device=CPU, **options)


@pytest.fixture
def streamed(monkeypatch):
    """Turns group offloading with a stream on, by stand-ins for what a CPU lacks: streams, and copies in pinned memory."""
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cpu, "current_stream", lambda *_: stream)
    monkeypatch.setattr(torch.cpu, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: True)

    def turn_on(pipe, level):
        config = group_offloading.GroupOffloadingConfig(
            onload_device=CPU,
            offload_device=CPU,
            offload_type=group_offloading.GroupOffloadingType(level),
            non_blocking=False,
            record_stream=False,
            low_cpu_mem_usage=False,
            num_blocks_per_group=1,
            stream=stream,
            block_modules=[],
        )
        group_offloading._apply_group_offloading(component(pipe), config)

    return turn_on


def saving(name: str, method: Any, save, order: str = "adapter first") -> tuple[Any, torch.Tensor]:
    """A pipeline with an adapter and a saver turned on by `save(pipe)`, and what it draws without the saver."""
    plain, pipe = (make_pipeline(name) for _ in range(2))
    for each in (plain, pipe):
        if each is pipe and order == "adapter last":
            save(pipe)
        torch.manual_seed(5)
        component(each).add_adapter(method.random(), "mine")
    if order == "adapter first":
        save(pipe)
    return pipe, sample(plain)


def gradients(pipe: Any) -> dict[str, torch.Tensor | None]:
    """Of the adapter, of a call in training mode."""
    component(pipe).train()
    type(pipe).__call__.__wrapped__(pipe, **arguments(pipe)).images.square().mean().backward()
    return {key: p.grad for key, p in component(pipe).named_parameters() if p.requires_grad and ".mine" in key}


def expected_gradients(name: str, method: Any) -> dict[str, torch.Tensor | None]:
    return gradients(saving(name, method, lambda _: None)[0])


def check_draws_fuses_and_trains(pipe, drawn, name, method):
    for _ in range(2):
        close(sample(pipe), drawn)
    torch.testing.assert_close(gradients(pipe), expected_gradients(name, method))
    component(pipe).eval()
    pipe.fuse_lora()
    close(sample(pipe), drawn)
    pipe.unfuse_lora()
    close(sample(pipe), drawn)


def check_fusing(pipe, drawn, method):
    """LoRA is fused without an effect, FunLoRA refuses."""
    if method is FUNLORA:
        with pytest.raises(ValueError, match=r"Cannot merge into .*offloaded"):
            pipe.fuse_lora()
        close(sample(pipe), drawn)
    else:
        pipe.fuse_lora()
        far(sample(pipe), drawn)


@row("`enable_sequential_cpu_offload`")
@two_pipelines
def test_sequential_offload(method, name, sequential):
    pipe, drawn = saving(name, method, sequential)
    for _ in range(2):
        close(sample(pipe), drawn)


@row("`enable_sequential_cpu_offload`, then `add_adapter`")
@two_pipelines
def test_adding_after_sequential_offload(method, name, sequential):
    pipe, drawn = saving(name, method, sequential, "adapter last")
    if method is LORA:
        assert sample(pipe).isnan().all()
    else:
        close(sample(pipe), drawn)


@row("`enable_sequential_cpu_offload`, then `fuse_lora`")
def test_fusing_under_sequential_offload(method, sequential):
    check_fusing(*saving("SDXL", method, sequential), method)


@row("`enable_sequential_cpu_offload`, training an adapter that was added before")
def test_training_what_is_offloaded(method, sequential):
    pipe, _ = saving("SDXL", method, sequential)
    if method is FUNLORA:
        with pytest.raises(RuntimeError, match=r"adapter is offloaded.*Add the adapter after the model is offloaded"):
            gradients(pipe)
    else:
        assert set(gradients(pipe).values()) == {None}


@row("`enable_sequential_cpu_offload`, training an adapter that was added after")
@two_pipelines
def test_training_under_sequential_offload(method, name, sequential):
    pipe, _ = saving(name, method, sequential, "adapter last")
    if method is LORA:
        with pytest.raises(RuntimeError, match="expected device meta but got cpu"):
            gradients(pipe)
    else:
        torch.testing.assert_close(gradients(pipe), expected_gradients(name, method))


@row("`enable_model_cpu_offload`: drawing, `fuse_lora`, training")
@orders
def test_model_offload(method, name, order):
    pipe, drawn = saving(name, method, lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), order)
    check_draws_fuses_and_trains(pipe, drawn, name, method)


@row("`enable_group_offload` by leaves and by blocks: drawing, `fuse_lora`, training")
@orders
@levels
def test_group_offload(method, name, order, level):
    pipe, drawn = saving(name, method, lambda pipe: in_groups(pipe, level), order)
    check_draws_fuses_and_trains(pipe, drawn, name, method)


@row("`enable_group_offload(offload_to_disk_path=...)` by leaves and by blocks: drawing")
@orders
@levels
def test_on_disk(method, name, order, level, tmp_path):
    pipe, drawn = saving(name, method, lambda pipe: in_groups(pipe, level, str(tmp_path)), order)
    for _ in range(2):
        close(sample(pipe), drawn)


@row("with `offload_to_disk_path`, `fuse_lora`")
@levels
def test_fusing_on_disk(method, level, tmp_path):
    check_fusing(*saving("SD", method, lambda pipe: in_groups(pipe, level, str(tmp_path))), method)


@row("with `offload_to_disk_path`, training")
@orders
@levels
def test_training_on_disk(method, name, order, level, tmp_path):
    pipe, _ = saving(name, method, lambda pipe: in_groups(pipe, level, str(tmp_path)), order)
    if method is FUNLORA:
        with pytest.raises(RuntimeError, match=r"offloaded to disk.*Train without `offload_to_disk_path`"):
            gradients(pipe)
    else:
        assert any(gradient.isnan().any() for gradient in gradients(pipe).values())


@row("with `offload_to_disk_path`, saving the adapter")
@levels
def test_saving_on_disk(method, level, tmp_path):
    pipe, _ = saving("SD", method, lambda pipe: in_groups(pipe, level, str(tmp_path / "weights")))
    if method is FUNLORA:
        with pytest.raises(ValueError, match="'mine' is offloaded with the model: save it before"):
            method.save(pipe, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()
    else:
        other = make_pipeline("SD")
        method.save(pipe, tmp_path / "adapter")
        method.load(other, tmp_path / "adapter")
        assert sample(other).isnan().all()


@row("with `offload_to_disk_path`, `delete_adapters`")
@levels
def test_deleting_on_disk(method, level, tmp_path):
    order = "adapter last" if level == "leaf_level" else "adapter first"
    pipe, drawn = saving("SD", method, lambda pipe: in_groups(pipe, level, str(tmp_path)), order)
    if method is FUNLORA:
        with pytest.raises(ValueError, match=r"Cannot delete the adapter 'mine' of .*offloaded to disk"):
            pipe.delete_adapters("mine")
        close(sample(pipe), drawn)
    else:
        pipe.delete_adapters("mine")
        with pytest.raises(RuntimeError) if level == "block_level" else nullcontext():  # weights have changed places
            assert sample(pipe).isnan().all()


@row("`enable_group_offload(use_stream=True)` by leaves and by blocks: drawing")
@pytest.mark.parametrize(
    ("name", "order", "level"),
    [
        ("SDXL", "adapter first", "leaf_level"),
        ("SD3", "adapter last", "leaf_level"),
        ("SD3", "adapter first", "block_level"),
    ],
)
def test_streams(method, name, order, level, streamed):
    pipe, drawn = saving(name, method, lambda pipe: streamed(pipe, level), order)
    for _ in range(3):  # from the second call on, groups are fetched ahead
        close(sample(pipe), drawn)


@row("with `use_stream=True`, `fuse_lora`")
def test_fusing_with_a_stream(method, streamed):
    pipe, drawn = saving("SD", method, lambda pipe: streamed(pipe, "leaf_level"))
    if method is FUNLORA:
        check_fusing(pipe, drawn, method)
    else:
        pipe.fuse_lora()
        close(sample(pipe), drawn)


@row("with `use_stream=True` by blocks, then `add_adapter`")
def test_adding_to_blocks_with_a_stream(method, streamed):
    pipe = make_pipeline("SD")
    streamed(pipe, "block_level")
    if method is FUNLORA:
        with pytest.raises(
            ValueError, match="blocks with a stream, which take no new parameters: add the adapter before"
        ):
            pipe.unet.add_adapter(method.random(), "mine")
        sample(pipe)
    else:
        pipe.unet.add_adapter(method.random(), "mine")
        with pytest.raises(KeyError):
            sample(pipe)


@row("`enable_layerwise_casting` to float8: drawing, as near as the base")
@two_pipelines
def test_casting(method, name):
    def cast(pipe):
        component(pipe).enable_layerwise_casting(**FLOAT8)

    base, exact = make_pipeline(name), sample(make_pipeline(name))
    cast(base)
    error = (sample(base) - exact).abs().max()
    pipe, drawn = saving(name, method, cast)
    far(drawn, exact)
    assert (sample(pipe) - drawn).abs().max() < 2 * error


@row("`add_adapter` after `enable_layerwise_casting` to float8")
@pytest.mark.parametrize("name", ["SD3"])
def test_adding_after_casting(method, name):
    pipe, other = make_pipeline(name), adapted(name, method.random())
    component(pipe).enable_layerwise_casting(**FLOAT8)
    if method is LORA:
        component(pipe).add_adapter(method.random(), "mine")
        with pytest.raises(NotImplementedError, match="Float8"):
            sample(pipe)
    else:
        component(pipe).add_adapter(method.random(), "mine")
        component(pipe).load_state_dict(
            {key: value for key, value in component(other).state_dict().items() if ".mine" in key}, strict=False
        )
        component(other).enable_layerwise_casting(**FLOAT8)
        close(sample(pipe), sample(other))


@row("training a transformer under `enable_layerwise_casting` to float8")
@pytest.mark.parametrize("name", ["SD3", "Flux"])
def test_training_under_casting(method, name):
    pipe, _ = saving(name, method, lambda pipe: component(pipe).enable_layerwise_casting(**FLOAT8))
    expected = torch.cat([gradient.flatten() for gradient in expected_gradients(name, method).values()])
    found = torch.cat([gradient.flatten() for gradient in gradients(pipe).values()])
    assert (found - expected).norm() < 0.2 * expected.norm()


@row("training a U-Net under `enable_layerwise_casting`: its convolutions cannot be differentiated")
def test_training_convolutions_under_casting(method):
    pipe, _ = saving("SD", method, lambda pipe: component(pipe).enable_layerwise_casting(**FLOAT8))
    with pytest.raises(RuntimeError, match="expected scalar type Float but found Float8"):
        gradients(pipe)


@row("`enable_gradient_checkpointing`: equal gradients")
@pytest.mark.parametrize("name", ["SD", "SD3", "Flux"])
def test_gradient_checkpointing(method, name):
    pipe, _ = saving(name, method, lambda pipe: component(pipe).enable_gradient_checkpointing())
    found, expected = gradients(pipe), expected_gradients(name, method)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def quantized(library: str, folder: Any) -> Any:
    """A pipeline whose U-Net is quantized."""
    pipe = make_pipeline("SD")
    if library.startswith("bitsandbytes"):  # by hand, since diffusers' own loading asks for a GPU
        nn = pytest.importorskip("bitsandbytes").nn
        is_4bit = library.endswith("4bit")
        for name, layer in list(pipe.unet.named_modules()):
            attention, _, child = name.rpartition(".")
            if child in ("to_q", "to_k", "to_v"):
                sizes = layer.in_features, layer.out_features, layer.bias is not None
                new = nn.Linear4bit(*sizes) if is_4bit else nn.Linear8bitLt(*sizes, has_fp16_weights=False)
                new.load_state_dict(layer.state_dict())
                setattr(pipe.unet.get_submodule(attention), child, new.to("cpu"))
        setattr(pipe.unet, "is_loaded_in_4bit" if is_4bit else "is_loaded_in_8bit", True)
        return pipe
    if library == "torchao":
        pytest.importorskip("torchao")
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        pytest.importorskip("optimum.quanto")
        from diffusers import QuantoConfig

        config = QuantoConfig(weights_dtype="int8")
    pipe.unet.save_pretrained(folder)
    pipe.unet = type(pipe.unet).from_pretrained(folder, quantization_config=config, torch_dtype=torch.float32)
    return pipe


@row("a base of 8 or 4 bits (bitsandbytes, torchao, quanto)")
@pytest.mark.parametrize("library", ["bitsandbytes 8bit", "bitsandbytes 4bit", "torchao", "quanto"])
def test_quantized_bases(method, library, tmp_path):
    pipe = quantized(library, tmp_path)
    plain = sample(pipe)
    config = method.random(target_modules=["to_q", "to_k", "to_v"])
    if method is FUNLORA:
        with pytest.raises(ValueError, match=r"is quantized.*Load the model without quantization"):
            pipe.unet.add_adapter(config, "mine")
        close(sample(pipe), plain)
    else:
        pipe.unet.add_adapter(config, "mine")
        far(sample(pipe), plain)


def test_the_page_has_these_rows():
    row.check_table("### Memory")
