"""DiffClass on a text-to-image pipeline: LoRAs that stock diffusers loads, past classes that stay, a loss that is the scheduler's."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from learned_concepts import save_base
from peft.tuners.lora import LoraLayer
from PIL import Image
from runs import digests, short_run
from safetensors.torch import load_file
from strategies import TASKS, Drawing, drawn_from, learn, make_strategy, stop_at
from torch.nn import functional

from funlora_hf.continual.config import ModelArguments
from funlora_hf.continual.run_folder import RunFolder
from funlora_hf.continual.strategies.diffclass import DiffClass
from funlora_hf.continual.strategies.diffclass_pretrained import DiffClassPretrained
from funlora_hf.continual.strategies.registry import strategy_class
from funlora_hf.continual.strategy import Batch
from funlora_hf.continual.strategy_state import memory_reports
from funlora_hf.evaluation.report import ForgettingError
from funlora_hf.evaluation.tables import summary_table, what_next
from funlora_hf.personalization.tiny import tiny_base
from funlora_hf.run import dry_run, evaluate, run
from funlora_hf.utils.seeds import generator_for


FEW = {"num_inference_steps": 2, "classifier_train_steps": 3, "classifier_batch_size": 6}
LORA = "pytorch_lora_weights.safetensors"


def make(folder, *, training=None, pretrained=None, **options):
    """A strategy for grey images of 8 x 8 pixels."""
    options = {"pretrained": str(pretrained or tiny_base()), "image_size": 8, "channels": 1, **FEW, **options}
    return make_strategy("diffclass", folder, strategy_options=options, **(training or {}))


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A finished run, and what it drew after each task; not to be changed."""
    strategy = make(tmp_path_factory.mktemp("learned"))
    drawing = Drawing(strategy)
    return learn(strategy, evaluator=drawing), drawing.drawn


def results_of(folder):
    return {part: digests(folder / part) for part in ("loras", "checkpoints/classifier")}


def some_batch(*class_ids, channels=1):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randint(0, 256, (len(class_ids), channels, 8, 8), generator=generator) / 127.5 - 1
    noise = torch.randn(sample.shape, generator=generator)
    return Batch(sample, torch.tensor(class_ids), noise, torch.rand(len(class_ids), generator=generator))


def test_the_option_chooses_the_form():
    assert strategy_class("diffclass") is strategy_class("diffclass", {"matching_share": 0.5}) is DiffClass
    assert strategy_class("diffclass", {"pretrained": "there"}) is DiffClassPretrained


def test_each_task_has_a_lora_phase_and_a_classifier(tmp_path):
    """Real images of new classes are seen as often as by an adapter; in task 1, no others are."""
    strategy = make(tmp_path)
    assert {p.name: p.settings.train_steps for task in TASKS for p in strategy.phases(task)} == {
        **{"task_1": 8, "task_2": 11, "task_3": 5},
        **{"classifier_task_1": 6, "classifier_task_2": 12, "classifier_task_3": 15},
    }
    assert [strategy.replay_evaluations(task) for task in TASKS] == [0, 4 * 5 * 2, 5 * 5 * 2]


def test_a_lora_starts_at_the_pipeline_with_the_same_numbers(tmp_path):
    base = StableDiffusionPipeline.from_pretrained(tiny_base()).unet
    inputs = torch.randn(2, 8, 8, 8), torch.tensor([3, 700]), torch.randn(2, 77, 64)
    starts = []
    for _ in range(2):
        strategy = make(tmp_path)
        torch.manual_seed(5)
        trainable = strategy.build(strategy.phases(TASKS[1])[0])
        with torch.no_grad():
            found = trainable.module.denoiser.eval()(*inputs, return_dict=False)[0]
            assert torch.equal(found, base(*inputs, return_dict=False)[0])
        starts.append({name: parameter.detach().clone() for name, parameter in trainable.parameters.items()})
    assert all(torch.equal(start, starts[1][name]) for name, start in starts[0].items())
    firsts = torch.cat([start.flatten() for name, start in starts[0].items() if "lora_A" in name])
    assert abs(firsts.std() - 1 / strategy.rank) < 0.05 / strategy.rank
    layers = {name.partition(".lora_")[0] for name in starts[0]}
    assert all(name.rpartition("attn")[2][2:] in ("to_q", "to_k", "to_v", "to_out.0") for name in layers)
    assert len(layers) == len([m for m in trainable.module.modules() if isinstance(m, LoraLayer)])


def test_the_loss_is_the_scheduler_s(tmp_path):
    """Images are repeated over the channels and resized; the base predicts v."""
    strategy = make(tmp_path, prompt="one {} here")
    phase = strategy.phases(TASKS[0])[0]
    module, batch = strategy.build(phase).module.eval(), some_batch(5, 1, 5)
    torch.manual_seed(7)
    losses = strategy.training_step(phase, batch, module)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base())
    torch.manual_seed(7)
    strata = torch.randperm(3)
    times = (1000 * (strata + torch.rand(3)) / 3).long()  # one in each third
    spread, noise = torch.randn(3, 8, 8, 8), torch.randn(3, 8, 8, 8)
    images = functional.interpolate((batch.sample + 1) / 2, size=32, mode="bicubic", antialias=True).clamp(0, 1)
    images = (images * 255).round() / 127.5 - 1
    with torch.no_grad():
        found = pipe.vae.encode(images.repeat(1, 3, 1, 1)).latent_dist
        latents = (found.mean + found.std * spread) * pipe.vae.config.scaling_factor
        prompts = ["one class 5 here", "one class 1 here", "one class 5 here"]
        states = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
        scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        predicted = pipe.unet(scheduler.add_noise(latents, noise, times), times, states).sample
        expected = (predicted - scheduler.get_velocity(latents, noise, times)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses.detach(), expected)
    losses.sum().backward()
    trained = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in module.named_parameters() if "lora" in name}


def test_samples_of_a_class_never_change(learned):
    _, after = learned
    for earlier, later in itertools.pairwise(after):
        assert all(torch.equal(images, later[class_id]) for class_id, images in earlier.items())
    assert {images.shape for images in after[2].values()} == {(3, 1, 8, 8)}
    assert all(images.min() >= 0 and images.max() <= 1 for images in after[2].values())


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_stock_diffusers_draws_the_same_with_the_lora_of_a_task(family, guidance_scale, tmp_path):
    base = tiny_base() if family == "sd" else save_base(tmp_path / "pipe", family)
    strategy = make(tmp_path, pretrained=base, channels=3, guidance_scale=guidance_scale)
    for task in TASKS[:2]:
        phase = strategy.phases(task)[0]
        torch.manual_seed(task.index)
        trainable = strategy.build(phase)
        with torch.no_grad():
            for parameter in trainable.parameters.values():
                parameter.normal_(std=0.5)
        strategy.end_phase(phase, trainable)
        strategy.release_phase(phase, trainable)
    with strategy.inference([1]) as ours:
        found = drawn_from(ours, 1)
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    asked = {
        "prompt": ["a photo of a class 1"] * 3,
        "num_inference_steps": 2,
        "guidance_scale": guidance_scale,
        "output_type": "pt",
        **dict.fromkeys(("height", "width"), strategy.model.resolution),
    }
    images = []
    for folder in ("task_1", "task_2"):
        pipe.load_lora_weights(tmp_path / "loras" / folder)
        large = pipe(**asked, generator=generator_for(0, "test", 1, 0)).images
        images.append(functional.interpolate(large, size=8, mode="bicubic", antialias=True).clamp(0, 1))
        pipe.unload_lora_weights()
    if family == "sd":
        assert torch.equal(found, images[0])
    torch.testing.assert_close(found, images[0], atol=1e-5, rtol=0)
    assert not torch.allclose(found, images[1], atol=1e-3)


def test_a_large_batch_is_drawn_in_parts(learned):
    """The noise goes on in the next part; how many are drawn at once is the option's."""
    with learned[0].inference([5]) as pipe:
        whole = pipe([5] * 9, num_inference_steps=1, generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(0)
        parts = [pipe([5] * n, num_inference_steps=1, generator=generator).images for n in (8, 1)]
    assert torch.equal(whole.images, torch.cat(parts))
    assert whole.nfe == 2  # with guidance


@pytest.mark.parametrize(("phase", "step"), [("task_1", 3), ("task_2", 7), ("classifier_task_2", 5)])
def test_a_restart_inside_a_phase_changes_nothing(phase, step, learned, tmp_path):
    first = make(tmp_path, training={"checkpointing_steps": 2})
    stop_at(first, phase, step)
    with pytest.raises(KeyboardInterrupt):
        learn(first)
    second = make(tmp_path, training={"resume_from_checkpoint": "latest"})
    built, build = [], second.build
    second.build = lambda phase: built.append(phase.name) or build(phase)
    learn(second)
    assert built[0] == phase
    assert results_of(tmp_path) == results_of(learned[0].setting.output_dir)


def test_a_restart_between_phases_and_tasks_changes_nothing(learned, tmp_path):
    """Killed after the LoRA of task 2, and at its end."""
    for number, name in enumerate(("end_phase", "end_task")):
        strategy = make(tmp_path, training={"resume_from_checkpoint": "latest"} if number else None)
        wrapped = getattr(strategy, name)

        def stop(one, *others, wrapped=wrapped):
            wrapped(one, *others)
            if getattr(one, "name", "") == "task_2" or getattr(one, "index", 0) == 1:
                raise KeyboardInterrupt

        setattr(strategy, name, stop)
        with pytest.raises(KeyboardInterrupt):
            learn(strategy)
    learn(make(tmp_path, training={"resume_from_checkpoint": "latest"}))
    assert results_of(tmp_path) == results_of(learned[0].setting.output_dir)


def test_what_it_keeps_grows_by_a_lora_for_each_task(learned):
    strategy, _ = learned
    folder = strategy.setting.output_dir
    loras = [load_file(folder / "loras" / f"task_{n}" / LORA) for n in (1, 2, 3)]
    sizes = [sum(t.nbytes for t in lora.values()) for lora in loras]
    assert all(size == strategy.trained_bytes(0) == sizes[0] for size in sizes)
    reports, heads = memory_reports(RunFolder(folder)), [strategy._head_bytes(task) for task in TASKS]
    base = sum(path.stat().st_size for path in tiny_base().rglob("*.safetensors"))
    classifier = [sum(t.nbytes for t in strategy._untrained(n).state_dict().values()) for n in (2, 4, 5)]
    assert [one["persistent"] for one in reports] == [base + n * sizes[0] + classifier[n - 1] for n in (1, 2, 3)]
    assert [one["per_class"] for one in reports] == heads


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A data set: a folder of colour images of 8 x 8 pixels of five classes."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for place, name in enumerate(("apple", "big_ball", "cup", "dog", "egg")):
        for split, count in (("train", 6), ("test", 4)):
            for number in range(count):
                values = generator.integers(0, 60, (8, 8, 3))
                values[..., place % 3] += 35 * place
                (folder / split / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values.astype(np.uint8)).save(folder / split / name / f"{number}.png")
    return folder


def a_run(pictures, folder, base=None, **overrides):
    options = {"pretrained": str(base or tiny_base()), "image_size": 8, **FEW, **overrides.pop("options", {})}
    given = {
        **{"dataset_name": str(pictures), "output_dir": str(folder), "unet_config": None, "classes_per_task": 2},
        **{"strategy": "diffclass", "strategy_options": options, "adapter_train_steps": 3},
    }
    return short_run(**{**given, **overrides})


def test_a_whole_run(pictures, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tiny_base(), base)
    before = digests(base)
    results = run(a_run(pictures, folder, base))
    assert digests(base) == before
    assert results["outside_data"] is True
    assert results["held_out_loss"] == {"mean": None, "per_class": {}}
    assert [len(row) for row in results["accuracy_matrix"]] == [1, 2, 3]
    assert len(results["own_classifier"]["A"]) == 3
    assert results["zero_forgetting"]["identical"] is True
    assert results["nfe"] == 4
    assert results["drift"]["by_task"][2].keys() == {"0", "1", "2", "3", "4"}
    samples = load_file(folder / "figures" / "samples.safetensors")
    assert torch.equal(samples["task_1/class_0"], samples["task_3/class_0"])
    assert samples["task_1/class_0"].shape == (6, 3, 8, 8)
    assert sorted(path.name for path in (folder / "loras").iterdir()) == ["task_1", "task_2", "task_3"]
    assert not [name for name in ("base", "adapters", "model") if (folder / name).exists()]
    table = summary_table(results)
    assert "diffclass (outside data) on " in table
    assert "held-out loss            -" in table
    assert "funlora" not in what_next(results, folder)
    again = evaluate(folder)
    assert again["accuracy_matrix"] == results["accuracy_matrix"]
    assert run(a_run(pictures, folder, base, resume_from_checkpoint="latest"))["A"] == again["A"]


def test_the_pipeline_is_never_deleted(pictures, tmp_path):
    folder, base = tmp_path / "out", tmp_path / "out" / "loras" / "pipe"
    shutil.copytree(tiny_base(), base)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"would delete .*loras, which contains `pretrained`"):
        run(a_run(pictures, folder, base, overwrite_output_dir=True))


def test_a_change_of_the_pipeline_is_found(pictures, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tiny_base(), base)
    run(a_run(pictures, folder, base, num_tasks=1, evaluation=False))
    (folder / "results.json").unlink()
    (base / "more.txt").write_text("more")
    with pytest.raises(ForgettingError, match="Something learned has changed"):
        run(a_run(pictures, folder, base, num_tasks=1, evaluation=False, resume_from_checkpoint="latest"))


def test_its_costs_have_no_held_out_loss(pictures, tmp_path):
    table = dry_run(a_run(pictures, tmp_path / "out"))
    assert "training: task" in table
    assert "drawing images to replay" in table
    assert "held-out" not in table


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"options": {"prompt": "a photo"}}, r"`prompt` is 'a photo', expected text with \{\}"),
        ({"options": {"targets": "both"}}, "`targets` is 'both', expected one of: 'attention'"),
        ({"options": {"solver": "heun"}}, "`solver` is 'heun', expected one of: 'scheduler'"),
        ({"options": {"channels": 2}}, "`channels` is 2, expected one of: 1, 3"),
        ({"options": {"guidance_scale": 0.5}}, "`guidance_scale` is 0.5, expected a number of at least 1: 1 is none"),
        ({"options": {"pretrained": None}}, "`pretrained` is None, expected text"),
        (
            {"options": {"pretrained": "no/where"}},
            "`pretrained` is 'no/where', expected a folder with a model_index.json",
        ),
        (
            {"unet_config": {"sample_size": 8}},
            r"`unet_config` is \{'sample_size': 8\}, but `strategy` 'diffclass' learns on",
        ),
        (
            {"base_model": "a/b"},
            "`base_model` is 'a/b', but `strategy` 'diffclass' learns on the pipeline that its option",
        ),
        ({"class_batches": "mixed"}, "`class_batches` is 'mixed', which `strategy` 'diffclass' does not use"),
        ({"function": "power"}, "`function` is 'power', but `strategy` 'diffclass' does not use it"),
        ({"channels_last": True}, "`channels_last` is True, which diffclass does not use with `pretrained`"),
        ({"torch_compile": True}, "`torch_compile` is True, which diffclass does not use with `pretrained`"),
        ({"push_to_hub": True}, "`push_to_hub` is True, which diffclass does not use with `pretrained`"),
        (
            {"timestep_density": "logit_normal"},
            "`timestep_density` is 'logit_normal', expected 'uniform' or 'stratified': DDIMScheduler is no",
        ),
    ],
)
def test_what_does_not_hold_is_refused_by_name(overrides, text, pictures, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        run(a_run(pictures, tmp_path / "out", **overrides))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "change", "text"),
    [
        ("model_index.json", {"_class_name": "DiTPipeline"}, "`pretrained` '.*' is a DiTPipeline, expected one of"),
        (
            "model_index.json",
            {"unet": ["diffusers", "UNet2DModel"]},
            "a generator of classes, .*name it by --base_model",
        ),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "sample"},
            "has prediction_type 'sample', expected 'eps",
        ),
    ],
)
def test_another_pipeline_is_refused(file, change, text, pictures, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base(), base)
    (base / file).write_text(json.dumps({**json.loads((base / file).read_text()), **change}))
    with pytest.raises(ValueError, match=text):
        run(a_run(pictures, tmp_path / "out", base))
    assert not (tmp_path / "out").exists()


def test_its_options_need_a_pipeline(pictures, tmp_path):
    with pytest.raises(ValueError, match="has 'prompt', but `strategy` 'diffclass' expects some of"):
        strategy_class("diffclass", {"prompt": "a {}"}).make_options({"prompt": "a {}"})


def test_a_u_net_from_scratch_names_the_way_to_a_pipeline():
    config = json.loads((tiny_base() / "unet" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"that of a UNet2DConditionModel.*--strategy_options pretrained=FOLDER"):
        ModelArguments(unet_config=config)
