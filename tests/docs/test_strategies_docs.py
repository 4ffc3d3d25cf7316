"""The pages of the strategies: complete, with commands that hold, and an example that runs as it stands there."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from dataclasses import fields
from types import SimpleNamespace

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
HUGE = 1e6


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
    assert re.findall(r"`target_modules` \(default `(\w+)`\)", text) == [strategy.default_layers] * bool(
        strategy.rates
    )
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
def l2_anchor(tmp_path_factory):
    """The example, as a file of its own, in the registry."""
    (code,) = re.findall(r"^```python\n(.*?)^```", page("writing_your_own"), re.MULTILINE | re.DOTALL)
    path = tmp_path_factory.mktemp("example") / "l2_anchor_example.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, path.stem, module)
        spec.loader.exec_module(module)
        patched.setitem(STRATEGIES, module.L2Anchor.name, module.L2Anchor)
        yield module.L2Anchor


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
def held(l2_anchor, tmp_path_factory):
    """A run of the example with a huge penalty: its folder, results and weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("held")
    try:
        return folder, *example_run(folder, "l2_anchor", penalty=HUGE)
    finally:
        torch.set_num_threads(threads)


def distance(weights, folder) -> float:
    """Largest change since the base of a weight that is no class vector."""
    base = load_file(folder / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    return max((weights[name] - base[name]).abs().max().item() for name in base if name != VECTORS)


def test_the_example_does_what_its_page_says(l2_anchor, held, tmp_path):
    finetune, plain = example_run(tmp_path / "finetune", "finetune")
    free, unheld = example_run(tmp_path / "free", "l2_anchor", penalty=0)
    assert free["strategy"] == "l2_anchor"
    assert free["strategy_options"] == {"penalty": 0}
    assert free["accuracy_matrix"] == finetune["accuracy_matrix"]
    assert free["held_out_loss"] == finetune["held_out_loss"]
    assert plain.keys() == unheld.keys()
    assert all(torch.equal(plain[name], unheld[name]) for name in plain)

    folder, results, weights = held
    # Two tasks, each of which may move a weight by a few learning rates.
    assert distance(weights, folder) < 4e-3
    assert distance(weights, folder) < distance(plain, tmp_path / "finetune") / 4
    assert not torch.equal(weights[VECTORS][2], weights[VECTORS][:2].mean(dim=0))
    constant = [report["persistent"] - report["per_class"] for report in results["memory_per_task"]]
    assert constant[1] == constant[2]
    assert results["memory"]["transient"] > finetune["memory"]["transient"]


def test_the_example_goes_on_after_stops(l2_anchor, held, tmp_path, monkeypatch):
    """One between tasks 2 and 3, and one inside task 3."""
    steps = []
    end_task = l2_anchor.end_task

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
            patched.setattr(l2_anchor, hook, stop)
            example_run(tmp_path, "l2_anchor", penalty=HUGE, resume=resume)
    assert steps == ["task_3"] * 5
    assert [path.name for path in (tmp_path / "checkpoints" / "task_3").iterdir()] == ["step_3"]
    _, weights = example_run(tmp_path, "l2_anchor", penalty=HUGE, resume="latest")
    assert all(torch.equal(held[2][name], weights[name]) for name in weights)


def test_the_example_refuses_options_out_of_range(l2_anchor):
    for wrong in (-1, "1e3"):
        with pytest.raises(ValueError, match=r"`penalty` is .* expected a number of at least 0"):
            short_run(strategy="l2_anchor", strategy_options={"penalty": wrong})
    with pytest.raises(ValueError, match="`strategy_options` has 'lambda', but `strategy` 'l2_anchor' expects"):
        short_run(strategy="l2_anchor", strategy_options={"lambda": 1})
