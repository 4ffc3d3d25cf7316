"""Make the tiny text-to-image base and its judges from nothing: `make tiny-base`.

The base is a stock `StableDiffusionPipeline`: text encoder, U-Net and autoencoder are trained on renderings of `scenes`.

Source: [ours].
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ...evaluation.figures import image_grid
from ...utils.files import read_json, read_tensors, whole_file, whole_folder, write_json, write_tensors
from ...utils.quiet import quiet_loading
from ...utils.seeds import derive_seed
from ..concepts import load_concepts
from ..pictures import load_images
from . import scenes
from .dual_encoder import ranks_first, train_dual_encoder
from .fitting import fit
from .reader import as_tensor, load_reader, shares_right, train_reader
from .scenes import Scene
from .shore import write_shore
from .tokenizer import add_vocabulary, make_tokenizer


logger = logging.getLogger(__name__)

GUIDANCE_SCALE = 2.5
_LATENT_CHANNELS = 8
_SHIPPED = Path(__file__).parent / "files"


@dataclass(frozen=True)
class Effort:
    """How long each part is trained; by default as long as the shipped files were."""

    scenes: int = 40_000
    vae_steps: int = 1600
    base_steps: int = 6000
    reader_steps: int = 1500
    dual_encoder_steps: int = 2000


def _load_in_float32(folder: Path) -> None:
    """Without that, transformers 5 computes in the dtype of the file."""
    write_json(folder / "config.json", read_json(folder / "config.json") | {"dtype": "float32"})


def _without_its_origin(folder: Path) -> None:
    """diffusers writes down the folder from which a model was loaded."""
    write_json(
        folder / "config.json", {k: v for k, v in read_json(folder / "config.json").items() if k != "_name_or_path"}
    )


def _name_tensors_as_transformers_4(file: Path) -> None:
    """Put "text_model." before the names of a `CLIPTextModel`, as on the Hub; transformers 5 writes them without it."""
    tensors = read_tensors(file, remedy="make it again")
    named = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
    write_tensors(file, named, metadata={"format": "pt"})


def make_vae(images: torch.Tensor, *, steps: int, batch: int = 32) -> AutoencoderKL:
    """Train an autoencoder of factor 4, whose latents have mean 0 and standard deviation 1 in each channel.

    Args:
        images: (n, 3, 32, 32) uint8.
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=_LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=scenes.RESOLUTION,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    ).to(memory_format=torch.channels_last)

    def loss() -> torch.Tensor:
        pixels = _pixels(images[torch.randint(len(images), (batch,))])
        posterior = vae.encode(pixels).latent_dist
        error = vae.decode(posterior.sample()).sample - pixels
        # With a larger weight of the KL divergence pictures stay blurred.
        return error.abs().mean() + error.square().mean() + 3e-5 * posterior.kl().mean() / posterior.mean[0].numel()

    fit("vae", vae.parameters(), loss, steps=steps, learning_rate=3e-3, ema_decay=0.995)
    _normalise_latents(vae, images[:2048])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def _normalise_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Put mean and standard deviation of each channel into the 1 x 1 convolutions around the latents."""
    latents = vae.encode(_pixels(images)).latent_dist.mean
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    to_moments, from_latents = vae.quant_conv, vae.post_quant_conv
    from_latents.bias += from_latents.weight[:, :, 0, 0] @ mean
    from_latents.weight *= std[None, :, None, None]
    to_moments.bias[:_LATENT_CHANNELS] = (to_moments.bias[:_LATENT_CHANNELS] - mean) / std
    to_moments.weight[:_LATENT_CHANNELS] /= std[:, None, None, None]
    to_moments.bias[_LATENT_CHANNELS:] -= 2 * std.log()


def make_base(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    images: torch.Tensor,
    drawn: Sequence[Scene],
    *,
    steps: int,
    seed: int,
    batch: int = 64,
) -> StableDiffusionPipeline:
    """Train a U-Net and a text encoder together, on the latents of images and on captions drawn anew each time.

    Args:
        images: (n, 3, 32, 32) uint8, of the n scenes `drawn`.
        seed: of the captions.
    """
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            **ids,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=scenes.RESOLUTION // 4,
        in_channels=_LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 64),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    ).to(memory_format=torch.channels_last)
    # Flat backgrounds of any brightness need a last step without signal.
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )
    with torch.no_grad():
        latents = torch.cat([vae.encode(_pixels(part)).latent_dist.mean for part in images.split(256)])
    rng = random.Random(seed)

    def loss() -> torch.Tensor:
        chosen = torch.randint(len(images), (batch,))
        captions = ["" if rng.random() < 0.1 else scenes.random_caption(rng, drawn[i]) for i in chosen.tolist()]
        tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        clean = latents[chosen].contiguous(memory_format=torch.channels_last)
        noise = torch.randn_like(clean)
        times = torch.randint(scheduler.config.num_train_timesteps, (batch,))
        noisy = scheduler.add_noise(clean, noise, times)
        prediction = unet(noisy, times, text_encoder(tokens).last_hidden_state).sample
        return torch.nn.functional.mse_loss(prediction, scheduler.get_velocity(clean, noise, times))

    trained = [*unet.parameters(), *text_encoder.parameters()]
    fit("base", trained, loss, steps=steps, learning_rate=2e-3, ema_decay=0.999)
    parts = {"vae": vae, "text_encoder": text_encoder, "unet": unet}
    return StableDiffusionPipeline(
        **{name: part.eval() for name, part in parts.items()},
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _pixels(images: torch.Tensor) -> torch.Tensor:
    """Turn uint8 into floats in [-1, 1], as the autoencoder takes them."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _images(pixels: torch.Tensor) -> torch.Tensor:
    """Turn floats in [0, 1] into uint8."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def make(folder: Path, effort: Effort | None = None, *, seed: int = 0) -> None:
    """Make base, judges and concepts in a folder, in float16. What is there already stays: it goes on where it stopped.

    Raises:
        ValueError: the folder was begun with other settings.
    """
    effort = effort or Effort()
    settings = {"effort": asdict(effort), "seed": seed}
    begun = folder / "making.json"
    if begun.exists() and read_json(begun) != settings:
        raise ValueError(f"{begun} has other settings than {settings}: remove {folder} or give another folder")
    write_json(begun, settings)
    scenes.write_concepts(folder / "concepts")
    write_shore(folder / "concepts")
    tokenizer = make_tokenizer(scenes.vocabulary())
    rng = random.Random(derive_seed(seed, "scenes"))
    drawn = [scenes.random_scene(rng) for _ in range(effort.scenes)]
    images = as_tensor(drawn)

    def reader(path: Path) -> None:
        trained = train_reader(steps=effort.reader_steps, seed=derive_seed(seed, "reader"))
        write_tensors(path, {name: tensor.half() for name, tensor in trained.state_dict().items()})

    def dual_encoder(path: Path) -> None:
        model, processor = train_dual_encoder(
            tokenizer, steps=effort.dual_encoder_steps, seed=derive_seed(seed, "dual_encoder")
        )
        model.half().save_pretrained(path)
        processor.save_pretrained(path)
        # As transformers 4 reads it.
        processor.image_processor.save_pretrained(path)
        _load_in_float32(path)
        add_vocabulary(path)

    def vae(path: Path) -> None:
        make_vae(images, steps=effort.vae_steps).save_pretrained(path)

    def base(path: Path) -> None:
        trained = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False)
        pipeline = make_base(
            trained, tokenizer, images, drawn, steps=effort.base_steps, seed=derive_seed(seed, "captions")
        )
        pipeline.to(dtype=torch.float16).save_pretrained(path)
        _without_its_origin(path / "vae")
        _load_in_float32(path / "text_encoder")
        _name_tensors_as_transformers_4(path / "text_encoder" / "model.safetensors")
        add_vocabulary(path / "tokenizer")

    parts: dict[str, Callable[[Path], None]] = {
        "vae": vae,
        "base": base,
        "reader.safetensors": reader,
        "dual_encoder": dual_encoder,
    }
    for name, part in parts.items():
        if (folder / name).exists():
            logger.info("%s is there already", folder / name)
            continue
        start = time.monotonic()
        with (
            torch.random.fork_rng(devices=[]),
            (whole_file if Path(name).suffix else whole_folder)(folder / name) as path,
        ):
            torch.manual_seed(derive_seed(seed, name))
            part(path)
        logger.info("%s: %.0f s", folder / name, time.monotonic() - start)


@torch.no_grad()
def sample(pipeline: StableDiffusionPipeline, prompts: Sequence[str], *, seed: int, steps: int = 20) -> torch.Tensor:
    """Draw an image for each prompt: (n, 3, 32, 32) uint8."""
    generator = torch.Generator().manual_seed(seed)
    pipeline.set_progress_bar_config(disable=True)
    drawn = [
        pipeline(
            list(prompts[start : start + 64]),
            num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALE,
            generator=generator,
            output_type="pt",
        ).images
        for start in range(0, len(prompts), 64)
    ]
    return _images(torch.cat(drawn))


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Encode and decode images (n, 3, 32, 32) uint8."""
    decoded = vae.decode(vae.encode(_pixels(images)).latent_dist.mean).sample
    return _images(decoded / 2 + 0.5)


def check(folder: Path, *, seed: int = 1, most: int | None = None) -> dict[str, dict[str, float]]:
    """Measure what the files in a folder can do, on scenes and noise that no training had.

    Args:
        most: use that many scenes or prompts of each kind only.

    Returns:
        Shares in [0, 1] that the reader finds right: `base`, over the 432 prompts that tell all of a plain shape;
        `composites`, over 108 prompts that tell noun and background; `reconstructions`, over 1,000 scenes that went
        through the autoencoder; `concepts`, the same for the five concepts on all backgrounds; `reader`, over 1,000
        renderings. `dual_encoder`: share of those whose most similar one of their 1,000 full captions is true, and the
        converse.
    """
    rng = random.Random(derive_seed(seed, "check"))
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "base")
    told = scenes.all_told()
    plain = rng.sample([scene for scene in told if scene.size], most or 432)
    composites = ([scene for scene in told if not scene.size] * 6)[:most]
    fresh = [scenes.random_scene(rng, composites=0.6, concepts=True) for _ in range(most or 1000)]
    concepts = [replace(scene, background=place) for scene in scenes.CONCEPTS.values() for place in scenes.BACKGROUNDS]
    images = as_tensor(fresh)

    shares = partial(shares_right, reader=load_reader(folder / "reader.safetensors"))
    return {
        "base": shares(sample(pipeline, [scenes.caption(scene) for scene in plain], seed=seed), plain),
        "composites": shares(sample(pipeline, [scenes.caption(scene) for scene in composites], seed=seed), composites),
        "reconstructions": shares(reconstruct(pipeline.vae, images), fresh),
        "concepts": shares(reconstruct(pipeline.vae, as_tensor(concepts)), concepts),
        "reader": shares(images, fresh),
        "dual_encoder": ranks_first(folder / "dual_encoder", images, fresh),
    }


def draw_overview(folder: Path, path: Path, *, seed: int = 1) -> None:
    """Draw a picture, of 20 columns: samples of 80 prompts of plain shapes and of 40 of composites; the concepts' pictures."""
    rng = random.Random(derive_seed(seed, "overview"))
    told = scenes.all_told()
    plain = rng.sample([scene for scene in told if scene.size], 80)
    composites = [scene for scene in told if not scene.size] * 3
    prompts = [scenes.caption(scene) for scene in (*plain, *composites[:40])]
    samples = sample(StableDiffusionPipeline.from_pretrained(folder / "base"), prompts, seed=seed)
    concepts = [image for one in load_concepts("tiny") for image in one.images]
    image_grid(torch.cat([samples, load_images(concepts, size=scenes.RESOLUTION)]), path, columns=20)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the files, or with `--check` measure those that are there; print what `check` returns."""
    parser = argparse.ArgumentParser(prog="python -m funlora_hf.personalization.tiny.making", description=main.__doc__)
    parser.add_argument("--folder", type=Path, help="where to make them; with --check, where they are")
    parser.add_argument("--check", action="store_true", help="make nothing; without --folder, check the package's own")
    parser.add_argument("--picture", type=Path, help="also draw samples, into this file")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if not given.check and not given.folder:
        parser.error("--folder is needed to make the files")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with quiet_loading():
        if not given.check:
            make(given.folder, seed=given.seed)
        print(json.dumps(check(given.folder or _SHIPPED), indent=2))
        if given.picture:
            draw_overview(given.folder or _SHIPPED, given.picture)


if __name__ == "__main__":
    main()
