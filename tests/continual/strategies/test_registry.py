"""What every strategy owes, run by the loop itself: no look at past images, a constant state, a restart that changes nothing."""

from __future__ import annotations

import pytest
import torch
from runs import digests
from safetensors.torch import load_file
from strategies import TASKS, Drawn, learn, make_strategy, stop_at

from funlora_hf import FunLoraPipeline
from funlora_hf.continual.run_folder import RunFolder
from funlora_hf.continual.strategies.registry import STRATEGIES, strategy_class
from funlora_hf.continual.strategy import Phase, PhaseSettings
from funlora_hf.continual.strategy_state import (
    GrowingStateError,
    keep_memory_report,
    load_task_state,
    memory_reports,
    save_task_state,
)


WHOLE_GENERATOR = ("finetune", "l2", "ewc", "hft", "mofo", "replay", "ddgr", "guide", "jdcl")
LOW_RANK = ("naive_lora", "merge_init", "merge_orthogonal", "magmax", "inc_lora", "o_lora", "clora")
SEQUENTIAL = (*WHOLE_GENERATOR, *LOW_RANK)
CLASSIFYING = ("replay", "ddgr", "guide", "diffclass")
# Their tasks have phases that all processes share.
IN_SHARED_PHASES = (*SEQUENTIAL, "diffclass")
# Classes that the runs of `whole` have read, by strategy.
READ: dict[str, list[int]] = {}
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a finished run of each strategy, made when asked for; not to be changed. Images of other tasks than the
    current one cannot be read, but by a strategy that says that it needs them."""
    folders = {}

    def get(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            READ[name] = guarded(make_strategy(name, folders[name])).read
        return folders[name]

    return get


def guarded(strategy):
    data, begin_task = Drawn(), strategy.begin_task

    def begin(task):
        data.task = None if "all_tasks" in strategy.requires else task
        begin_task(task)

    strategy.begin_task = begin
    learn(strategy, data=data)
    return data


def results_of(folder):
    """What a run has learned, by file."""
    kept = [folder / name for name in ("base", "adapters", "model")]
    kept += [folder / "checkpoints" / name for name in ("generator", "classifier", "fisher")]
    files = {f"{part.name}/{file}": sha for part in kept if part.is_dir() for file, sha in digests(part).items()}
    # An adapter's configuration names the folder of its base.
    return {file: sha for file, sha in files.items() if not file.endswith("adapter_config.json")}


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_strategy_reads_images_of_another_task(name, whole):
    whole(name)  # reading one raises
    assert set(READ[name]) == {class_id for task in TASKS for class_id in task.class_ids}


def test_the_loop_refuses_a_phase_that_asks_for_past_images(tmp_path):
    strategy = make_strategy("finetune", tmp_path)
    phases = strategy.phases

    def greedy(task):
        settings = PhaseSettings(1, None, 2, 1e-3, 0, 0.0, 0.0)
        return [Phase("all", strategy.setting.seen(task), settings, independent=False)] if task.index else phases(task)

    strategy.phases = greedy
    with pytest.raises(ValueError, match=r"'all' of `strategy` 'finetune' asks for real images of classes \[1, 5\]"):
        learn(strategy)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("name", "phase", "step"),
    [
        ("merge_orthogonal", "task_3", 3),
        ("o_lora", "task_3", 3),
        ("replay", "task_2", 1),
        ("guide", "classifier_task_3", 14),
        ("jdcl", "local_2", 3),
        ("ewc", "fisher_2", 3),
        ("mofo", "task_2", 3),
        ("diffclass", "classifier_task_2", 5),
        *(
            pytest.param(name, "task_3", 3, marks=slow)
            for name in IN_SHARED_PHASES
            if name not in ("merge_orthogonal", "o_lora")
        ),
        *(pytest.param(name, "classifier_task_3", 9, marks=slow) for name in CLASSIFYING),
        pytest.param("replay", "classifier_task_1", 5, marks=slow),
    ],
)
def test_a_restart_inside_a_phase_changes_nothing(name, phase, step, whole, tmp_path):
    first = make_strategy(name, tmp_path, checkpointing_steps=2)
    stop_at(first, phase, step)
    with pytest.raises(KeyboardInterrupt):
        learn(first)
    second = make_strategy(name, tmp_path, resume_from_checkpoint="latest")
    built, build = [], second.build
    second.build = lambda phase: built.append(phase.name) or build(phase)
    learn(second)
    assert built[0] == phase
    assert results_of(tmp_path) == results_of(whole(name))


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        ("replay", "before"),
        ("magmax", "after"),
        # They share the code of both moments.
        *(
            pytest.param(name, ("before", "after")[number % 2], marks=slow)
            for number, name in enumerate(IN_SHARED_PHASES)
            if name not in ("replay", "magmax")
        ),
    ],
)
def test_a_restart_between_tasks_changes_nothing(name, moment, whole, tmp_path):
    """Killed between a task's phases and the note that it is over, and behind that note."""
    first = make_strategy(name, tmp_path)

    class Killer:
        def end_task(self, task):
            if task.index == 1 and moment == "after":
                raise KeyboardInterrupt

    end_task = first.end_task

    def end(task):
        if task.index == 1 and moment == "before":
            raise KeyboardInterrupt
        end_task(task)

    first.end_task = end
    with pytest.raises(KeyboardInterrupt):
        learn(first, evaluator=Killer())
    learn(make_strategy(name, tmp_path, resume_from_checkpoint="latest"))
    assert results_of(tmp_path) == results_of(whole(name))


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_the_model_folder_holds_the_generator_of_the_last_task(name, whole):
    folder = whole(name)
    pipe = FunLoraPipeline.from_pretrained(folder / "model")
    assert list(pipe.classes) == [class_id for task in TASKS for class_id in task.class_ids]
    with make_strategy(name, folder).inference(list(pipe.classes)) as sampler:
        expected = sampler.unet.state_dict()
    assert pipe.unet.state_dict().keys() == expected.keys()
    for key, tensor in pipe.unet.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("magmax", {"compared": "cumulative", "scaling": 0.5, "targets": "both"}),
        ("merge_orthogonal", {"orthogonal": "released", "merge": "factor_sum"}),
        ("o_lora", {"orthogonal": "A", "targets": "both"}),
        pytest.param("clora", {"targets": "both"}, marks=slow),
        pytest.param("magmax", {"compared": "cumulative"}, marks=slow),
        pytest.param("naive_lora", {"targets": "convolutions"}, marks=slow),
        pytest.param("merge_init", {"targets": "both"}, marks=slow),
        *(
            pytest.param("merge_orthogonal", {"merge": merge, "targets": "both"}, marks=slow)
            for merge in ("svd", "dense", "factor_sum")
        ),
        pytest.param("merge_orthogonal", {"orthogonal": "released", "merge": "svd"}, marks=slow),
        pytest.param("replay", {"images_per_class": 2, "solver": "euler", "num_inference_steps": 1}, marks=slow),
        pytest.param("guide", {"guidance_scale": 0.0, "refreshes": 9, "num_inference_steps": 1}, marks=slow),
        ("jdcl", {"local_start": "scratch", "new_images": "real", "joint": False, "num_inference_steps": 1}),
        pytest.param("jdcl", {"agree": True, "images_per_class": 12, "num_inference_steps": 1}, marks=slow),
        pytest.param("diffclass", {"selection": "none", "images_per_class": 2, "targets": "both"}, marks=slow),
    ],
)
def test_a_strategy_runs_with_other_options(name, options, tmp_path):
    strategy = learn(make_strategy(name, tmp_path, strategy_options=options))
    classes = [class_id for task in TASKS for class_id in task.class_ids]
    with strategy.inference(classes) as pipe:
        assert list(pipe.classes) == classes
        assert all(tensor.isfinite().all() for tensor in pipe.unet.state_dict().values())


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_one_file_is_kept_and_the_base_stays(name, whole):
    folder = whole(name)
    assert [path.name for path in (folder / "checkpoints/generator").iterdir()] == ["task_3.safetensors"]
    if not STRATEGIES[name].trains_own_base:
        assert digests(folder / "base") == digests(whole("funlora") / "base")
    assert not (folder / "checkpoints/replay").exists()
    assert {path.name for path in (folder / "checkpoints").iterdir()} <= {
        *("generator", "classifier", "fisher", "memory", "preparation", "seconds", "strategy")
    }


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_memory_report_counts_what_lies_on_disk(name, whole):
    folder = whole(name)
    report = memory_reports(RunFolder(folder))[-1]
    assert report == {**make_strategy(name, folder).memory_report(), "state": 0}
    files = [folder / "checkpoints" / kind / "task_3.safetensors" for kind in ("generator", "classifier", "fisher")]
    tensors = sum(t.nbytes for path in files if path.is_file() for t in load_file(path).values())
    # What the next task would start from: the joint run's model, the newest generator, or the base and what is beside it.
    patterns = {"joint": ["model/unet/*"], **dict.fromkeys(WHOLE_GENERATOR, ())}
    others = patterns.get(name, ["base/unet/*", "adapters/*/*"])
    whole_files = sum(path.stat().st_size for other in others for path in folder.glob(f"{other}.safetensors"))
    if name == "diffclass":  # which counts the LoRA that two classes share once
        assert tensors < report["persistent"] < tensors + whole_files
    else:
        assert report["persistent"] == tensors + whole_files
    assert 0 <= report["per_class"] < report["persistent"]
    assert report["transient"] > 0


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_a_strategy_keeps_is_constant_or_declared(name, whole):
    """From the second task on, but for what each class needs of its own."""
    _, second, third = memory_reports(RunFolder(whole(name)))
    growth = (third["persistent"] - third["per_class"]) - (second["persistent"] - second["per_class"])
    strategy = make_strategy(name, whole(name))
    assert growth == 0 or (growth > 0 and strategy.grows_with_tasks)
    assert (growth > 0) == (name in ("merge_orthogonal", "inc_lora", "o_lora", "diffclass"))


@pytest.mark.parametrize("what", ["persistent", "state"])
def test_a_state_that_grows_is_refused(what, tmp_path):
    strategy, folder = make_strategy("finetune", tmp_path), RunFolder(tmp_path)
    kept = []
    strategy.memory_report = lambda: {"persistent": 100 + (len(kept) if what == "persistent" else 0), "transient": 0}
    strategy.state_dict = lambda: {"w": torch.zeros(1 + (len(kept) if what == "state" else 0))}
    for task in TASKS[:2]:
        kept.append(task)
        keep_memory_report(folder, task, strategy)
    keep_memory_report(folder, TASKS[2], strategy)
    kept.append(None)
    with pytest.raises(GrowingStateError, match=r"`strategy` 'finetune' kept 1\d\d bytes after task 2 and keeps"):
        keep_memory_report(folder, TASKS[2], strategy)
    strategy.grows_with_tasks = True
    keep_memory_report(folder, TASKS[2], strategy)


def test_the_state_of_another_strategy_is_refused(tmp_path):
    path = tmp_path / "task_1.safetensors"
    save_task_state(path, make_strategy("finetune", tmp_path))
    load_task_state(path, make_strategy("finetune", tmp_path))
    with pytest.raises(ValueError, match="has the state of `strategy` 'finetune', expected 'replay'"):
        load_task_state(path, make_strategy("replay", tmp_path))


def test_all_strategies_of_a_seed_share_their_base(whole):
    bases = {name: digests(whole(name) / "base/unet") for name in STRATEGIES if name not in ("joint", "jdcl")}
    assert all(base == bases["funlora"] for base in bases.values())


def test_an_unknown_strategy_names_the_known_ones():
    with pytest.raises(
        ValueError, match="`strategy` is 'packnet', expected one of: 'funlora', 'frozen', 'joint', 'finetune'"
    ):
        strategy_class("packnet")


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("finetune", {"merge": "svd"}, r"has 'merge', but `strategy` 'finetune' expects none"),
        (
            "magmax",
            {"lambda": 1},
            "has 'lambda', but `strategy` 'magmax' expects some of: 'targets', 'compared', 'scaling'",
        ),
        ("magmax", {"scaling": 0.5}, "`scaling` is 0.5, which only compared='cumulative' uses"),
        ("magmax", {"scaling": 0, "compared": "cumulative"}, "`scaling` is 0, expected a number above 0"),
        ("magmax", {"compared": "always"}, "`compared` is 'always', expected one of: 'running', 'cumulative'"),
        ("naive_lora", {"targets": "all"}, "`targets` is 'all', expected one of: 'attention', 'convolutions', 'both'"),
        ("merge_orthogonal", {"merge": "sum"}, "`merge` is 'sum', expected one of: 'concat'"),
        ("merge_orthogonal", {"orthogonal": "yes"}, "`orthogonal` is 'yes', expected one of"),
        ("o_lora", {"orthogonal": "C"}, "`orthogonal` is 'C', expected one of: 'B', 'A'"),
        ("o_lora", {"penalty": -1}, "`penalty` is -1, expected a number of at least 0"),
        ("clora", {"penalty": "much"}, "`penalty` is 'much', expected a number"),
        ("inc_lora", {"penalty": 1}, "has 'penalty', but `strategy` 'inc_lora' expects some of: 'targets'"),
        ("merge_orthogonal", {"orthogonal": "released"}, "needs an accumulated A with the rank of a task's"),
        (
            "replay",
            {"images_per_class": 0},
            "`images_per_class` should be a positive integer value but the value passed is 0",
        ),
        ("replay", {"solver": "ddim"}, "`solver` is 'ddim', expected one of"),
        ("replay", {"classifier_learning_rate": 0}, "`classifier_learning_rate` is 0, expected a number above 0"),
        ("replay", {"classifier_architecture": "vit"}, "`classifier_architecture` is 'vit', expected one of: 'auto'"),
        ("magmax", {"compared": "cumulative", "scaling": "much"}, "`scaling` is 'much', expected a number"),
        ("replay", {"distillation": -0.5}, "`distillation` is -0.5, expected a number of at least 0"),
        ("ddgr", {"guidance_scale": -1}, "`guidance_scale` is -1, expected a number of at least 0"),
        ("ddgr", {"largest_weight": 0}, "`largest_weight` is 0, expected a number above 0"),
        ("ddgr", {"guided_at": "noise"}, "`guided_at` is 'noise', expected one of: 'estimate', 'state'"),
        ("guide", {"guidance_scale": -1}, "`guidance_scale` is -1, expected a number of at least 0"),
        ("guide", {"refreshes": 0}, "`refreshes` should be a positive integer value but the value passed is 0"),
        ("guide", {"largest_weight": 0}, "`largest_weight` is 0, expected a number above 0"),
        ("jdcl", {"simple_weight": -1}, "`simple_weight` is -1, expected a number of at least 0"),
        (
            "diffclass",
            {"matching_share": 1},
            "`matching_share` is 1, expected a number of at least 0, at most 0.9: the rest are",
        ),
        (
            "diffclass",
            {"synthetic_share": -0.1},
            "`synthetic_share` is -0.1, expected a number of at least 0, at most 1",
        ),
        ("diffclass", {"selection": "best"}, "`selection` is 'best', expected one of: 'confidence', 'none'"),
        ("diffclass", {"domain_weight": -1}, "`domain_weight` is -1, expected a number of at least 0"),
        (
            "diffclass",
            {"distillation": 1},
            "has 'distillation', but `strategy` 'diffclass' expects some of: 'targets'",
        ),
        ("l2", {"penalty": -1}, "`penalty` is -1, expected a number of at least 0"),
        ("ewc", {"penalty": "much"}, "`penalty` is 'much', expected a number"),
        (
            "ewc",
            {"fisher_batches": 0},
            "`fisher_batches` should be a positive integer value but the value passed is 0",
        ),
        ("hft", {"share": 1.5}, "`share` is 1.5, expected a number of at least 0, at most 1"),
        ("mofo", {"share": 0}, "`share` is 0, expected a number above 0, at most 1"),
        ("l2", {"lambda": 1}, "has 'lambda', but `strategy` 'l2' expects some of: 'penalty'"),
        ("jdcl", {"classifier_batch_size": 9}, "has 'classifier_batch_size', but `strategy` 'jdcl' expects some of"),
    ],
)
def test_bad_options_are_named(name, options, text):
    with pytest.raises(ValueError, match=text):
        strategy_class(name).make_options(options)
