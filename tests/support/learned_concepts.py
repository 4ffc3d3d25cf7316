"""Folders of concepts as a run writes them, of a tiny random pipeline, without its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import concept_strategies
import torch
from text_encoders import PIPELINES, make_prompted

from funlora_hf.personalization.concepts import Concept
from funlora_hf.text_to_image.model import TextToImageModel


def save_base(folder: Path, family: str = "sd") -> Path:
    """The pipeline's folder."""
    make_prompted(PIPELINES[family]).save_pretrained(folder)
    return folder


def make_strategy(
    output_dir: Path,
    strategy: str = "funlora",
    *,
    base: Path | str,
    family: str = "sd",
    names=("t1", "t2"),
    **given: Any,
):
    """The strategy of a run of concepts, each a task, on the pipeline of `save_base`; `given` are `ConceptArguments`."""
    concepts = {
        index: Concept(name, f"<{name}>", "b", "b", f"a <{name}> b", None, (Path("image.png"),))
        for index, name in enumerate(names)
    }
    arguments = {"pretrained_model_name_or_path": str(base), **given}
    model = TextToImageModel(make_prompted(PIPELINES[family]))
    return concept_strategies.make_strategy(strategy, output_dir, concepts=concepts, model=model, arguments=arguments)


def learn(strategy) -> Path:
    """Write the folders of all concepts, with random numbers in the place of learned ones; returns the run's folder."""
    torch.manual_seed(7)
    for task in strategy.setting.tasks:
        for phase in strategy.phases(task):
            trainable = strategy.build(phase)
            with torch.no_grad():
                for parameter in trainable.parameters.values():
                    parameter.add_(torch.randn_like(parameter) / 4)
            strategy.end_phase(phase, trainable)
            strategy.release_phase(phase, trainable)
        strategy.end_task(task)
    return strategy.setting.output_dir
