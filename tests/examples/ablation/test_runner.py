from __future__ import annotations

import pytest
from runs import TINY_UNET, short_run

from ablation import runner
from ablation.runner import AblationArguments, run_ablation
from ablation.variants import TABLES, variants_of
from comparison import learning_rates
from comparison.jobs import Outcome
from funlora_hf.run import Run
from funlora_hf.tuner.learning_rates import kind_of
from funlora_hf.tuner_base.meta_shapes import adapted_shape
from funlora_hf.utils.files import read_json
from funlora_hf.utils.locks import FolderInUseError, folder_lock


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seeds": []}, r"`seeds` is \[\], expected different numbers"),
        ({"seeds": [1, 1]}, r"`seeds` is \[1, 1\], expected different numbers"),
        ({"num_workers": 0}, "`num_workers` should be a positive integer"),
        ({"learning_rates": [0.01, -1.0]}, "`learning_rates` has -1, expected numbers above 0"),
        ({"learning_rates": [0.01], "alpha_rates": [0.0]}, "`alpha_rates` has 0, expected numbers above 0"),
        ({"alpha_rates": [1.0, 3.0]}, r"`alpha_rates` is \[1.0, 3.0\] without `learning_rates`, expected both"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        AblationArguments(**arguments)


def test_a_second_ablation_in_one_folder_is_refused(tmp_path):
    arguments = AblationArguments(seeds=[0])
    with folder_lock(tmp_path), pytest.raises(FolderInUseError, match="is in use by process"):
        run_ablation(arguments, short_run(output_dir=str(tmp_path)), variants_of(arguments.tables, arguments.variants))
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


@pytest.fixture
def ran(monkeypatch):
    """The jobs of the search and of the runs; nothing is trained, and the loss is lowest at rate 0.01, of `add` at alpha's rate 3."""
    jobs = {"learning rates": [], "runs": []}

    def run(given, folder, num_workers, *, description, **kwargs):
        jobs[description] += given
        return [Outcome(results={"held_out_loss": {"mean": loss(job)}}) for job in given]

    def loss(job):
        training, model = job.arguments.training, job.arguments.model
        best = 3 if model.operation == "add" else 1
        rate = job.after_base.get("adapter_learning_rate", training.adapter_learning_rate)
        return abs(rate - 0.01) + abs(training.adapter_alpha_rate - best)

    monkeypatch.setattr(learning_rates, "run_on_shared_bases", run)
    monkeypatch.setattr(runner, "run_on_shared_bases", run)
    return jobs


def rates_of(job):
    return job.arguments.training.adapter_learning_rate, job.arguments.training.adapter_alpha_rate


def test_each_variant_gets_the_best_pair_of_rates(ran, tmp_path):
    asked = AblationArguments(seeds=[5], learning_rates=[1e-3, 1e-2, 1e-1], alpha_rates=[3.0, 1.0, 10.0])
    variants = variants_of(["operations", "ratio", "rivals"], ["add", "ratio_2", "vanilla_mul", "scale_shift"])
    reference = short_run(output_dir=str(tmp_path), adapter_alpha_rate=20.0)
    run_ablation(asked, reference, variants)
    runs = {job.folder.name: rates_of(job) for job in ran["runs"]}
    plain = (0.01, 1)
    assert runs == {
        "funlora": plain,
        "add": (0.01, 3),
        # With those of the reference.
        "ratio_2": plain,
        "vanilla_mul": plain,
        "scale_shift": plain,
    }
    folders = [job.folder.relative_to(tmp_path / "learning_rates").as_posix() for job in ran["learning rates"]]
    tried = ["0.001", "0.01", "0.1"]
    expected = [f"{key}_alpha_{m}/{rate}" for key in ("funlora", "add") for m in (1, 3, 10) for rate in tried]
    assert sorted(folders) == sorted(
        expected + [f"{key}/{r}" for key in ("vanilla_mul", "scale_shift") for r in tried]
    )
    written = read_json(tmp_path / "learning_rates.json")
    assert written["pairs"]["add"] == {"adapter_learning_rate": 0.01, "adapter_alpha_rate": 3}
    assert written["losses"]["add_alpha_10"]["0.01"] == 7
    assert written["chosen"]["add_alpha_10"] == 0.01


def test_without_alpha_rates_the_recipe_s_stays(ran, tmp_path):
    asked = AblationArguments(seeds=[0], learning_rates=[1e-3, 1e-2, 1e-1])
    reference = short_run(output_dir=str(tmp_path), adapter_alpha_rate=20.0)
    run_ablation(asked, reference, variants_of(["rivals"], ["vanilla_mul"]))
    assert {job.folder.name: rates_of(job) for job in ran["runs"]} == {"funlora": (0.01, 20), "vanilla_mul": (0.01, 1)}
    assert read_json(tmp_path / "learning_rates.json")["chosen"] == {"funlora": 0.01, "vanilla_mul": 0.01}


def test_a_recipe_with_a_rate_of_alpha_breaks_no_variant(ran, tmp_path):
    """What a variant's adapters have is asked of the adapters themselves, and each run passes its own checks."""
    with_attention = {**TINY_UNET, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "attention_head_dim": 4}
    reference = short_run(output_dir=str(tmp_path), adapter_alpha_rate=3.0, unet_config=with_attention)
    variants = [one for one in variants_of(TABLES) if one.needs is None]
    run_ablation(AblationArguments(seeds=[0]), reference, variants)
    assert len(ran["runs"]) == len(variants)
    for job in ran["runs"]:
        strategy, _ = Run(job.arguments, None).prepared()
        model = adapted_shape(strategy._unet_shape(), strategy.adapter_config(4))
        has_alpha = "alpha" in {kind_of(name) for name, _ in model.named_parameters()}
        assert rates_of(job)[1] == (3 if has_alpha else 1), job.label
