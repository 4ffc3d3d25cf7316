"""The model against the stock pipelines: prompts, denoiser and latents; adapters, precisions, processes; real configs."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from diffusers import DDPMScheduler, FluxPipeline, FluxTransformer2DModel, PixArtTransformer2DModel
from peft import LoraConfig, get_peft_model
from real_models import real_model
from runs import REPOSITORY
from text_encoders import PIPELINES, make_prompted
from text_to_image import make_pipeline

from funlora_hf import FunLoraConfig, parameters_per_class
from funlora_hf.text_to_image.model import LAYERS, TextToImageModel
from funlora_hf.text_to_image.objective import Objective
from funlora_hf.text_to_image.token_rows import prompt_arguments


FAMILIES = list(PIPELINES)
CAPTIONS = ["a toy", "", "b"]


def make_model(family) -> TextToImageModel:
    return TextToImageModel(make_prompted({**PIPELINES, "pixart_sigma": "PixArtSigma"}[family]))


@torch.no_grad()
def encode_prompt(pipe, prompt, guidance=False):
    """The pipeline's own states, by the names under which the model returns them, and the negative ones."""
    others = {"prompt_2": None, "prompt_3": None} if hasattr(pipe, "tokenizer_3") else {}
    options = {"num_images_per_prompt": 1}
    if not isinstance(pipe, FluxPipeline):
        options["do_classifier_free_guidance"] = guidance
    found = pipe.encode_prompt(**{**others, **prompt_arguments(pipe, prompt)}, device="cpu", **options)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    if "clean_caption" in prompt_arguments(pipe, prompt):  # PixArt
        names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    if isinstance(pipe, FluxPipeline):
        names = ("prompt_embeds", "pooled_prompt_embeds")
    return {name: part for name, part in zip(names, found, strict=False) if part is not None}


def inputs(model, n=2):
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(n, model.latent_shape[0], 8, 8, generator=generator)
    times = torch.tensor([3, 700][:n])
    return noisy, times.float() if Objective(model.scheduler).is_flow else times


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "pixart_sigma"])
def test_encode_is_the_pipelines(family, guidance):
    model = make_model(family)
    model.add_rows({"<v1>": "b"}, num_vectors=2)
    pipe = model.pipeline()
    if family == "sdxl":
        pipe.register_to_config(force_zeros_for_empty_prompt=False)
    for caption in [*CAPTIONS, "a <v1> b", "A <V1> b"]:
        expected = encode_prompt(pipe, caption, guidance)
        encoded = model.encode([caption])
        assert encoded.keys() == {name for name in expected if not name.startswith("negative")}
        assert all(torch.equal(value, expected[name]) for name, value in encoded.items())
        if guidance and family != "flux":
            empty = model.encode([""])
            assert all(torch.equal(value, expected[f"negative_{name}"]) for name, value in empty.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_encode_of_a_batch_is_that_of_each(family):
    model = make_model(family)
    rows = model.add_rows({"<v1>": "b"})
    rows.train_only(["<v1>"])
    captions = ["a <v1>", "b", "<v1> c", "b", "a <v1>"]
    batch = model.encode(captions)
    for i, caption in enumerate(captions):
        for name, value in model.encode([caption]).items():
            torch.testing.assert_close(batch[name][i], value[0])


def test_t5_reads_captions_without_the_tokens():
    model = make_model("sd3")
    rows = model.add_rows({"<v1>": "b"})
    rows.train_only(["<v1>"])
    with_token, without = (model.encode([caption])["prompt_embeds"][:, 8:] for caption in ("a <v1> toy", "a toy"))
    assert torch.equal(with_token, without)
    assert not torch.equal(without, model.encode(["toy"])["prompt_embeds"][:, 8:])


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "pixart", "pixart_sigma"])
def test_predictions_are_those_inside_the_pipeline(family):
    """Two steps of a pipeline's call, guided: what it gives its denoiser, and gets from it."""
    model = make_model(family)
    pipe, calls = model.pipeline(), []
    model.denoiser.register_forward_hook(
        lambda module, args, kwargs, out: calls.append((args, kwargs, out[0])), with_kwargs=True
    )
    options = {"num_inference_steps": 2, "height": model.resolution, "width": model.resolution, "guidance_scale": 3.0}
    pipe(
        **prompt_arguments(pipe, "a toy"), **options, output_type="latent", generator=torch.Generator().manual_seed(0)
    )
    recorded = list(calls)
    assert len(recorded) == 2
    for args, kwargs, out in recorded:
        noisy = args[0] if args else kwargs["hidden_states"]
        times = kwargs["timestep"] if "timestep" in kwargs else args[1]
        prompt = model.encode(["", "a toy"])
        if family == "sdxl":  # the stock pipeline has zeros for an empty prompt
            prompt = {
                name: value * torch.tensor([0.0, 1.0]).view(-1, *[1] * (value.dim() - 1))
                for name, value in prompt.items()
            }
        out = out[:, : noisy.shape[1]]  # of PixArt, without the variance
        torch.testing.assert_close(model.denoise(noisy, times, prompt), out)
        second = model(noisy[1:], times[1:] if times.dim() else times, ["a toy"])
        torch.testing.assert_close(second, out[1:])


@pytest.mark.parametrize("guided", [False, True])
def test_predictions_of_flux_are_those_inside_its_pipeline(guided):
    """Two steps of 8 x 12 pixels, with the embedded guidance of training; the pipeline itself unpacks its latents."""
    pipe, calls = make_prompted("Flux"), []
    torch.manual_seed(0)
    config = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
    denoiser = FluxTransformer2DModel(**{**config, "guidance_embeds": guided}).eval()
    pipe.register_modules(transformer=denoiser)
    model = TextToImageModel(pipe)
    denoiser.register_forward_hook(lambda _, args, kwargs, out: calls.append((kwargs, out[0])), with_kwargs=True)
    size = {"height": 8, "width": 12, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    pipe = model.pipeline()
    pipe(**prompt_arguments(pipe, "a toy"), **size)
    recorded = list(calls)
    assert len(recorded) == 2
    for kwargs, out in recorded:
        assert (kwargs["guidance"] is not None) == guided
        noisy, expected = (pipe._unpack_latents(one, 8, 12, 1) for one in (kwargs["hidden_states"], out))
        assert noisy.shape == (1, 4, 8, 12)
        torch.testing.assert_close(model(noisy, 1000 * kwargs["timestep"], ["a toy"]), expected)


def test_pixart_for_1024_pixels_reads_the_size():
    """Its pipeline's own call, of 8 x 16 pixels."""
    pipe = make_prompted("PixArt")
    torch.manual_seed(0)
    sizes = {"attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 16}
    large = PixArtTransformer2DModel(num_attention_heads=2, num_layers=1, sample_size=128, **sizes)
    pipe.register_modules(transformer=large.eval())
    model, calls = TextToImageModel(pipe), []
    assert (model.resolution, model.denoiser.use_additional_conditions) == (128, True)
    model.denoiser.register_forward_hook(
        lambda _, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True
    )
    size = {"height": 8, "width": 16, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    pipe(**prompt_arguments(pipe, "a toy"), **size)
    ((noisy,), kwargs, (out,)) = calls[0]
    assert not torch.equal(*kwargs["added_cond_kwargs"]["resolution"].T)
    torch.testing.assert_close(model(noisy, kwargs["timestep"], ["a toy"]), out[:, :4])


def test_prompts_of_pixart_are_cut_where_its_pipeline_cuts_them():
    model = make_model("pixart")
    assert model.tokenizers["text_encoder"].model_max_length == 120
    assert model.encode(["a" * 200])["prompt_embeds"].shape == (1, 120, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pipeline_is_made_of_the_same_modules(family):
    stock = make_prompted(PIPELINES[family])
    model = TextToImageModel(stock)
    pipe = model.pipeline()
    assert type(pipe) is type(stock)
    for name, part in stock.components.items():
        assert getattr(pipe, name) is part
    assert pipe.config.get("force_zeros_for_empty_prompt") == stock.config.get("force_zeros_for_empty_prompt")


@pytest.mark.parametrize("family", FAMILIES)
def test_all_is_frozen_and_in_evaluation_mode(family):
    model = make_model(family)
    model.add_rows({"<v1>": "b"})
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.train()
    assert model.denoiser.training
    assert not any(module.training for part in (model.text_encoders, model.vae) for module in part.modules())
    size = 128 if family == "flux" else 8  # that of its pipeline
    assert (model.resolution, model.latent_shape) == (size * model.vae_scale_factor, (4, size, size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_and_rows_train_under_autocast(family, peft, dtype):
    model = make_model(family)
    rows = model.add_rows({"<v1>": "b"})
    rows.train_only(["<v1>"])
    names = model.layers("kv")
    config = FunLoraConfig(target_modules=names) if peft else LoraConfig(target_modules=names, init_lora_weights=False)
    if peft:
        model.denoiser = get_peft_model(model.denoiser, config)
    else:
        model.denoiser.add_adapter(config)
    assert model.layers("kv") == names
    model.train()
    noisy, times = inputs(model)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        prediction = model(noisy, times, ["a <v1>", "b"])
        loss = prediction.float().square().mean()
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) > len(list(rows.parameters()))
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
    assert all(parameter.grad.abs().sum() > 0 for parameter in rows.parameters())
    with torch.no_grad():
        image = model.pipeline()(
            **prompt_arguments(model.pipeline(), "a <v1>"), num_inference_steps=1, output_type="np", height=8, width=8
        )
    assert image.images.shape == (1, 8, 8, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_of_half_precision(family):
    """Weights in bfloat16, rows in float32."""
    model = make_model(family).to(torch.bfloat16)
    rows = model.add_rows({"<v1>": "b"})
    rows.train_only(["<v1>"])
    prediction = model(*inputs(model), ["a <v1>", "b"])
    assert prediction.dtype == torch.bfloat16
    prediction.float().square().mean().backward()
    assert all(row.dtype == row.grad.dtype == torch.float32 for row in rows.parameters())


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family", ["sd", "sd3", "pixart", "flux"])
def test_ddp_finds_a_gradient_of_each_parameter(family, one_process):
    """Also where no caption of a process's share has a token: otherwise the second step raises."""
    model = make_model(family)
    rows = model.add_rows({"<v1>": "b", "<v2>": "c"})
    rows.train_only(["<v1>"])
    model.denoiser.add_adapter(LoraConfig(target_modules=model.layers("cross")))
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for captions in (["a b", "b"], ["a <v1>", "b"], ["a <v2>", "b"], ["a b", "b"]):
        model.zero_grad()
        wrapped(*inputs(model), captions).square().mean().backward()
        has_token = "<v1>" in captions[0]
        assert all((row.grad.abs().sum() > 0) == has_token for row in rows.parameters() if row.requires_grad)
    del wrapped


def test_captions_without_a_row_are_encoded_once():
    model = make_model("sd")
    rows = model.add_rows({"<v1>": "b"})
    rows.train_only(["<v1>"])
    calls = []
    model.text_encoders["text_encoder"].register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        first = model.encode(["a b"])["prompt_embeds"]
    assert torch.equal(model.encode(["a b", "a b"])["prompt_embeds"][1:], first)
    assert len(calls) == 1
    model.encode(["a <v1>"])["prompt_embeds"].sum().backward()
    model.encode(["a <v1>"])
    assert len(calls) == 3
    for i in range(200):
        model.encode(["a b", "".join(chr(97 + int(digit)) for digit in str(i))])
    assert len(calls) == 3 + 200
    assert len(model._states) <= 128
    assert model.to(torch.bfloat16).encode(["a b"])["prompt_embeds"].dtype == torch.bfloat16


def test_frozen_rows_that_change_are_seen():
    model = make_model("sd")
    rows = model.add_rows({"<v1>": "b"})
    before = model.encode(["a <v1>"])["prompt_embeds"]
    with torch.no_grad():
        rows.parameters_of("<v1>")["text_encoder"].add_(1)
    assert not torch.equal(model.encode(["a <v1>"])["prompt_embeds"], before)


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_of_images_are_what_the_pipeline_decodes(family):
    model = make_model(family)
    generator = torch.Generator().manual_seed(0)
    size = 2 * model.vae_scale_factor
    images = torch.randint(256, (3, 3, size, size), generator=generator, dtype=torch.uint8)
    mean, std = model.encode_images(images)
    posterior = model.vae.encode(images / 127.5 - 1).latent_dist
    config = model.vae.config
    shift = config.shift_factor or 0.0
    torch.testing.assert_close(mean / config.scaling_factor + shift, posterior.mean)
    torch.testing.assert_close(std / config.scaling_factor, posterior.std)
    one_by_one = [model.encode_images(image[None]) for image in images]
    assert torch.equal(mean, torch.cat([mean for mean, _ in one_by_one]))
    half = make_model(family).to(torch.float16)
    half_mean, _ = half.encode_images(images)
    assert half_mean.dtype == torch.float32
    assert half.vae.dtype == torch.float16
    torch.testing.assert_close(half_mean, mean, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 9, dtype=torch.uint8)],
)
def test_other_images_are_refused(images):
    model = make_model("sd")
    model.vae_scale_factor = 2
    with pytest.raises(ValueError, match=r"`images` are .* expected torch\.uint8 of "):
        model.encode_images(images)


# --- from_pretrained


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_pipeline_is_loaded(family, tmp_path):
    stock = make_prompted(PIPELINES[family])
    stock.save_pretrained(tmp_path)
    model = TextToImageModel.from_pretrained(tmp_path)
    assert model.family == family
    expected = TextToImageModel(stock)
    noisy, times = inputs(expected)
    assert torch.equal(model(noisy, times, ["a toy", ""]), expected(noisy, times, ["a toy", ""]))
    half = TextToImageModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_t5_may_be_left_out(tmp_path):
    stock = make_prompted("SD3")
    stock.save_pretrained(tmp_path)
    model = TextToImageModel.from_pretrained(tmp_path, drop_t5=True)
    assert list(model.text_encoders) == ["text_encoder", "text_encoder_2"]
    expected = encode_prompt(model.pipeline(), "a toy")
    assert all(torch.equal(value, expected[name]) for name, value in model.encode(["a toy"]).items())
    assert not model.encode(["a toy"])["prompt_embeds"][:, 8:].any()
    make_prompted("SD").save_pretrained(tmp_path / "sd")
    with pytest.raises(ValueError, match=r"`drop_t5` is True, expected False: .* is a StableDiffusionPipeline"):
        TextToImageModel.from_pretrained(tmp_path / "sd", drop_t5=True)


def test_another_pipeline_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    known = "StableDiffusionPipeline, .*, PixArtAlphaPipeline, PixArtSigmaPipeline, FluxPipeline"
    with pytest.raises(ValueError, match=f"is a DiTPipeline, expected one of: {known}"):
        TextToImageModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`pipe` is a DiTPipeline"):
        TextToImageModel(make_pipeline("DiT"))
    with pytest.raises(ValueError, match="`pipe` has no text_encoder and no text_encoder_2"):
        TextToImageModel(make_pipeline("SDXL"))


def test_a_scheduler_of_samples_is_refused(tmp_path):
    pipe = make_prompted("SD")
    pipe.scheduler = DDPMScheduler(prediction_type="sample")
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="prediction_type 'sample'"):
        TextToImageModel.from_pretrained(tmp_path)


def test_pickles_are_refused(tmp_path):
    make_prompted("SD").save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        TextToImageModel.from_pretrained(tmp_path)


def test_shards_of_another_type_are_refused(tmp_path):
    make_prompted("SD").save_pretrained(tmp_path)
    unet = tmp_path / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "shard.bin")
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "shard.bin"}}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names the file 'shard\.bin', expected safetensors files"):
        TextToImageModel.from_pretrained(tmp_path)


def test_a_class_of_another_library_is_refused(tmp_path):
    make_prompted("SD").save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "unet": ["antigravity", "Model"]}))
    with pytest.raises(
        ValueError, match=r"has 'unet' \['antigravity', 'Model'\], expected a class of diffusers or transformers"
    ):
        TextToImageModel.from_pretrained(tmp_path)


def test_a_vae_with_means_is_refused():
    pipe = make_prompted("SDXL")
    pipe.vae.register_to_config(latents_mean=[0.0] * 4)
    with pytest.raises(ValueError, match=r"`vae\.latents_mean` is set"):
        TextToImageModel(pipe)


def test_rows_are_added_once():
    model = make_model("sd")
    model.add_rows({"<v1>": "b"})
    with pytest.raises(ValueError, match="has rows for <v1> already"):
        model.add_rows({"<v2>": "b"})


# --- real configs


@pytest.fixture
def real(request):
    """A model with the real denoiser, on the meta device, of a pipeline whose other parts are tiny."""
    family, name = request.param
    pipe = make_prompted(PIPELINES[family])
    # A shallow copy, since PixArt's gets methods.
    pipe.register_modules(**{"unet" if hasattr(pipe, "unet") else "transformer": copy.copy(real_model(name))})
    return TextToImageModel(pipe)


def numbers(model, kind):
    modules = dict(model.denoiser.named_modules())
    return sum(modules[name].weight.numel() for name in model.layers(kind))


REAL = [("sd", "SD 1.5"), ("sdxl", "SDXL"), ("sd3", "SD3 medium"), ("pixart", "PixArt-alpha"), ("flux", "Flux.1 dev")]


# Width of the text, and blocks of each width C. K and V are (C, text), all other projections (C, C).
WIDTHS = {
    "sd": (768, {320: 5, 640: 5, 1280: 6}),
    "sdxl": (2048, {640: 10, 1280: 60}),
}


@pytest.mark.parametrize("real", REAL, indirect=True, ids=FAMILIES)
def test_layers_of_real_denoisers(real):
    found = {kind: (len(real.layers(kind)), numbers(real, kind)) for kind in LAYERS}
    if real.family == "sd3":
        square = 1536**2
        # The last block has no `to_add_out`; the middle third has 8 blocks, whose `ff.net.2` reads 4 times the width.
        expected = {"kv": (48, 48), "cross": (95, 95), "attention": (191, 191), "convolutions": (16, 8 + 8 * 4)}
        assert found == {kind: (layers, squares * square) for kind, (layers, squares) in expected.items()}
        return
    if real.family == "pixart":
        # 28 blocks with self- and cross-attention, of which the middle third has 9.
        expected = {"kv": (56, 56), "cross": (112, 112), "attention": (224, 224), "convolutions": (18, 9 + 9 * 4)}
        assert found == {kind: (layers, squares * 1152**2) for kind, (layers, squares) in expected.items()}
        return
    if real.family == "flux":
        # 19 double blocks, of which the middle third has 6, with 8 projections each; 38 single blocks with 3.
        expected = {"kv": (38, 38), "cross": (76, 76), "attention": (266, 266), "convolutions": (12, 6 + 6 * 4)}
        assert found == {kind: (layers, squares * 3072**2) for kind, (layers, squares) in expected.items()}
        assert (real.resolution, real.patch_size) == (128, 2)
        return
    text, widths = WIDTHS[real.family]
    blocks = sum(widths.values())
    kv = 2 * text * sum(width * count for width, count in widths.items())
    squares = sum(width**2 * count for width, count in widths.items())
    assert found.pop("convolutions") == {"sd": (17, 142_950_400), "sdxl": (10, 41_369_600)}[real.family]
    assert found == {
        "kv": (2 * blocks, kv),
        "cross": (4 * blocks, kv + 2 * squares),
        "attention": (8 * blocks, kv + 6 * squares),
    }
    if real.family == "sd":
        assert kv == 19_169_280  # as printed in the README of Custom Diffusion: 75 MB


@pytest.mark.parametrize("real", REAL, indirect=True, ids=FAMILIES)
def test_numbers_of_the_guide(real):
    """Of `funlora`, `lora` and `custom_diffusion` with their default layers and ranks."""
    adapters = [
        FunLoraConfig(num_functions=10, ratio=2, target_modules=real.layers("cross")),
        LoraConfig(r=4, target_modules=real.layers("cross")),
    ]
    counted = [parameters_per_class(real.denoiser, config).with_vector for config in adapters]
    text = (REPOSITORY / "docs/guides/personalization.md").read_text(encoding="utf-8")
    told = re.findall(rf"^\| {dict(REAL)[real.family]}\b.* \| (.*) \| (.*) \| (.*) \|$", text, re.MULTILINE)
    assert told
    for row in told:
        assert row == tuple(
            f"{one / 1e6:.1f} M" if one >= 1e6 else f"{one / 1e3:.0f} K" for one in [*counted, numbers(real, "kv")]
        )
