"""Whole runs of concepts on a pipeline with random weights, in a second each."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from concept_strategies import make_pipe, write_pictures
from runs import REPOSITORY
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from funlora_hf.personalization.arguments import (
    ConceptArguments,
    ConceptEvaluationArguments,
    ConceptTrainingArguments,
)
from funlora_hf.personalization.run import ConceptRunArguments, personalize


# Of subjects of DreamBooth's data set, a folder each.
PHOTOS = Path(os.environ.get("FUNLORA_TEST_DATA", REPOSITORY.parent / "shared" / "data")) / "dreambooth"
needs_photos = pytest.mark.skipif(
    not PHOTOS.is_dir(), reason="no photos; FUNLORA_TEST_DATA may name a folder with dreambooth/ in it"
)


def write_inputs(folder: Path) -> Path:
    """`base`, a pipeline; `clip`, a judge; `concepts.json`, two concepts of one noun and one of another."""
    make_pipe().save_pretrained(folder / "base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 64, "max_position_embeddings": 48, "eos_token_id": 1, "bos_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 8, "patch_size": 4}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder / "clip")
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    CLIPImageProcessor(**size).save_pretrained(folder / "clip")
    make_pipe().tokenizer.save_pretrained(folder / "clip")
    entries = []
    for index, noun in enumerate("bcb"):
        write_pictures(folder / f"{noun}{index}", 3, seed=index)
        entries.append(
            {
                "instance_data_dir": f"{noun}{index}",
                "instance_prompt": f"a <v{index}> {noun}",
                "eval_prompts": ["a {}", "{} d"],
            }
        )
    (folder / "concepts.json").write_text(json.dumps(entries))
    return folder


def make_arguments(inputs: Path, output: Path, **given: Any) -> ConceptRunArguments:
    """Arguments of a short run, with those given."""
    evaluated = given.get("evaluation", True)
    drawn = evaluated or given.get("with_prior_preservation")
    given = {
        "pretrained_model_name_or_path": str(inputs / "base"),
        "concepts": str(inputs / "concepts.json"),
        "concept_order": ["b0", "c1"],
        "output_dir": str(output),
        "concept_train_steps": 3,
        "concept_batch_size": 2,
        "concept_warmup_steps": 1,
        "token_learning_rate": 2e-2,
        **({"num_inference_steps": 2} if drawn else {}),
        **({"num_samples_per_prompt": 2, "clip_model": str(inputs / "clip")} if evaluated else {}),
        **given,
    }
    if given.get("strategy") != "textual_inversion":
        given.setdefault("concept_learning_rate", 1e-2)
    parts = []
    for kind in (ConceptArguments, ConceptTrainingArguments, ConceptEvaluationArguments):
        own = {name: given.pop(name) for name in list(given) if name in kind.__dataclass_fields__}
        parts.append(kind(**own))
    assert not given, f"no arguments: {', '.join(given)}"
    return ConceptRunArguments(*parts)


def run(inputs: Path, output: Path, **given: Any) -> dict[str, Any]:
    """A run in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    results = personalize(make_arguments(inputs, output, **given))
    assert results is not None
    return results


def drawn(folder: Path, name: str, task: int) -> str:
    """SHA-256 of what a run drew of a concept's first prompt after a task."""
    return json.loads((folder / f"checkpoints/evaluation/task_{task}/{name}.json").read_text())["sha256"]
