"""The table in docs/guides/text_to_image.md: each row is a test of LoRA, which shows that the test can fail, and of FunLoRA."""

from __future__ import annotations

import pytest
import torch
from both_methods import (
    ATTENTION,
    FUNLORA,
    LORA,
    Rows,
    adapted,
    close,
    far,
    save_lora,
    two_pipelines,
)
from diffusers.utils import logging, scale_lora_layers, unscale_lora_layers
from huggingface_hub import HfApi
from peft import (
    LoHaConfig,
    PeftMixedModel,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    optimizers,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import hotswap
from safetensors.torch import load_file, save_file
from text_to_image import arguments, component, make_model, make_pipeline, sample
from torch.nn.functional import mse_loss

from funlora_hf import (
    AdapterBank,
    BaseMismatchError,
    hotswap_adapter,
    load_adapter,
    mixed_prompts,
    push_adapter,
    save_adapter,
    set_block_weights,
)


PARTS = ["unet", "text_encoder"]
row = Rows()
pipelines = pytest.mark.parametrize("name", ["SD", "SDXL", "SD3", "Flux"])


@pytest.fixture(scope="session")
def plain() -> dict[str, torch.Tensor]:
    """What each pipeline draws without adapters."""
    return {name: sample(make_pipeline(name)) for name in ("SD", "SDXL", "SD3", "Flux")}


@row("`add_adapter`: a new adapter changes nothing")
@pipelines
def test_a_new_adapter_changes_nothing(method, name, plain):
    close(sample(adapted(name, method.config(target_modules=ATTENTION))), plain[name])


@row("training changes the adapter alone")
@pipelines
def test_training_changes_the_adapter_alone(method, name, plain):
    pipe = adapted(name, method.random())
    model = component(pipe)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = mse_loss(type(pipe).__call__.__wrapped__(pipe, **arguments(pipe)).images, plain[name])
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed
    assert all(".mine" in key for key in changed)


@row("saved and loaded, it draws the same")
@pipelines
def test_a_loaded_adapter_draws_the_same(method, name, plain, tmp_path):
    pipe, other = adapted(name, method.random()), make_pipeline(name)
    method.save(pipe, tmp_path)
    method.load(other, tmp_path)
    far(sample(other), plain[name])
    close(sample(other), sample(pipe))


@row("`get_list_adapters`, `get_active_adapters`")
@two_pipelines
def test_adapters_are_listed(method, name, tmp_path):
    pipe, other = adapted(name, method.random()), make_pipeline(name)
    method.save(pipe, tmp_path)
    method.load(other, tmp_path)
    (names,) = other.get_list_adapters().values()
    assert names == other.get_active_adapters() == ["mine"]


@row("`disable_lora`, `enable_lora`")
@two_pipelines
def test_disabled_adapters_do_nothing(method, name, plain, tmp_path):
    method.save(adapted(name, method.random()), tmp_path)
    pipe = make_pipeline(name)
    method.load(pipe, tmp_path)
    expected = sample(pipe)
    pipe.disable_lora()
    close(sample(pipe), plain[name])
    pipe.enable_lora()
    close(sample(pipe), expected)


@row("`set_adapters` with weights: 0 is the base")
@two_pipelines
def test_adapters_act_at_a_weight(method, name, plain, tmp_path):
    method.save(adapted(name, method.random()), tmp_path)
    pipe = make_pipeline(name)
    method.load(pipe, tmp_path)
    expected = sample(pipe)
    pipe.set_adapters("mine", 0.0)
    close(sample(pipe), plain[name])
    pipe.set_adapters("mine", 0.5)
    half = sample(pipe)
    far(half, plain[name])
    far(half, expected)
    pipe.set_adapters("mine")
    close(sample(pipe), expected)


@row("`set_adapters` of two, alone and together")
@two_pipelines
def test_two_adapters(method, name):
    pipe = adapted(name, method.random())
    mine = sample(pipe)
    component(pipe).add_adapter(method.random(), "other")
    other = sample(pipe)
    pipe.set_adapters(["mine", "other"], [1.0, 0.0])
    close(sample(pipe), mine)
    pipe.set_adapters(["mine", "other"], [0.0, 1.0])
    close(sample(pipe), other)
    pipe.set_adapters(["mine", "other"])
    far(sample(pipe), mine)
    far(sample(pipe), other)


@row("`scale` in `cross_attention_kwargs` or `joint_attention_kwargs`, for one call")
@two_pipelines
def test_a_scale_for_one_call(method, name, plain):
    pipe = adapted(name, method.random())
    expected = sample(pipe)
    field = "joint_attention_kwargs" if hasattr(pipe, "transformer") else "cross_attention_kwargs"
    close(sample(pipe, **{field: {"scale": 0.0}}), plain[name])
    pipe.set_adapters("mine", 0.5)
    half = sample(pipe)
    pipe.set_adapters("mine", 1.0)
    close(sample(pipe, **{field: {"scale": 0.5}}), half)
    close(sample(pipe), expected)


@row("`fuse_lora`, `unfuse_lora`")
@pipelines
def test_fused_into_the_weights(method, name, plain):
    pipe = adapted(name, method.random())
    expected = sample(pipe)
    pipe.fuse_lora()
    close(sample(pipe), expected)
    pipe.unfuse_lora()
    close(sample(pipe), expected)


@row("`fuse_lora(lora_scale=...)`")
@two_pipelines
def test_fused_at_a_scale(method, name):
    pipe = adapted(name, method.random())
    pipe.set_adapters("mine", 0.5)
    half = sample(pipe)
    pipe.set_adapters("mine", 1.0)
    pipe.fuse_lora(lora_scale=0.5)
    close(sample(pipe), half)


@row("`delete_adapters`, of one and of the last")
@two_pipelines
def test_deleted_adapters_are_gone(method, name, plain):
    pipe = adapted(name, method.random())
    mine = sample(pipe)
    component(pipe).add_adapter(method.random(), "other")
    pipe.delete_adapters("other")
    pipe.set_adapters("mine")
    close(sample(pipe), mine)
    pipe.delete_adapters("mine")
    close(sample(pipe), plain[name])
    component(pipe).add_adapter(method.random(), "mine")
    far(sample(pipe), plain[name])


@row("`unload_lora_weights` gives the plain model back")
@two_pipelines
def test_an_unloaded_model_is_plain(method, name, plain):
    pipe = adapted(name, method.random())
    pipe.unload_lora_weights()
    close(sample(pipe), plain[name])
    assert component(pipe).state_dict().keys() == component(make_pipeline(name)).state_dict().keys()


@row("another base is refused")
@two_pipelines
def test_another_base(method, name, tmp_path):
    method.save(adapted(name, method.random()), tmp_path)
    pipe = make_pipeline(name)
    next(iter(component(pipe).parameters())).data.add_(1e-3)
    if method is FUNLORA:
        with pytest.raises(BaseMismatchError):
            method.load(pipe, tmp_path)
    else:
        method.load(pipe, tmp_path)
    assert bool(pipe.get_list_adapters()) == (method is LORA)


@row("`save_lora_adapter` of a component writes what can be loaded")
@two_pipelines
def test_a_component_s_own_saving(method, name, tmp_path):
    pipe, other = adapted(name, method.random()), make_pipeline(name)
    component(pipe).save_lora_adapter(tmp_path, adapter_name="mine")
    if method is LORA:
        component(other).load_lora_adapter(
            tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors", adapter_name="mine"
        )
    else:
        with pytest.warns(UserWarning, match="was not checked that the adapter .* belongs to this base"):
            method.load(other, tmp_path)
        assert not any(p.requires_grad for p in component(other).parameters())
    close(sample(other), sample(pipe))


@row("`save_lora_weights` of a pipeline writes what can be loaded")
@two_pipelines
def test_a_pipeline_s_own_saving(method, name, tmp_path):
    pipe, other = adapted(name, method.random()), make_pipeline(name)
    save_lora(pipe, tmp_path)
    if method is LORA:
        method.load(other, tmp_path)
    else:
        load_adapter(component(other), tmp_path, adapter_name="mine", config=method.random())
    close(sample(other), sample(pipe))


@row("a file with NaN is refused")
@two_pipelines
def test_a_damaged_file(method, name, tmp_path):
    method.save(adapted(name, method.random()), tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    next(iter(tensors.values())).fill_(torch.nan)
    save_file(tensors, file)
    pipe = make_pipeline(name)
    if method is FUNLORA:
        with pytest.raises(ValueError, match="NaN or infinity"):
            method.load(pipe, tmp_path)
    else:
        method.load(pipe, tmp_path)
    assert bool(pipe.get_list_adapters()) == (method is LORA)


@row("a text encoder")
def test_a_text_encoder(method, tmp_path):
    def draw(pipe):
        return pipe("a photo", num_inference_steps=2, output_type="latent", generator=torch.manual_seed(0)).images

    pipe, other = make_pipeline("SD"), make_pipeline("SD")
    plain = draw(pipe)
    pipe.text_encoder.add_adapter(method.random(target_modules=["q_proj", "v_proj"]), "mine")
    if method is LORA:
        layers = get_peft_model_state_dict(pipe.text_encoder, adapter_name="mine")
        pipe.save_lora_weights(tmp_path, text_encoder_lora_layers=layers)
        other.load_lora_weights(tmp_path)
    else:
        save_adapter(pipe.text_encoder, tmp_path, "mine")
        load_adapter(other.text_encoder, tmp_path)
    far(draw(other), plain)
    close(draw(other), draw(pipe))


@row("a model without `add_adapter` (DiT, PixArt): `get_peft_model`")
def test_a_model_without_add_adapter(method, tmp_path):
    def run(model):
        states = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(1))
        inputs = {"timestep": torch.tensor([500]), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        with torch.no_grad():
            return model(torch.ones(1, 4, 8, 8), encoder_hidden_states=states, **inputs).sample

    base = make_model("PixArtTransformer2DModel")
    plain = run(base)
    model = get_peft_model(base, method.random())
    other = make_model("PixArtTransformer2DModel")
    if method is LORA:
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(other, tmp_path)
    else:
        save_adapter(model, tmp_path)
        load_adapter(other, tmp_path)
    far(run(other), plain)
    close(run(other), run(model))


@row("on the Hub")
def test_on_the_hub(method, hub, tmp_path):
    pipe, other = adapted("SD", method.random()), make_pipeline("SD")
    if method is LORA:
        save_lora(pipe, tmp_path)
        HfApi().create_repo("me/subject")
        HfApi().upload_folder(repo_id="me/subject", folder_path=tmp_path)
        other.load_lora_weights("me/subject", weight_name="pytorch_lora_weights.safetensors")
    else:
        push_adapter(pipe.unet, "mine", "me/subject", subfolder=None, base_model="me/base")
        load_adapter(other.unet, "me/subject")
        assert "\n# subject\n" in hub.files("me/subject")["README.md"].decode()
    close(sample(other), sample(pipe))


def test_classes_on_the_hub(hub):
    """For `AdapterBank`: the card at the root names the model, and says how to load them."""
    pipe = adapted("SD", FUNLORA.random())
    push_adapter(pipe.unet, "mine", "me/subjects", class_label=7, base_model="me/base")
    card = hub.files("me/subjects")["README.md"].decode()
    for text in (
        "for a frozen UNet2DConditionModel.",
        'AdapterBank.from_hub("me/subjects", pipe.unet)',
        "bank.activate(7)",
        "pipeline_tag: text-to-image",
    ):
        assert text in card
    for text in ("class-conditional", "FunLoraPipeline", "PeftModel"):
        assert text not in card
    other = make_pipeline("SD")
    AdapterBank.from_hub("me/subjects", other.unet).activate(7)
    close(sample(other), sample(pipe))


@row("`fuse_qkv_projections`, then `add_adapter` on `to_qkv`")
@pytest.mark.parametrize("name", ["SD", "Flux"])
def test_fused_projections(method, name, plain, tmp_path):
    pipe, other = make_pipeline(name), make_pipeline(name)
    for each in (pipe, other):
        component(each).fuse_qkv_projections()
    component(pipe).add_adapter(method.random(target_modules=["to_qkv"]), "mine")
    method.save(pipe, tmp_path)
    method.load(other, tmp_path)
    far(sample(other), plain[name])
    close(sample(other), sample(pipe))


@row("an adapter of the parts of fused projections, which are not called, is refused")
@pytest.mark.parametrize("name", ["SD", "Flux"])
def test_parts_of_fused_projections(method, name, plain, tmp_path):
    config = method.random(target_modules=["attn1.to_v"] if name == "SD" else ["to_v"])
    method.save(adapted(name, config), tmp_path)
    pipe = make_pipeline(name)
    component(pipe).fuse_qkv_projections()
    if method is FUNLORA:
        with pytest.raises(
            ValueError, match=r"to_v is not called, since .* fused: target to_qkv.*unfuse_qkv_projections"
        ):
            method.load(pipe, tmp_path)
        component(pipe).unfuse_qkv_projections()
    method.load(pipe, tmp_path)
    if method is FUNLORA:
        far(sample(pipe), plain[name])
    else:
        close(sample(pipe), plain[name])


@row("a LoRA beside it on other layers, loaded without `adapter_name`")
@pipelines
def test_a_lora_beside_it(method, name, tmp_path):
    save_lora(adapted(name, LORA.random(target_modules=["ff.net.2"])), tmp_path)
    pipe = adapted(name, method.random())
    mine = sample(pipe)
    pipe.load_lora_weights(tmp_path)
    both = ["mine", "default_1"]
    assert list(component(pipe).peft_config) == both
    pipe.set_adapters(both)
    together = sample(pipe)
    far(together, mine)
    pipe.set_adapters(both, [1.0, 0.0])
    close(sample(pipe), mine)
    pipe.set_adapters(both)
    pipe.fuse_lora()
    close(sample(pipe), together)
    pipe.unfuse_lora()
    pipe.delete_adapters("default_1")
    close(sample(pipe), mine)


@row("on a layer that has a LoRA")
@two_pipelines
def test_on_a_layer_with_a_lora(method, name):
    pipe = adapted(name, LORA.random(), "lora")
    if method is FUNLORA:
        with pytest.raises(ValueError, match="fuse the LoRA first"):
            component(pipe).add_adapter(method.random(), "mine")
        expected = sample(pipe)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        close(sample(pipe), expected)
    else:
        expected = sample(pipe)
    component(pipe).add_adapter(method.random(), "mine")
    far(sample(pipe), expected)


@two_pipelines
def test_a_lora_around_it(name, tmp_path):
    """What the page says of a LoRA that is put on a layer with FunLoRA: PEFT asks nobody, so only what is wrong then is refused."""
    save_lora(adapted(name, LORA.random()), tmp_path)
    pipe = adapted(name, FUNLORA.random())
    pipe.load_lora_weights(tmp_path, adapter_name="lora")
    pipe.set_adapters(["mine", "lora"])
    both = sample(pipe)
    pipe.set_adapters("mine")
    far(sample(pipe), both)
    pipe.set_adapters(["mine", "lora"])
    pipe.fuse_lora()
    close(sample(pipe), both)
    pipe.unfuse_lora()
    close(sample(pipe), both)
    pipe.fuse_lora(adapter_names=["mine"])
    close(sample(pipe), both)
    pipe.fuse_lora(adapter_names=["lora"])
    close(sample(pipe), both)
    pipe.unfuse_lora()
    pipe.fuse_lora(adapter_names=["lora"])  # F would multiply what LoRA has added
    with pytest.raises(RuntimeError, match=r"^lora was fused into .* before the adapters of FunLora"):
        sample(pipe)
    with pytest.raises(RuntimeError, match=r"^lora was fused into .*: call `unfuse_lora"):
        pipe.fuse_lora(adapter_names=["mine"])
    pipe.set_adapters("lora")
    far(sample(pipe), both)
    pipe.set_adapters(["mine", "lora"])
    pipe.unfuse_lora()
    close(sample(pipe), both)


BLOCKS = {"target_modules": ["conv1", "to_v"]}


@row("weights by block in `set_adapters`: blocks without attention stay at 1")
def test_weights_of_blocks_with_attention(method, plain):
    pipe = adapted("SD", method.random(**BLOCKS))
    pipe.set_adapters("mine", {"unet": {"down": 0.0, "mid": 0.0, "up": 0.0}})
    far(sample(pipe), plain["SD"])
    pipe = adapted("SD", method.random(target_modules=["to_v"]))
    pipe.set_adapters("mine", {"unet": {"down": 0.0, "mid": 0.0, "up": 0.0}})
    close(sample(pipe), plain["SD"])


@row("`set_block_weights`: all blocks")
@pytest.mark.parametrize(
    ("name", "parts"), [("SD", ["down_blocks", "mid_block", "up_blocks"]), ("SD3", ["transformer_blocks"])]
)
def test_weights_of_all_blocks(method, name, parts, plain):
    pipe = adapted(name, method.random(target_modules=["conv1", "to_v"]))
    expected = sample(pipe)
    set_block_weights(component(pipe), dict.fromkeys(parts, 0.0))
    close(sample(pipe), plain[name])
    set_block_weights(component(pipe), {parts[0]: 0.5})
    far(sample(pipe), plain[name])
    far(sample(pipe), expected)
    set_block_weights(component(pipe), {})
    close(sample(pipe), expected)
    with pytest.raises(ValueError, match="`weights` names nowhere, where no layer has the adapter 'mine'"):
        set_block_weights(component(pipe), {parts[0]: 0.0, "nowhere": 1.0}, "mine")
    close(sample(pipe), expected)


@row("`set_lora_device`")
@two_pipelines
def test_a_device_for_adapters(method, name):
    pipe = adapted(name, method.random())
    if method is FUNLORA:
        with pytest.raises(AttributeError, match="lora_A"):
            pipe.set_lora_device(["mine"], "meta")
        component(pipe).to("meta")
    else:
        pipe.set_lora_device(["mine"], "meta")
    assert all(tensor.is_meta for key, tensor in component(pipe).state_dict().items() if ".mine" in key)


def run(model):
    """What a U-Net gives, alone or in a PeftModel."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(1, 4, 16, generator=generator)
    with torch.no_grad():
        return model(torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([5]), states).sample


def peft_model(method, **config):
    return get_peft_model(make_model("UNet2DConditionModel"), method.random(**config)).eval()


@row("a batch of prompts, each with an adapter of its own")
@pipelines
def test_prompts_with_adapters_of_their_own(method, name):
    pipe = adapted(name, method.random())
    mine = sample(pipe)
    component(pipe).add_adapter(method.random(), "other")
    far(sample(pipe), mine)
    if method is FUNLORA:
        with mixed_prompts(pipe, ["mine"]):
            close(sample(pipe), mine)
    else:
        with pytest.raises(ValueError, match=r"non-existing adapter\(s\): mine"), mixed_prompts(pipe, ["mine"]):
            pass


@row("diffusers' `load_lora_weights` and `load_lora_adapter` of what was saved")
@pipelines
def test_diffusers_own_loaders(method, name, plain, tmp_path, caplog):
    pipe = adapted(name, method.random())
    method.save(pipe, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    part = "transformer" if hasattr(pipe, "transformer") else "unet"
    for load in (
        lambda other: other.load_lora_weights(tmp_path, weight_name=file.name),
        lambda other: component(other).load_lora_adapter(tmp_path, weight_name=file.name, prefix=part),
    ):
        other = make_pipeline(name)
        caplog.clear()
        logger = logging.get_logger("diffusers.loaders")
        logger.addHandler(caplog.handler)
        try:
            load(other)
        except (KeyError, ValueError):
            assert method is FUNLORA
        else:
            missed = f"No LoRA keys associated to {type(component(other)).__name__}" in caplog.text
            assert missed == (method is FUNLORA)
        finally:
            logger.removeHandler(caplog.handler)
        assert bool(other.get_list_adapters()) == (method is LORA)
        close(sample(other), sample(pipe) if method is LORA else plain[name])


@row("a text encoder's adapter in the file of `save_lora_weights`")
def test_a_text_encoder_in_a_file_of_a_pipeline(method, tmp_path):
    pipe, other = make_pipeline("SD"), make_pipeline("SD")
    config = method.random(target_modules=["q_proj"])
    pipe.text_encoder.add_adapter(config, "mine")
    pipe.unet.add_adapter(method.random(), "mine")
    layers = {part: get_peft_model_state_dict(getattr(pipe, part), adapter_name="mine") for part in PARTS}
    pipe.save_lora_weights(tmp_path, layers["unet"], text_encoder_lora_layers=layers["text_encoder"])
    if method is LORA:
        other.load_lora_weights(tmp_path, adapter_name="mine")
    else:
        with pytest.warns(UserWarning, match="Load that of pipe.text_encoder by `prefix='text_encoder'`"):
            load_adapter(other.unet, tmp_path, config=method.random())
        with pytest.warns(UserWarning, match="also has tensors of unet, left out"):
            load_adapter(other.text_encoder, tmp_path, prefix="text_encoder", config=config)
    tokens = torch.tensor([[0, 5, 9, 1]])
    close(other.text_encoder(tokens)[0], pipe.text_encoder(tokens)[0])
    far(other.text_encoder(tokens)[0], make_pipeline("SD").text_encoder(tokens)[0])
    close(run(other.unet), run(pipe.unet))


@row("a file of another name: `weight_name`")
def test_a_file_of_another_name(method, tmp_path):
    pipe, other = adapted("SD", method.random()), make_pipeline("SD")
    pipe.unet.save_lora_adapter(tmp_path, adapter_name="mine", weight_name="mine.safetensors")
    if method is LORA:
        other.unet.load_lora_adapter(tmp_path, prefix=None, weight_name="mine.safetensors")
    else:
        load_adapter(other.unet, tmp_path, weight_name="mine.safetensors")
    close(sample(other), sample(pipe))


@row("`modules_to_save`")
def test_modules_to_save(method, tmp_path):
    model, other = peft_model(method, modules_to_save=["conv_in"]), make_model("UNet2DConditionModel")
    before = run(model)
    with torch.no_grad():
        model.base_model.model.conv_in.modules_to_save["default"].weight.add_(1.0)
    far(run(model), before)
    if method is LORA:
        model.save_pretrained(tmp_path)
        other = PeftModel.from_pretrained(other, tmp_path)
    else:
        save_adapter(model, tmp_path)
        load_adapter(other, tmp_path)
    close(run(other), run(model))


@row("`exclude_modules`, `layers_to_transform`, `layers_pattern`")
def test_which_layers_are_adapted(method):
    model = peft_model(
        method,
        target_modules=["to_q", "to_v"],
        exclude_modules=["attn2.to_v"],
        layers_to_transform=[1],
        layers_pattern="attentions",
    )
    found = [name for name, module in model.base_model.model.named_modules() if isinstance(module, BaseTunerLayer)]
    block = "up_blocks.0.attentions.1.transformer_blocks.0"
    assert sorted(found) == [f"{block}.attn1.to_q", f"{block}.attn1.to_v", f"{block}.attn2.to_q"]


@row("`rank_pattern`, `alpha_pattern`: another `r` for some layers")
def test_another_r_for_some_layers(method):
    fields = {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 4}}
    if method is LORA:
        model = peft_model(method, target_modules=["to_q", "to_v"], **fields)
    else:
        with pytest.raises(TypeError, match="unexpected keyword argument 'rank_pattern'"):
            method.config(**fields)
        model = peft_model(method, target_modules=["to_v"], r=8)
        model.add_adapter("other", method.random(target_modules=["to_q"], r=2))
        model.base_model.set_adapter(["default", "other"])
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    assert {name.rpartition(".")[2]: set(layer.r.values()) for name, layer in layers.items()} == {
        "to_q": {2},
        "to_v": {8},
    }
    assert all(layer.active_adapters for layer in layers.values())
    far(run(model), run(make_model("UNet2DConditionModel")))


@row("`target_parameters`: a parameter by name")
def test_a_parameter_by_name(method):
    target = {"target_modules": [], "target_parameters": ["attn1.to_q.weight"]}
    if method is LORA:
        model = peft_model(method, **target)
    else:
        with pytest.raises(TypeError, match="unexpected keyword argument 'target_parameters'"):
            method.config(**target)
        model = peft_model(method, target_modules=["attn1.to_q"])
    far(run(model), run(make_model("UNet2DConditionModel")))


@row("`low_cpu_mem_usage=True` of PEFT's `from_pretrained` and `load_adapter`")
def test_low_cpu_mem_usage(method, tmp_path):
    model = peft_model(method)
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(make_model("UNet2DConditionModel"), tmp_path, low_cpu_mem_usage=True)
    close(run(other), run(model))
    other.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    other.set_adapter("second")
    close(run(other), run(model))


@row("`inject_adapter_in_model(..., state_dict=...)`: the layers of a file")
def test_layers_of_a_state_dict(method):
    model = peft_model(method)
    tensors = {key.removeprefix("base_model.model."): t for key, t in get_peft_model_state_dict(model).items()}
    other = make_model("UNet2DConditionModel")
    inject_adapter_in_model(method.config(target_modules=ATTENTION), other, state_dict=tensors)
    assert not set_peft_model_state_dict(other, tensors).unexpected_keys
    close(run(other), run(model))


@row("`get_model_status`, `get_layer_status`")
def test_the_status_of_a_model(method):
    model = peft_model(method)
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.num_adapter_layers == len(model.get_layer_status()) > 0
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


@row("`merge_and_unload(progressbar=True, safe_merge=True)`")
def test_merged_and_unloaded(method):
    model = peft_model(method)
    expected = run(model)
    merged = model.merge_and_unload(progressbar=True, safe_merge=True)
    assert type(merged) is type(make_model("UNet2DConditionModel"))
    close(run(merged), expected)
    model = peft_model(method)
    next(tensor for key, tensor in model.named_parameters() if ".default" in key).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True)


@row("PEFT's `hotswap_adapter`: another adapter's values, without compiling again")
def test_another_adapter_s_values(method, tmp_path):
    model, other = peft_model(method), peft_model(method)
    for key, tensor in other.named_parameters():
        if ".default" in key:
            tensor.data.add_(0.1)
    other.save_pretrained(tmp_path)
    far(run(model), run(other))
    if method is LORA:
        hotswap.hotswap_adapter(model, tmp_path, "default")
    else:
        with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
            hotswap.hotswap_adapter(model, tmp_path, "default")
        hotswap_adapter(model, load_file(tmp_path / "adapter_model.safetensors"))
    close(run(model), run(other))


@row("PEFT's `rescale_adapter_scale`")
def test_rescaled_for_a_time(method):
    model = peft_model(method)
    expected, plain = run(model), run(make_model("UNet2DConditionModel"))
    if method is LORA:
        with rescale_adapter_scale(model, 0.0):
            close(run(model), plain)
    else:
        with pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"):
            rescale_adapter_scale(model, 0.0).__enter__()
    scale_lora_layers(model, 0.5)
    far(run(model), expected)
    far(run(model), plain)
    unscale_lora_layers(model, 0.5)
    close(run(model), expected)


@row("`add_weighted_adapter`")
def test_a_weighted_sum(method):
    model = peft_model(method)
    model.add_adapter("other", method.random())
    if method is LORA:
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="cat")
        model.set_adapter("both")
        both = run(model)
    else:
        with pytest.raises(NotImplementedError, match=r"FunLoraModel: activate several adapters by `set_adapter`"):
            model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both")
        assert list(model.peft_config) == ["default", "other"]
    model.base_model.set_adapter(["default", "other"])
    for adapter in ("default", "other"):
        set_block_weights(model, dict.fromkeys(["down_blocks", "mid_block", "up_blocks"], 0.5), adapter)
    if method is LORA:
        close(run(model), both)
    far(run(model), run(make_model("UNet2DConditionModel")))


@row("`PeftMixedModel`: two methods in one model")
def test_two_methods(method):
    config, loha = method.random(), LoHaConfig(target_modules=["ff.net.2"], alpha=256, init_weights=False)
    if method is LORA:
        model = PeftMixedModel(make_model("UNet2DConditionModel"), config)
        model.add_adapter("other", loha)
        model.set_adapter(["default", "other"])
    else:
        with pytest.raises(ValueError, match="'FUNLORA' is not compatible with the `PeftMixedModel`"):
            PeftMixedModel(make_model("UNet2DConditionModel"), config)
        model = make_model("UNet2DConditionModel")
        model.add_adapter(config)
        model.add_adapter(loha, "other")
        model.set_adapter(["default", "other"])
    both = run(model.eval())
    model.set_adapter("other")
    far(run(model), both)
    far(run(model), run(make_model("UNet2DConditionModel")))


@row("`convert_to_lora`, for those who do not have this package")
def test_converted_to_lora(method):
    model = peft_model(method)
    config, tensors = convert_to_lora(model, rank=16)
    other = get_peft_model(make_model("UNet2DConditionModel"), config).eval()
    set_peft_model_state_dict(other, tensors)
    close(run(other), run(model))
    if method is FUNLORA:
        with pytest.raises(TypeError, match=r"do not support LoRA conversion: .*FunLoraConv2d"):
            convert_to_lora(peft_model(method, target_modules=["conv1"]), rank=16)


@row("PEFT's optimizers: LoRA+, LoRA-FA, Riemannian")
def test_optimizers_of_lora(method):
    def step(create, **settings):
        model = peft_model(method, r=4)
        before = {name: tensor.clone() for name, tensor in model.named_parameters()}
        optimizer = create(model, **settings)
        model(torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.ones(1, 4, 16)).sample.square().mean().backward()
        optimizer.step()
        changed = [name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])]
        rates = {id(tensor): group["lr"] for group in optimizer.param_groups for tensor in group["params"]}
        return {name.split("lora_")[1].partition(".")[0]: rates[id(model.get_parameter(name))] for name in changed}

    adamw = {"optimizer_cls": torch.optim.AdamW, "lr": 1e-3}
    fast = {"B": 16e-3} if method is LORA else {"B": 16e-3, "alpha": 16e-3, "omega": 16e-3}
    found = step(optimizers.create_loraplus_optimizer, **adamw, loraplus_lr_ratio=16)
    assert found == pytest.approx({"A": 1e-3, **fast})
    if method is LORA:
        assert step(optimizers.create_lorafa_optimizer, r=4, lora_alpha=4, lr=1e-3) == {"B": 1e-3}
    else:
        with pytest.raises(TypeError, match="NoneType"):
            step(optimizers.create_lorafa_optimizer, r=4, lora_alpha=4, lr=1e-3)
    create_riemannian = getattr(optimizers, "create_riemannian_optimizer", None)  # of peft 0.21
    if create_riemannian and method is LORA:
        assert step(create_riemannian, **adamw) == {"A": 1e-3, "B": 1e-3}
    elif create_riemannian:
        with pytest.raises(ValueError, match="did not find any trainable lora_A/lora_B"):
            step(create_riemannian, **adamw)


def test_the_page_has_these_rows():
    row.check_table("## What works")
