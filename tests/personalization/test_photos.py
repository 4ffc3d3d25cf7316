"""Photos of real subjects, two of them of one noun, through whole runs of every family; stock diffusers draws what the run drew."""

from __future__ import annotations

import pytest
from concept_runs import PHOTOS, drawn, needs_photos, run
from concept_strategies import make_pipe
from diffusers import DiffusionPipeline
from text_encoders import PIPELINES

from funlora_hf.personalization.arguments import ConceptEvaluationArguments
from funlora_hf.personalization.drawing import draw
from funlora_hf.personalization.load_concept import load_concept
from funlora_hf.sampling.drawing import tensor_sha256


pytestmark = [needs_photos, pytest.mark.usefixtures("fresh_accelerator")]
NOUNS = {"dog": "dog", "vase": "vase", "dog2": "dog"}
SAMPLING = {"num_inference_steps": 1, "num_samples_per_prompt": 1}
FAST = [
    ("sd", "funlora"),
    ("sdxl", "textual_inversion"),
    ("sd3", "naive_lora"),
    ("pixart", "funlora"),
    ("flux", "lora"),
]
RUNS = [(family, name) for family in PIPELINES for name in ("funlora", "lora", "textual_inversion", "naive_lora")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of pipelines with random weights, by family."""
    folder = tmp_path_factory.mktemp("bases")
    for family in PIPELINES:
        make_pipe(family).save_pretrained(folder / family)
    return folder


def load(pipe, folder, family, strategy):
    """By diffusers' own loader of rows, where there is one."""
    if strategy != "textual_inversion" or family not in ("sd", "sdxl"):
        return load_concept(pipe, folder)
    for number in ("", "_2")[: list(PIPELINES).index(family) + 1]:
        parts = {part: getattr(pipe, f"{part}{number}") for part in ("text_encoder", "tokenizer")}
        pipe.load_textual_inversion(folder, weight_name=f"learned_embeds{number}.safetensors", **parts)


@pytest.mark.parametrize(
    ("family", "strategy"), [pytest.param(*one, marks=[] if one in FAST else pytest.mark.slow) for one in RUNS]
)
def test_photos(family, strategy, bases, inputs, tmp_path):
    folder, order = tmp_path / "run", list(NOUNS)
    base = {"pretrained_model_name_or_path": str(bases / family), "concepts": str(PHOTOS), "concept_order": order}
    base["resolution"] = 8
    results = run(inputs, folder, **base, strategy=strategy, concept_train_steps=2, **SAMPLING)
    assert (results["family"], results["concepts"]) == (family, order)
    assert [len(row) for row in results["scores"]["clip_i"]["matrix"]] == [1, 2, 3]
    assert len(results["pairs"]) == 2
    in_model = strategy == "naive_lora"
    pipe = DiffusionPipeline.from_pretrained(folder / "model" if in_model else bases / family)
    pipe.set_progress_bar_config(disable=True)
    for number, (name, noun) in enumerate(NOUNS.items(), start=1):
        if not in_model:
            load(pipe, folder / "concepts" / name, family, strategy)
        how = {"purpose": name, "seed": 0, "resolution": 8, "config": ConceptEvaluationArguments(**SAMPLING)}
        images = draw(pipe, [f"a <{name}> {noun} in the jungle"], 1, **how)
        assert tensor_sha256(images) == drawn(folder, name, len(order) if in_model else number), name
