"""Folders of concepts as a run writes them, of a tiny random pipeline, without its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from text_encoders import make_prompted

from funlora_hf.data.tasks import Task
from funlora_hf.personalization.arguments import ConceptArguments, ConceptTrainingArguments
from funlora_hf.personalization.concepts import Concept
from funlora_hf.personalization.objective import Objective
from funlora_hf.personalization.strategies.base import ConceptSetting
from funlora_hf.personalization.strategies.registry import concept_strategy
from funlora_hf.personalization.text_to_image import TextToImageModel


PIPELINES = {"sd": "SD", "sdxl": "SDXL", "sd3": "SD3"}


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
    """The strategy of a run of concepts, each a task; `given` are `ConceptArguments`."""
    model = TextToImageModel(make_prompted(PIPELINES[family]))
    concepts = {
        index: Concept(name, f"<{name}>", "b", "b", f"a <{name}> b", None, (Path("image.png"),))
        for index, name in enumerate(names)
    }
    model.add_rows({one.token: one.initializer for one in concepts.values()})
    setting = ConceptSetting(
        output_dir=output_dir,
        class_names={index: one.name for index, one in concepts.items()},
        tasks=[Task(index, (index,)) for index in concepts],
        training=ConceptTrainingArguments(output_dir=str(output_dir), strategy=strategy),
        device=torch.device("cpu"),
        model=model,
        concepts=concepts,
        arguments=ConceptArguments(pretrained_model_name_or_path=str(base), **given),
        objective=Objective(model.scheduler),
    )
    made = concept_strategy(strategy)(setting)
    made.check()
    return made


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
