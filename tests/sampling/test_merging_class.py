"""A class as a plain U-Net, against what the pipeline predicts for it, here and in a process without this package."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from peft import LoraConfig, RoadConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from funlora_hf import AdapterBank, FunLoraConfig, FunLoraPipeline, merge_class
from funlora_hf.baselines import ConvLoraConfig, ScaleShiftConfig
from funlora_hf.continual.strategies.peft_methods import fuse_attention
from funlora_hf.tuner_base.layer import AdapterLayer


ROW = {"class_embedding": [0]}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
METHODS = {
    "lora": lambda: LoraConfig(
        target_modules=[*ATTENTION, "conv1"], init_lora_weights=False, trainable_token_indices=ROW
    ),
    "whole embedding": lambda: LoraConfig(
        target_modules=["to_q"], init_lora_weights=False, use_rslora=True, modules_to_save=["class_embedding"]
    ),
    "road": lambda: RoadConfig(target_modules=ATTENTION, group_size=4, init_weights=False),
    "conv_lora": lambda: ConvLoraConfig(
        target_modules=["conv_in", "up_blocks.0.resnets.0.conv1"], init_weights=False, trainable_token_indices=ROW
    ),
}
FUNLORA = {
    "cosine": {},
    "power, mul-add": {"function": "power", "operation": "mul-add", "ratio": 2, "r": 2},
    "add, everywhere": {"operation": "add", "target_modules": "all-conv"},
    "time embedding": {"target_modules": ["time_embedding.linear_2", "time_embedding.linear_1"]},
    "no vector": {"function": "identity", "class_embedding": None},
    "vector only": {"target_modules": []},
    "whole modules": {"modules_to_save": ["conv_out", "time_embedding.linear_2"]},
}


@pytest.fixture
def unet(tiny_unet):
    """With rows of the class embedding that make a difference, and not in its first state."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in tiny_unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return tiny_unet


@pytest.fixture
def pipe(unet):
    return FunLoraPipeline(unet, FlowMatchEulerDiscreteScheduler(), class_ids=[3, 5], id2label={3: "three"})


@pytest.fixture
def load(pipe, tmp_path):
    return loader(pipe, tmp_path)


def loader(pipe, folder):
    """A function that puts a random adapter of a class into the pipeline."""
    plain = copy.deepcopy(pipe.unet)

    def load(class_id, config):
        torch.manual_seed(class_id)
        model = get_peft_model(copy.deepcopy(plain), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder / str(class_id), save_embedding_layers=False)
        return pipe.load_adapter(folder / str(class_id), class_label=class_id, class_name=f"c{class_id}")

    return load


def make_unet(unet, **changes):
    """A U-Net like another one, but for some of its config."""
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    return UNet2DModel.from_config({**config, **changes}).eval()


def funlora(**config):
    return FunLoraConfig(**{"class_embedding": "class_embedding", "init_weights": False, **config})


def batch(size=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 1, 8, 8, generator=generator), torch.linspace(0.1, 0.9, size)


@torch.no_grad()
def velocity(pipe, class_id):
    sample, sigma = batch()
    return pipe.predict_velocity(sample, sigma, [class_id] * len(sample))


@torch.no_grad()
def run(unet):
    sample, sigma = batch()
    return unet(sample, 1000 * sigma).sample


def snapshot(pipe):
    return {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}


def assert_merged(pipe, class_id, **tolerance):
    """The merged U-Net does what the pipeline does, which is as it was."""
    expected, state = {label: velocity(pipe, label) for label in pipe.classes}, snapshot(pipe)
    random = torch.get_rng_state()
    merged = merge_class(pipe, class_id)
    assert torch.equal(torch.get_rng_state(), random)
    assert type(merged) is UNet2DModel
    assert not merged.training
    assert merged.config.num_class_embeds is None
    assert merged.class_embedding is None
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    torch.testing.assert_close(run(merged), expected[class_id], **tolerance)
    # Nothing that is done to it reaches the pipeline.
    for tensor in merged.state_dict().values():
        tensor.fill_(7)
    after = snapshot(pipe)
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert all(torch.equal(velocity(pipe, label), expected[label]) for label in pipe.classes)


@pytest.mark.parametrize("class_id", [3, 5])
def test_a_class_of_the_base(pipe, class_id):
    assert not torch.allclose(velocity(pipe, 3), velocity(pipe, 5), atol=1e-3)
    assert_merged(pipe, class_id, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FUNLORA)
def test_a_funlora_adapter(pipe, load, name):
    load(8, funlora())
    load(7, funlora(**FUNLORA[name]))
    load(9, funlora(**FUNLORA[name]))
    assert not torch.allclose(velocity(pipe, 7), velocity(pipe, 3), atol=1e-3)
    for class_id in (7, 3, 8):
        assert_merged(pipe, class_id, atol=1e-5, rtol=1e-5)


def test_funlora_beside_an_adapter_with_whole_modules(pipe, load):
    """All of these are adapters of one PeftModel, some with a module of their own and some without."""
    load(12, funlora(modules_to_save=["conv_out"]))
    load(7, funlora())
    load(13, funlora(modules_to_save=["conv_in"], target_modules=["conv2"]))
    for class_id in (7, 12, 13, 5):
        assert_merged(pipe, class_id, atol=1e-5, rtol=1e-5)


@pytest.fixture
def attention_pipe():
    torch.manual_seed(4)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=2,
    ).eval()
    return FunLoraPipeline(unet, FlowMatchEulerDiscreteScheduler(), class_ids=[3, 5])


@pytest.mark.parametrize("method", METHODS)
def test_other_methods(attention_pipe, method, tmp_path):
    load = loader(attention_pipe, tmp_path)
    for class_id in (7, 9):
        load(class_id, METHODS[method]())
    assert not torch.allclose(velocity(attention_pipe, 7), velocity(attention_pipe, 9), atol=1e-3)
    for class_id in (7, 9, 5):
        assert_merged(attention_pipe, class_id, atol=1e-5, rtol=1e-5)


def test_attention_that_was_fused_comes_apart(attention_pipe, tmp_path):
    fuse_attention(attention_pipe.unet)
    load = loader(attention_pipe, tmp_path)
    config = LoraConfig(target_modules=["to_qkv"], init_lora_weights=False, trainable_token_indices=ROW)
    load(7, config)
    for class_id in (7, 5):
        assert_merged(attention_pipe, class_id, atol=1e-5, rtol=1e-5)


def test_a_method_that_cannot_be_merged_says_so(pipe, load):
    load(7, ScaleShiftConfig(target_modules=["conv1"], init_weights=False, trainable_token_indices=ROW))
    before = velocity(pipe, 7)
    with pytest.raises(ValueError, match=r"adapter of class 7 cannot be merged: .*zero padding"):
        merge_class(pipe, 7)
    assert torch.equal(velocity(pipe, 7), before)
    assert_merged(pipe, 3, atol=1e-5, rtol=1e-5)


def test_stock_diffusers_loads_it_without_this_package(pipe, load, tmp_path):
    load(7, funlora())
    expected = velocity(pipe, "c7")
    unet = merge_class(pipe, "c7")
    unet.save_pretrained(tmp_path / "seven")
    sample, sigma = batch()
    torch.save((sample, 1000 * sigma), tmp_path / "inputs.pt")
    script = (
        "import sys, torch; torch.set_num_threads(1); from diffusers import UNet2DModel\n"
        "unet, info = UNet2DModel.from_pretrained(sys.argv[1] + '/seven', output_loading_info=True)\n"
        "assert not any(info.values()), info\n"
        "with torch.no_grad(): result = unet(*torch.load(sys.argv[1] + '/inputs.pt')).sample\n"
        "torch.save(result, sys.argv[1] + '/result.pt')\n"
        "assert 'funlora_hf' not in sys.modules and 'peft' not in unet.__dict__"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=120)
    result = torch.load(tmp_path / "result.pt")
    assert torch.equal(result, run(unet))
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_it_is_a_base_without_classes_and_a_part_of_stock_pipelines(pipe, load, tmp_path):
    load(7, funlora())
    unet = merge_class(pipe, 7)
    assert FunLoraPipeline(unet, FlowMatchEulerDiscreteScheduler()).classes == {}
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path)
    assert torch.equal(run(DDPMPipeline.from_pretrained(tmp_path).unet), run(unet))


def test_without_a_class_embedding_nothing_is_folded(tmp_path, tiny_unet):
    unet = make_unet(tiny_unet, num_class_embeds=None)
    pipe = FunLoraPipeline(unet, FlowMatchEulerDiscreteScheduler())
    loader(pipe, tmp_path)(7, funlora(class_embedding=None))
    assert_merged(pipe, 7, atol=1e-5, rtol=1e-5)


def test_dtype_and_memory_format(pipe, load):
    load(7, funlora(r=2))
    pipe.unet.to(torch.bfloat16, memory_format=torch.channels_last)
    expected = velocity(pipe, 7)
    unet = merge_class(pipe, 7)
    assert {tensor.dtype for tensor in unet.state_dict().values()} == {torch.bfloat16}
    assert all(tensor.is_contiguous() for tensor in unet.state_dict().values())
    sample, sigma = batch()
    with torch.no_grad():
        result = unet(sample.bfloat16(), 1000 * sigma).sample.float()
    torch.testing.assert_close(result, expected, atol=0.05, rtol=0.05)


def test_what_a_bank_s_file_brings(pipe, unet, load, tmp_path):
    plain = copy.deepcopy(unet)
    bank = AdapterBank(plain, funlora())
    for label in (7, 8):
        tensors = {name: 0.3 * torch.randn_like(tensor) for name, tensor in bank.live_tensors.items()}
        bank.add_tensors(tensors, class_label=label)
    bank.save(tmp_path / "bank.safetensors")
    pipe.load_adapter_bank(tmp_path / "bank.safetensors")
    assert_merged(pipe, 8, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("label", [4, "four"])
def test_an_unknown_class_is_named_with_those_there_are(pipe, label):
    with pytest.raises(ValueError, match=rf"`class_labels` has {label!r}, expected .* 3 \(three\), 5 \(5\)"):
        merge_class(pipe, label)


def test_adapters_in_the_weights_are_refused(pipe, load):
    load(7, funlora())
    for layer in (module for module in pipe.unet.modules() if isinstance(module, AdapterLayer)):
        layer.merge(adapter_names=list(layer.settings))
    with pytest.raises(ValueError, match="merged into the base's weights: call `unmerge_adapter`"):
        merge_class(pipe, 3)


def test_a_u_net_whose_vector_has_no_place_is_refused(pipe):
    time = pipe.unet.time_embedding
    time.post_act = torch.nn.SiLU()
    with pytest.raises(ValueError, match="`time_embedding` does not end in a Linear with a bias"):
        merge_class(pipe, 3)
    time.post_act = None
    time.linear_2 = torch.nn.Linear(32, 32, bias=False)
    with pytest.raises(ValueError, match="`time_embedding` does not end in a Linear with a bias"):
        merge_class(pipe, 3)


def test_other_kinds_of_class_embedding_are_refused(tiny_unet):
    pipe = FunLoraPipeline(make_unet(tiny_unet), FlowMatchEulerDiscreteScheduler())
    pipe.unet = make_unet(tiny_unet, class_embed_type="timestep")
    with pytest.raises(
        ValueError, match="`class_embed_type` is 'timestep' and the class embedding a TimestepEmbedding"
    ):
        merge_class(pipe, 0)


def test_a_u_net_that_is_not_as_its_config_says_is_refused(pipe):
    pipe.unet.conv_in.register_parameter("gain", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match=r"also has \['conv_in.gain'\]"):
        merge_class(pipe, 3)


def test_a_u_net_with_a_forward_of_its_own_is_refused(tiny_unet):
    class Other(UNet2DModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    pipe = FunLoraPipeline(Other.from_config(tiny_unet.config), FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match=r"`pipe\.unet` is a Other, expected a UNet2DModel"):
        merge_class(pipe, 0)


def test_tensors_that_are_elsewhere_are_refused(pipe):
    pipe.unet.conv_in.to("meta")
    with pytest.raises(ValueError, match="meta device"):
        merge_class(pipe, 3)
