"""Compiled training: nothing anew for the second class, the same files, torch's errors with a remedy."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DModel
from runs import TINY_UNET, short_run
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from funlora_hf.continual.compilation import COMPILED_BLOCKS, CompilationError, compile_blocks
from funlora_hf.continual.strategies.funlora import FunLora
from funlora_hf.run import run


# Compiled code draws other random numbers.
UNET = {**TINY_UNET, "dropout": 0.0}
ATTENTION = {**UNET, "attention_head_dim": 8, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}


@pytest.fixture(autouse=True)
def _clean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = torch._dynamo.config.cache_size_limit
    torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.reset()
    torch._dynamo.config.cache_size_limit = before


@pytest.fixture
def backend(monkeypatch):
    """Sets what compiles instead of inductor, which takes a C++ compiler and a minute."""
    original = UNet2DModel.compile_repeated_blocks

    def use(backend):
        monkeypatch.setattr(
            UNet2DModel,
            "compile_repeated_blocks",
            lambda self, **kwargs: original(self, **{**kwargs, "backend": backend}),
        )

    return use


@pytest.fixture
def graphs(monkeypatch):
    """How many graphs there are at the end of each phase, by its name."""
    found, end_phase = {}, FunLora.end_phase

    def end(self, phase, trainable):
        found[phase.name] = counters["stats"]["unique_graphs"]
        end_phase(self, phase, trainable)

    monkeypatch.setattr(FunLora, "end_phase", end)
    return found


def check_files(compiled: str, plain: str, classes: range) -> None:
    files = ["base/unet/diffusion_pytorch_model.safetensors"]
    files += [f"adapters/class_{class_id}/adapter_model.safetensors" for class_id in classes]
    for file in files:
        ours, theirs = load_file(f"{compiled}/{file}"), load_file(f"{plain}/{file}")
        assert list(ours) == list(theirs)
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], atol=2e-4, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("unet", [pytest.param(UNET, id="plain"), pytest.param(ATTENTION, id="attention")])
def test_the_second_class_compiles_nothing_anew(unet, backend, graphs):
    backend("aot_eager")
    run(short_run(unet_config=unet, torch_compile=True, output_dir="compiled"))
    numbers = list(graphs.values())
    assert list(graphs) == ["base", *(f"class_{class_id}" for class_id in range(4, 10))]
    assert 0 < numbers[0] < numbers[1]
    assert set(numbers[1:]) == {numbers[1]}
    torch._dynamo.reset()
    run(short_run(unet_config=unet, output_dir="plain"))
    check_files("compiled", "plain", range(4, 10))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["scale_shift", "lora_conv_v2", "lora_attention"])
def test_nor_does_it_with_another_method(method, backend, graphs):
    backend("eager")
    run(short_run(unet_config=ATTENTION, peft_method=method, torch_compile=True, num_tasks=2))
    assert len({number for name, number in graphs.items() if name != "base"}) == 1


@pytest.mark.slow
def test_by_the_default_compiler(graphs):
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("inductor finds no C++ compiler")
    unet = {
        **UNET,
        "block_out_channels": [8],
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
        "mid_block_type": None,
    }
    arguments = {"unet_config": unet, "num_tasks": 2, "classes_per_task": 2, "target_modules": ["decoder"]}
    run(short_run(**arguments, torch_compile=True, output_dir="compiled"))
    assert graphs["base"] < graphs["class_2"] == graphs["class_3"]
    torch._dynamo.reset()
    run(short_run(**arguments, output_dir="plain"))
    check_files("compiled", "plain", range(2, 4))


def test_an_error_of_the_compiler_comes_with_a_remedy(backend, tmp_path):
    def broken(graph, inputs):
        raise RuntimeError("no such instruction")

    backend(broken)
    with pytest.raises(CompilationError, match=r"(?s)leave --torch_compile out.*no such instruction"):
        run(short_run(torch_compile=True))
    assert not (tmp_path / "out" / "base").exists()


def test_blocks_of_every_kind_are_compiled_and_keep_their_names(tmp_path):
    unet = UNet2DModel(**ATTENTION)
    names = list(unet.state_dict())
    compile_blocks(unet)
    kinds = {type(module).__name__ for module in unet.modules() if module._compiled_call_impl is not None}
    assert kinds == set(COMPILED_BLOCKS)
    assert list(unet.state_dict()) == names
    unet.save_pretrained(tmp_path / "saved")
    assert list(UNet2DModel.from_pretrained(tmp_path / "saved").state_dict()) == names
