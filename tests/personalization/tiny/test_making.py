from __future__ import annotations

import json
from dataclasses import replace

import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.utils.logging import is_progress_bar_enabled
from safetensors import safe_open

from funlora_hf.personalization.tiny import making, scenes, tiny_base, tiny_dual_encoder
from funlora_hf.personalization.tiny.making import Effort
from funlora_hf.personalization.tiny.reader import FILE, as_tensor, shares_right
from funlora_hf.tuner.targets import decoder_middle


SHORT = Effort(scenes=64, vae_steps=2, base_steps=2, reader_steps=2, dual_encoder_steps=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What a shortened `make tiny-base` leaves."""
    folder = tmp_path_factory.mktemp("made")
    making.make(folder, SHORT)
    return folder


@pytest.fixture(scope="module")
def shipped():
    return StableDiffusionPipeline.from_pretrained(tiny_base())


def test_normalised_latents_decode_to_the_same():
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(tiny_base() / "vae"))
    images = as_tensor(scenes.all_told()[:64])
    pixels = images.float() / 127.5 - 1
    with torch.no_grad():
        before, samples = vae.encode(pixels).latent_dist, making.reconstruct(vae, images)
        making._normalise_latents(vae, images)
        after = vae.encode(pixels).latent_dist
    torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones(8))
    std = before.mean.std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(after.std, before.std / std, rtol=1e-3, atol=0)
    assert (making.reconstruct(vae, images).int() - samples.int()).abs().max() <= 1


def test_a_made_folder_is_complete_and_in_float16(made):
    assert {path.name for path in made.iterdir()} == {
        *("making.json", "concepts", "vae", "base", "reader.safetensors", "dual_encoder"),
    }
    parts = [made / "base" / part for part in ("vae", "text_encoder", "unet")]
    for file in [made / "reader.safetensors", *(f for part in parts for f in part.glob("*.safetensors"))]:
        with safe_open(file, "pt") as tensors:
            dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        assert dtypes <= {"F16", "I64"}, file
    pipeline = StableDiffusionPipeline.from_pretrained(made / "base")
    assert {part.dtype for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet)} == {torch.float32}
    assert pipeline.tokenizer.model_max_length == pipeline.text_encoder.config.max_position_embeddings
    assert "_name_or_path" not in json.loads((made / "base" / "vae" / "config.json").read_text())
    # As transformers 4 reads them.
    with safe_open(made / "base" / "text_encoder" / "model.safetensors", "pt") as tensors:
        assert all(name.startswith("text_model.") for name in tensors.keys())  # noqa: SIM118
    for folder in (made / "base" / "tokenizer", made / "dual_encoder"):
        assert {"vocab.json", "merges.txt"} <= {path.name for path in folder.iterdir()}


def test_made_and_shipped_folders_have_the_same_parts(made):
    def names(folder):
        return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.parent.name != "vae"}

    assert names(made / "base") == names(tiny_base())
    assert names(made / "dual_encoder") == names(tiny_dual_encoder())


def test_making_goes_on_where_it_stopped(made):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*.safetensors")}
    (made / "reader.safetensors").unlink()
    making.make(made, SHORT)
    after = {path: path.stat().st_mtime_ns for path in made.rglob("*.safetensors")}
    assert {path for path in after if after[path] != before[path]} == {made / "reader.safetensors"}


def test_one_seed_makes_the_same(made, tmp_path):
    state = torch.random.get_rng_state()
    making.make(tmp_path, SHORT)
    assert torch.equal(state, torch.random.get_rng_state())
    for path in made.rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / path.relative_to(made)).read_bytes(), path


def test_another_setting_is_refused(made):
    with pytest.raises(ValueError, match="has other settings than"):
        making.make(made, replace(SHORT, base_steps=3))


def test_check(made, capsys, monkeypatch):
    monkeypatch.setattr(making, "check", lambda folder: {"base": {"noun": float(folder == made)}})
    making.main(["--check", "--folder", str(made)])
    assert json.loads(capsys.readouterr().out) == {"base": {"noun": 1.0}}
    assert is_progress_bar_enabled()
    monkeypatch.undo()
    shares = making.check(made, most=8)
    assert set(shares) == {"base", "composites", "reconstructions", "concepts", "reader", "dual_encoder"}
    assert all(0 <= share <= 1 for part in shares.values() for share in part.values())


def test_the_shipped_base_draws_what_it_is_told(shipped):
    told = scenes.all_told()[::9]
    shares = shares_right(making.sample(shipped, [scenes.caption(scene) for scene in told], seed=5), told)
    assert len(told) == 50
    assert min(shares[name] for name in ("background", "colour", "size")) >= 0.95
    assert shares["noun"] >= 0.85


def test_the_shipped_autoencoder_keeps_the_concepts(shipped):
    drawn = [replace(scene, background=place) for scene in scenes.CONCEPTS.values() for place in scenes.BACKGROUNDS]
    shares = shares_right(making.reconstruct(shipped.vae, as_tensor(drawn)), drawn)
    assert min(shares.values()) >= 0.97


def test_the_shipped_base_has_layers_for_adapters(shipped):
    assert len(decoder_middle(shipped.unet)) == 7
    cross_attentions = [name for name, _ in shipped.unet.named_modules() if name.endswith("attn2")]
    assert len(cross_attentions) >= 4
    assert shipped.scheduler.config.prediction_type == "v_prediction"


def test_what_is_shipped_is_small():
    files = [path for path in FILE.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5e6


def test_the_overview_has_samples_and_the_concepts(made, tmp_path):
    making.draw_overview(made, tmp_path / "overview.png")
    width, height = PIL.Image.open(tmp_path / "overview.png").size
    # 20 columns and 7 rows of enlarged pictures, each on white.
    assert width // 20 == height // 7 > scenes.RESOLUTION
