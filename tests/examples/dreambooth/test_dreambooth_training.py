"""The DreamBooth scripts teach tiny pipelines a subject from photos."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
import train_dreambooth_funlora as diffusion
import train_dreambooth_funlora_sd3 as flow
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from runs import REPOSITORY
from text_encoders import make_prompted
from text_to_image import component, make_pipeline, sample

import dreambooth_training
from dreambooth_training import DreamBooth, DreamBoothArguments
from funlora_hf import BaseMismatchError, load_adapter
from funlora_hf.continual.publishing import PushError
from funlora_hf.continual.termination import Terminated, Termination
from funlora_hf.continual.trainer import NonFiniteLossError


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
PHOTOS = Path(os.environ.get("FUNLORA_TEST_DATA", REPOSITORY.parent / "shared" / "data")) / "dreambooth" / "dog"
PIPELINES = ("SD", "SDXL", "SD3", "Flux")


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    for name in PIPELINES:
        make_prompted(name).save_pretrained(folder / name)
    return folder


@pytest.fixture
def make(pipelines, tmp_path, monkeypatch):
    """Makes a run of three photos of a dog."""
    monkeypatch.chdir(tmp_path)
    if not PHOTOS.is_dir():
        pytest.skip(f"no photos in {PHOTOS}; FUNLORA_TEST_DATA may name a folder with dreambooth/dog in it")
    (tmp_path / "dog").mkdir()
    for number in range(3):
        shutil.copy(PHOTOS / f"0{number}.jpg", "dog")

    def made(name: str = "SD", **given) -> DreamBooth:
        AcceleratorState._reset_state(reset_partial_state=True)
        script, kind = (flow, flow.FlowArguments) if name in ("SD3", "Flux") else (diffusion, DreamBoothArguments)
        arguments = kind(
            **{
                "pretrained_model_name_or_path": str(pipelines / name),
                "instance_data_dir": "dog",
                "instance_prompt": "dog",
                "resolution": 8,
                "train_batch_size": 2,
                "learning_rate": 2e-2,
                "max_train_steps": 4,
                "output_dir": "out",
                "num_inference_steps": 2,
                **given,
            }
        )
        objective = flow.FlowMatching if script is flow else diffusion.Denoising
        return DreamBooth(arguments, script.PIPELINES, objective)

    return made


PRIOR = {"with_prior_preservation": True, "class_data_dir": "class", "class_prompt": "a dog", "num_class_images": 3}


class After(Termination):
    """SIGTERM comes in a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left <= 0


def adapter(folder: str = "out") -> bytes:
    return (Path(folder) / "adapter" / "adapter_model.safetensors").read_bytes()


def loss(run: DreamBooth) -> float:
    """Of fixed batches."""
    with torch.no_grad():
        return sum(float(run.loss(run.model, number)) for number in range(8))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_what_stable_diffusion_is_to_predict(prediction):
    """From noise alone, of which a model that knows how much there is can tell the target."""
    pipe = make_pipeline("SDXL")
    pipe.scheduler = DDIMScheduler(prediction_type=prediction)
    seen = {}

    def knows(noisy, times, states, added_cond_kwargs, return_dict):
        seen.update(added_cond_kwargs)
        signal = pipe.scheduler.alphas_cumprod[times].reshape(-1, 1, 1, 1)
        noise = noisy / (1 - signal).sqrt()
        return (noise if prediction == "epsilon" else signal.sqrt() * noise,)

    objective = diffusion.Denoising(pipe, SimpleNamespace(resolution=8))
    prompt = {"prompt_embeds": torch.zeros(5, 2, 16), "pooled_prompt_embeds": torch.ones(5, 16)}
    losses = objective(knows, torch.zeros(5, 4, 8, 8), prompt, torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses, torch.zeros(5), rtol=0, atol=1e-8)
    assert seen["time_ids"].tolist() == [[8, 8, 0, 0, 8, 8]] * 5


@pytest.mark.parametrize("name", ["SD3", "Flux"])
def test_what_flow_matching_is_to_predict(name):
    """As above; SD3 takes times up to 1000, Flux up to 1."""
    pipe = make_pipeline(name)
    pipe.scheduler.register_to_config(shift=3.0)
    if name == "Flux":
        pipe.transformer.register_to_config(guidance_embeds=True)
    sigmas = []

    def knows(noisy, timestep, guidance=None, **inputs):
        assert (guidance is None) == (name == "SD3")
        sigmas.append(timestep if name == "Flux" else timestep / 1000)
        return (noisy / sigmas[-1].reshape(-1, *[1] * (noisy.dim() - 1)),)

    objective = flow.FlowMatching(pipe, SimpleNamespace(weighting_scheme="none"))
    prompt = {"prompt_embeds": torch.zeros(999, 2, 16), "pooled_prompt_embeds": torch.ones(999, 16)}
    losses = objective(knows, torch.zeros(999, 4, 8, 8), prompt, torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses, torch.zeros(999), rtol=0, atol=1e-8)
    # Uniform times 0.5 are shifted to 3 * 0.5 / (1 + 2 * 0.5).
    assert sigmas[0].median() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_subject_is_learned(make, pipelines, name):
    run = make(name, max_train_steps=16, ema_decay=0.5)
    before = loss(run)
    run.train(Termination())
    assert loss(run) < before
    pipe = DiffusionPipeline.from_pretrained(pipelines / name)
    plain = sample(pipe)
    load_adapter(component(pipe), "out/adapter")
    assert (sample(pipe) - plain).abs().max() > 1e-3
    torch.testing.assert_close(sample(pipe), sample(run.pipe), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["SD", "SD3"])
def test_a_run_that_is_stopped_goes_on(make, name):
    """To the bit as one that was not stopped: by SIGTERM, at a checkpoint before, and at its end if it gets more steps."""
    settings = {**PRIOR, "gradient_accumulation_steps": 2, "checkpointing_steps": 1, "lr_warmup_steps": 3}
    resumed = {**settings, "resume_from_checkpoint": "latest"}
    make(name, output_dir="whole", max_train_steps=5, **settings).train(Termination())
    with pytest.raises(Terminated, match="after step 2 of 4"):
        make(name, **settings).train(After(2))
    shutil.rmtree("out/checkpoints/step_2")
    make(name, **resumed).train(Termination())
    assert adapter() != adapter("whole")
    make(name, max_train_steps=5, **resumed).train(Termination())
    assert adapter() == adapter("whole")
    with pytest.raises(ValueError, match="`max_train_steps` is 4, but the run has done 5 already"):
        make(name, **resumed).train(Termination())


def test_8_bit_adam(make):
    pytest.importorskip("bitsandbytes")
    settings = {"use_8bit_adam": True, "num_functions": 4096}  # it keeps smaller tensors in 32 bits
    make(output_dir="whole", **settings).train(Termination())
    with pytest.raises(Terminated):
        make(**settings).train(After(2))
    make(resume_from_checkpoint="latest", **settings).train(Termination())
    assert adapter() == adapter("whole")


def test_8_bit_adam_without_its_package(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match=r"`use_8bit_adam` needs bitsandbytes .*leave this out"):
        make(use_8bit_adam=True)


@pytest.mark.parametrize("targets", ["all-conv", "all-linear"])
def test_all_layers_of_a_kind(make, targets):
    """As `FunLoraConfig` takes them, which knows them as words and not as names in a list."""
    kind = torch.nn.Conv2d if targets == "all-conv" else torch.nn.Linear
    model = make(target_modules=[targets]).model
    wrapped = [module.base_layer for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert wrapped == [module for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("name", ["SD3", "Flux"])
def test_images_of_the_class(make, name):
    """Are drawn by the base, once, and their loss is added at its weight."""
    losses = [loss(make(name, **PRIOR, prior_loss_weight=weight)) for weight in (0.0, 1.0, 3.0)]
    assert losses[2] - losses[1] == pytest.approx(2 * (losses[1] - losses[0]), rel=1e-4)
    assert losses[1] > losses[0]
    drawn = sorted(Path("class").glob("*.png"))
    assert [path.name for path in drawn] == [f"drawn_000{number}.png" for number in range(3)]
    contents = [path.read_bytes() for path in drawn]
    assert len(set(contents)) == 3
    drawn[1].unlink()
    make(name, **PRIOR, sample_batch_size=1)
    assert [path.read_bytes() for path in drawn] == contents
    drawn[1].rename(Path("class/mine.png"))
    make(name, **PRIOR)
    assert not drawn[1].exists()
    with pytest.raises(ValueError, match=r"`class_data_dir` 'class' has images drawn otherwise .class_prompt was"):
        make(name, **{**PRIOR, "class_prompt": "a cat"})


def test_validation_images(make):
    run = make("SDXL", validation_prompt="dog", num_validation_images=2, validation_steps=2, max_train_steps=3)
    plain = run._draw(run.validation, [torch.Generator().manual_seed(0)])
    run.train(Termination())
    assert sorted(path.name for path in Path("out/validation").iterdir()) == [
        f"step_{step}_{index}.png" for step in (2, 3) for index in (0, 1)
    ]
    drawn = [np.asarray(PIL.Image.open(f"out/validation/step_3_{index}.png")) for index in (0, 1)]
    assert drawn[0].shape == np.asarray(plain[0]).shape == (8, 8, 3)
    assert (drawn[0] != drawn[1]).any()


def test_checkpointed_gradients_and_half_precision(make):
    """Give about the same loss, and the base is in half precision, the adapter not."""
    losses = [loss(make(**settings)) for settings in ({}, {"mixed_precision": "bf16", "gradient_checkpointing": True})]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    run = make(mixed_precision="bf16", gradient_checkpointing=True, output_dir="half")
    assert {one.dtype for one in run.state.parameters.values()} == {torch.float32}
    assert run.model.conv_in.weight.dtype == run.pipe.vae.dtype == torch.bfloat16
    run.train(Termination())
    path = run.arguments.pretrained_model_name_or_path
    load_adapter(DiffusionPipeline.from_pretrained(path, torch_dtype=torch.bfloat16).unet, "half/adapter")
    # As docs/guides/dreambooth.md says.
    whole = DiffusionPipeline.from_pretrained(path).unet
    with pytest.raises(BaseMismatchError):
        load_adapter(whole, "half/adapter")
    load_adapter(whole, "half/adapter", ignore_base_fingerprint=True)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_ends_the_run(make, where):
    run = make(checkpointing_steps=1)
    step = run._step

    def broken(model, guard, number):
        if number == 3:
            parameter = next(iter(run.state.parameters.values()))
            if where == "loss":
                parameter.data.fill_(torch.nan)
            else:
                parameter.register_hook(lambda gradient: gradient * torch.nan)
        return step(model, guard, number)

    run._step = broken
    with pytest.raises(NonFiniteLossError, match=f"In step 3, the {where} is n.*start again"):
        run.train(Termination())
    assert not Path("out/adapter").exists()
    assert sorted(path.name for path in Path("out/checkpoints").iterdir()) == ["step_1", "step_2"]


def test_pushed(make, hub):
    run = make(push_to_hub=True, hub_model_id="me/dog")
    run.train(Termination())
    assert hub.files("me/dog")["adapter_model.safetensors"] == adapter()
    pipe = make_prompted("SD")
    load_adapter(pipe.unet, "me/dog")
    torch.testing.assert_close(sample(pipe), sample(run.pipe), rtol=0, atol=1e-5)


def test_a_push_that_fails(make, hub, monkeypatch):
    run = make(push_to_hub=True, hub_model_id="me/dog")

    def fails(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(dreambooth_training, "push_adapter", fails)
    with pytest.raises(PushError, match=r"adapter was not pushed to me/dog .no network.: the same command"):
        run.train(Termination())
    assert adapter()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": 0.0}, "`learning_rate` is 0.0, expected a number above 0"),
        ({"learning_rate": float("nan")}, "`learning_rate` is nan"),
        ({"max_train_steps": 0}, "`max_train_steps` should be a positive integer"),
        ({"validation_steps": 0, "validation_prompt": "dog"}, "`validation_steps` should be a positive integer"),
        ({"lr_warmup_steps": -1}, "`lr_warmup_steps` is -1, expected a number from 0"),
        ({"ema_decay": 1.5}, "`ema_decay` is 1.5, expected a number from 0 to 1"),
        ({"prior_loss_weight": -1.0}, "`prior_loss_weight` is -1.0"),
        ({"mixed_precision": "fp8"}, "`mixed_precision` is 'fp8', expected one of"),
        ({"resume_from_checkpoint": "checkpoint-5"}, "`resume_from_checkpoint` is 'checkpoint-5', expected 'latest'"),
        ({"class_prompt": "a dog"}, "`class_prompt` is 'a dog' but there is no `with_prior_preservation`"),
        (
            {"with_prior_preservation": True, "class_prompt": "a dog"},
            "there is no `class_data_dir`: pass --class_data_dir",
        ),
        ({**PRIOR, "class_data_dir": "./dog"}, "`class_data_dir` is `instance_data_dir`"),
        ({"validation_steps": 2}, "`validation_steps` is 2 but there is no `validation_prompt`"),
        ({"hub_model_id": "me/dog"}, "`hub_model_id` is 'me/dog' but there is no `push_to_hub`"),
        ({"prior_loss_weight": 0.5}, "`prior_loss_weight` is 0.5 but there is no `with_prior_preservation`"),
        ({"num_class_images": 9}, "`num_class_images` is 9 but there is no `with_prior_preservation`"),
        ({"num_validation_images": 2}, "`num_validation_images` is 2 but there is no `validation_prompt`"),
        ({"revision": "main"}, "`revision` is 'main', but a folder has none"),
        ({"output_dir": "~no-such-user/out"}, "`output_dir` is .* no such user"),
        ({"instance_prompt": ""}, "`instance_prompt` is ''"),
        ({"function": "sine"}, "`function` is 'sine', expected one of"),
        ({"rank": 0}, "`rank` should be a positive integer"),
        ({"ratio": 0}, "`ratio` should be a positive integer"),
        (
            {"resolution": 15, "name": "SD3"},
            "`resolution` is 15, expected a multiple of 2 for a StableDiffusion3Pipeline",
        ),
        ({"weighting_scheme": "mode", "name": "SD3"}, "`weighting_scheme` is 'mode', expected one of"),
        ({"report_to": "nowhere"}, "`report_to` 'nowhere' .* is not available here"),
        ({"target_modules": ["to_x"]}, "to_x"),
        ({"instance_data_dir": "nowhere"}, "nowhere"),
        ({"instance_data_dir": "."}, "with the folders"),
    ],
)
def test_refused_before_training(make, given, message):
    (Path("dog2")).mkdir()
    shutil.copy("dog/00.jpg", "dog2")
    with pytest.raises((ValueError, OSError), match=message):
        make(**given)
    assert not Path("out").exists()


def test_another_model_is_refused(make, pipelines):
    with pytest.raises(
        ValueError, match=r"is a StableDiffusion3Pipeline, expected a StableDiffusionPipeline or .*_sd3\.py for SD3"
    ):
        make(pretrained_model_name_or_path=str(pipelines / "SD3"))
    folder = shutil.copytree(pipelines / "SD", "other")
    config = Path(folder) / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": "sample"}))
    with pytest.raises(ValueError, match="prediction_type 'sample', expected 'epsilon' or 'v_prediction'"):
        make(pretrained_model_name_or_path="other")


def test_pickled_weights_are_not_read(make, pipelines):
    folder = Path(shutil.copytree(pipelines / "SD", "other"))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        make(pretrained_model_name_or_path="other")


def test_a_folder_with_other_things(make):
    make(max_train_steps=1).train(Termination())
    with pytest.raises(FileExistsError, match=r"`output_dir` 'out' has adapter, .*or --resume_from_checkpoint latest"):
        make()
    with pytest.raises(ValueError, match=r"has other settings .learning_rate was 0\.02 and is 0\.5.: pass the same"):
        make(resume_from_checkpoint="latest", learning_rate=0.5)
    Path("dog/02.jpg").unlink()
    with pytest.raises(ValueError, match=r"has other settings .images was"):
        make(resume_from_checkpoint="latest")
    Path("mine").mkdir()
    Path("mine/letter").touch()
    with pytest.raises(FileExistsError, match=r"'mine' has letter in it: pass another one\."):
        make(output_dir="mine", resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--learning_rate", "0"], "error: `learning_rate` is 0.0, expected a number above 0."),
        (["--rnak", "2"], 2),
        ([], None),
    ],
)
def test_the_command(make, pipelines, monkeypatch, capsys, words, code):
    given = {
        "pretrained_model_name_or_path": pipelines / "SD",
        "instance_data_dir": "dog",
        "instance_prompt": "dog",
        "resolution": 8,
        "max_train_steps": 1,
        "output_dir": "out",
    }
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["train", *options, *words])
    if code is None:
        dreambooth_training.main(DreamBoothArguments, diffusion.PIPELINES, diffusion.Denoising, "")
        assert adapter()
        return
    with pytest.raises(SystemExit) as ended:
        dreambooth_training.main(DreamBoothArguments, diffusion.PIPELINES, diffusion.Denoising, "")
    assert ended.value.code == code
    if code == 2:
        assert "Did you mean '--rank'?" in capsys.readouterr().err
