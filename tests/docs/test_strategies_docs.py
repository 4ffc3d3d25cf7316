"""The pages of the strategies: complete, with commands that hold, and an example that runs as it stands there."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from dataclasses import fields
from types import SimpleNamespace

import concept_strategies
import pytest
import torch
from runs import REPOSITORY, short_run
from safetensors.torch import load_file
from transformers import HfArgumentParser

from funlora_hf.continual.config import parse_value
from funlora_hf.continual.strategies.diffclass_pretrained import DiffClassPretrained, DiffClassPretrainedOptions
from funlora_hf.continual.strategies.registry import STRATEGIES, strategy_class
from funlora_hf.personalization.arguments import CONCEPT_ARGUMENTS, ConceptArguments
from funlora_hf.personalization.run import ConceptRunArguments
from funlora_hf.personalization.strategies.registry import CONCEPT_STRATEGIES
from funlora_hf.run import run
from funlora_hf.train import parse


PAGES = REPOSITORY / "docs" / "strategies"
VECTORS = "class_embedding.weight"


def page(name: str) -> str:
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


def options_in(text: str, section: str) -> list[tuple[str, str]]:
    """Option and default of each row in a section's tables."""
    part = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", part, re.MULTILINE)


STRATEGIES_BY_PAGE = {**STRATEGIES, **{f"concepts/{name}": one for name, one in CONCEPT_STRATEGIES.items()}}


@pytest.mark.parametrize("name", STRATEGIES_BY_PAGE)
def test_a_page_has_every_option_with_its_default(name):
    rows = options_in(page(name), "Options")
    options_class = STRATEGIES_BY_PAGE[name].options_class
    defaults = {} if options_class is None else {option.name: option.default for option in fields(options_class)}
    # A default is written as it would be given: it is read as the command line reads it.
    assert {option: parse_value(text) for option, text in rows} == defaults
    assert len(rows) == len(defaults)
    assert defaults or "**Options:** none." in page(name)


def test_the_form_on_a_pipeline_has_every_option_that_differs():
    own, plain = fields(DiffClassPretrainedOptions), fields(STRATEGIES["diffclass"].options_class)
    known = {(option.name, option.default) for option in plain}
    expected = {
        one.name: one.default for one in own if (one.name, one.default) not in known and one.name != "pretrained"
    }
    rows = options_in(page("diffclass"), "On a pretrained pipeline")
    assert {option: parse_value(text) for option, text in rows} == expected
    (command,) = re.findall(r"^```bash\n(.*?)^```", page("diffclass"), re.MULTILINE | re.DOTALL)
    strategy = parse(shlex.split(command.replace("\\\n", " "))[2:]).training
    assert strategy_class(strategy.strategy, strategy.strategy_options) is DiffClassPretrained


def test_the_index_has_every_strategy_and_no_other():
    assert re.findall(r"^\| \[`(\w+)`\]\((\w+)\.md\)", page("README"), re.MULTILINE) == [(n, n) for n in STRATEGIES]
    assert {path.stem for path in PAGES.glob("*.md")} == {*STRATEGIES, "README", "writing_your_own"}


def test_the_index_of_concepts_has_every_strategy_and_no_other():
    rows = re.findall(
        r"^\| \[`(\w+)`\]\((\w+)\.md\) \|(?:[^|]*\|){2} ([^|]*) \| ([^|]*) \|", page("concepts/README"), re.MULTILINE
    )
    assert [row[:2] for row in rows] == [(n, n) for n in CONCEPT_STRATEGIES]
    assert {path.stem for path in (PAGES / "concepts").iterdir()} == {*CONCEPT_STRATEGIES, "README"}
    for name, _, _, changes in rows:
        assert changes == ("yes" if CONCEPT_STRATEGIES[name].learning_changes_past_classes else "no"), name


@pytest.mark.parametrize("name", CONCEPT_STRATEGIES)
def test_a_page_of_concepts_has_what_a_run_takes_without_arguments(name):
    strategy, text = CONCEPT_STRATEGIES[name], page(f"concepts/{name}").replace("\n", " ")
    argument = "concept_learning_rate" if strategy.rates else "token_learning_rate"
    (rates,) = re.findall(rf"`{argument}` \((\S+) on the tiny base, else (\d\S*?),? ", text)
    given = strategy.rates or strategy.token_rates
    assert [float(rate) for rate in rates] == [given.tiny, given.other]
    layers = [strategy.default_layers] * ("target_modules" in strategy.takes)
    assert re.findall(r"`target_modules` \(default `(\w+)`\)", text) == layers
    setting = SimpleNamespace(setting=SimpleNamespace(arguments=ConceptArguments()))
    ranks = [str(strategy.rank.fget(setting))] * ("rank" in strategy.takes)
    assert re.findall(r"`rank` \(default (\d+)\)", text) == ranks


def test_a_reconstruction_says_so_first():
    assert "reconstructed" in page("concepts/cns").splitlines()[0]


@pytest.mark.parametrize("name", CONCEPT_STRATEGIES)
def test_the_command_of_a_page_of_concepts_is_understood(name):
    (command,) = re.findall(r"^    (funlora personalize (?:.*\\\n)*.*)$", page(f"concepts/{name}"), re.MULTILINE)
    words = shlex.split(command.replace("\\\n", " "))[2:]
    arguments = HfArgumentParser(CONCEPT_ARGUMENTS, allow_abbrev=False).parse_args_into_dataclasses(words)
    assert ConceptRunArguments(*arguments).training.strategy == name


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_command_of_a_page_is_understood(name):
    (command,) = re.findall(r"^    (funlora train (?:.*\\\n)*.*)$", page(name), re.MULTILINE)
    assert parse(shlex.split(command.replace("\\\n", " "))[2:]).training.strategy == name


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """The examples, each as a file of its own, in the registries: of classes and of concepts."""
    with pytest.MonkeyPatch.context() as patched:
        modules = []
        for number, code in enumerate(
            re.findall(r"^```python\n(.*?)^```", page("writing_your_own"), re.MULTILINE | re.DOTALL)
        ):
            path = tmp_path_factory.mktemp("example") / f"example_{number}.py"
            path.write_text(code, encoding="utf-8")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            modules.append(importlib.util.module_from_spec(spec))
            patched.setitem(sys.modules, path.stem, modules[-1])
            spec.loader.exec_module(modules[-1])
        of_classes, of_concepts = modules
        patched.setitem(STRATEGIES, "averaged", of_classes.Averaged)
        patched.setitem(CONCEPT_STRATEGIES, "averaged", of_concepts.AveragedConcepts)
        yield of_classes.Averaged, of_concepts.AveragedConcepts


def example_run(folder, strategy, *, resume=None, **options):
    """Three tasks of one digit each, few steps; returns results.json and the generator's weights at the end."""
    arguments = short_run(
        output_dir=str(folder),
        strategy=strategy,
        strategy_options=options or None,
        classes_per_task=1,
        num_tasks=3,
        base_train_steps=2,
        image_quality="none",
        num_samples_per_class=2,
        num_inference_steps=1,
        resume_from_checkpoint=resume,
    )
    return run(arguments), load_file(folder / "checkpoints" / "generator" / "task_3.safetensors")


@pytest.fixture(scope="module")
def halves(examples, tmp_path_factory):
    """A run of the example by its default: its folder, results and weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("halves")
    try:
        return folder, *example_run(folder, "averaged")
    finally:
        torch.set_num_threads(threads)


def distance(weights, folder) -> float:
    """Largest change since the base of a weight that is no class vector."""
    base = load_file(folder / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    return max((weights[name] - base[name]).abs().max().item() for name in base if name != VECTORS)


def test_the_example_does_what_its_page_says(examples, halves, tmp_path):
    finetune, plain = example_run(tmp_path / "finetune", "finetune")
    free, whole_way = example_run(tmp_path / "free", "averaged", share=1)
    assert free["strategy"] == "averaged"
    assert free["strategy_options"] == {"share": 1}
    assert free["accuracy_matrix"] == finetune["accuracy_matrix"]
    assert free["held_out_loss"] == finetune["held_out_loss"]
    assert plain.keys() == whole_way.keys()
    assert all(torch.equal(plain[name], whole_way[name]) for name in plain)
    _, none = example_run(tmp_path / "none", "averaged", share=0)
    assert distance(none, tmp_path / "none") == 0
    assert not torch.equal(none[VECTORS][2], none[VECTORS][:2].mean(dim=0))

    folder, results, weights = halves
    assert 0 < distance(weights, folder) < distance(plain, tmp_path / "finetune")
    constant = [report["persistent"] - report["per_class"] for report in results["memory_per_task"]]
    assert constant[1] == constant[2]
    assert results["memory"]["transient"] > finetune["memory"]["transient"]


def test_the_example_goes_on_after_stops(examples, halves, tmp_path, monkeypatch):
    """One between tasks 2 and 3, and one inside task 3."""
    averaged, steps = examples[0], []
    end_task = averaged.end_task

    def stop_between(strategy, task):
        end_task(strategy, task)
        if task.index == 1:
            raise KeyboardInterrupt

    def stop_inside(strategy, phase):
        steps.append(phase.name)
        if len(steps) == 5:
            raise KeyboardInterrupt

    for hook, stop, resume in (("end_task", stop_between, None), ("after_step", stop_inside, "latest")):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(averaged, hook, stop)
            example_run(tmp_path, "averaged", resume=resume)
    assert steps == ["task_3"] * 5
    assert [path.name for path in (tmp_path / "checkpoints" / "task_3").iterdir()] == ["step_3"]
    _, weights = example_run(tmp_path, "averaged", resume="latest")
    assert all(torch.equal(halves[2][name], weights[name]) for name in weights)


def test_the_example_refuses_options_out_of_range(examples):
    for wrong in (-1, "1e3"):
        with pytest.raises(ValueError, match=r"`share` is .* expected a number from 0 to 1"):
            short_run(strategy="averaged", strategy_options={"share": wrong})
    with pytest.raises(ValueError, match="`strategy_options` has 'lambda', but `strategy` 'averaged' expects"):
        short_run(strategy="averaged", strategy_options={"lambda": 1})


def test_the_example_for_concepts_goes_half_of_the_way(examples, tmp_path):
    changes = {}
    for name in ("averaged", "custom_diffusion"):
        strategy = concept_strategies.learn(concept_strategies.make_strategy(name, tmp_path / name, nouns="b"))
        changes[name] = strategy.deltas(strategy.load(strategy.setting.tasks))
    for layer, whole_way in changes["custom_diffusion"].items():
        assert torch.equal(changes["averaged"][layer], whole_way / 2)
    concept_strategies.learn(concept_strategies.make_strategy("averaged", tmp_path / "more"))
