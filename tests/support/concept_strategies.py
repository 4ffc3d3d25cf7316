"""Strategies of concepts on pipelines with random weights, whose steps take milliseconds: what tests of all of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from text_encoders import PIPELINES, make_prompted

from funlora_hf.continual.learning import Phase
from funlora_hf.continual.trainer import ContinualTrainer
from funlora_hf.data.tasks import Task
from funlora_hf.personalization.arguments import (
    ConceptArguments,
    ConceptEvaluationArguments,
    ConceptTrainingArguments,
)
from funlora_hf.personalization.batches import ConceptBatches
from funlora_hf.personalization.concepts import Concept
from funlora_hf.personalization.drawing import draw
from funlora_hf.personalization.prior import Prior
from funlora_hf.personalization.run_folder import ConceptFolder
from funlora_hf.personalization.strategies.base import ConceptSetting, ConceptStrategy
from funlora_hf.personalization.strategies.registry import CONCEPT_STRATEGIES, concept_strategy
from funlora_hf.text_to_image.model import TextToImageModel
from funlora_hf.text_to_image.objective import Objective


# Tokens of `make_pipe` before new ones are added.
LETTERS = 2 + 2 * 26
# Of the third concept, that of the first.
NOUNS = ("b", "c", "b")
SAMPLING = ConceptEvaluationArguments(num_inference_steps=2, num_samples_per_prompt=2)
# That make cns find entries, clora's penalty small beside the loss, and replay quick.
OPTIONS = {
    "cns": {"base_fraction": 0.4, "general_share": 1.0},
    "clora": {"penalty": 1.0},
    "ewc": {"fisher_batches": 3},
    "replay": {"images_per_concept": 2, "num_inference_steps": 2},
}


def make_pipe(family: str = "sd"):
    """A pipeline that reads prompts of up to 46 letters, one token each."""
    return make_prompted(PIPELINES[family], limit=48)


def write_pictures(folder: Path, count: int, seed: int) -> tuple[Path, ...]:
    """Pictures of 8 x 8 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels, paths = np.random.default_rng(seed), [folder / f"{index}.png" for index in range(count)]
    for path in paths:
        Image.fromarray(pixels.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)
    return tuple(paths)


def make_concepts(folder: Path, nouns: Sequence[str] = NOUNS) -> dict[int, Concept]:
    """Concepts by id, with three pictures each."""
    return {
        index: Concept(
            name=f"{noun}{index}",
            token=f"<v{index}>",
            noun=noun,
            initializer=noun,
            instance_prompt=f"a <v{index}> {noun}",
            class_prompts=(),
            images=write_pictures(folder / f"{noun}{index}", 3, seed=index),
            eval_prompts=("a {}", "{} d"),
        )
        for index, noun in enumerate(nouns)
    }


def make_strategy(
    name: str,
    folder: Path,
    *,
    family: str = "sd",
    nouns: Sequence[str] = NOUNS,
    concepts: Mapping[int, Concept] | None = None,
    model: TextToImageModel | None = None,
    arguments: dict | None = None,
    **training,
) -> ConceptStrategy:
    """A strategy for a run in `folder`, of `concepts` or of one for each noun; `training` are `ConceptTrainingArguments`."""
    kind = concept_strategy(name)
    concepts = concepts or make_concepts(folder.parent / "pictures", nouns)
    given = ConceptArguments(**{"pretrained_model_name_or_path": "/base", **(arguments or {})})
    training = {
        "concept_train_steps": 4,
        "concept_batch_size": 3,
        "concept_warmup_steps": 1,
        "concept_learning_rate": None if kind.rates is None else 1e-2,
        "token_learning_rate": 2e-2 if given.train_token else None,
        "checkpointing_steps": 100,
        "strategy_options": OPTIONS.get(name),
        "output_dir": str(folder),
        **training,
    }
    if model is None:
        model = TextToImageModel(make_pipe(family))
    tokens = {one.token: one.initializer for one in concepts.values()}
    model.add_rows(tokens, num_vectors=given.num_vectors, layerwise=kind.layerwise)
    setting = ConceptSetting(
        output_dir=folder,
        class_names={index: one.name for index, one in concepts.items()},
        tasks=[Task(number, (index,)) for number, index in enumerate(concepts)],
        training=ConceptTrainingArguments(strategy=name, **training),
        device=torch.device("cpu"),
        model=model,
        concepts=concepts,
        arguments=given,
        objective=Objective(model.scheduler, snr_gamma=given.snr_gamma, noise_offset=given.noise_offset),
    )
    strategy = kind(setting)
    strategy.check()
    return strategy


class Batches:
    """Makes the batches of a strategy's phases."""

    def __init__(self, strategy: ConceptStrategy, prior: Prior | None = None) -> None:
        self.strategy, self.setting, self.prior = strategy, strategy.setting, prior

    def __call__(self, phase: Phase) -> ConceptBatches:
        setting = self.setting
        return ConceptBatches(
            setting.model,
            setting.concepts,
            phase,
            seed=setting.training.seed,
            objective=setting.objective,
            random_flip=False,
            resolution=8,
            prior=self.prior,
            replayed=self.strategy.replayed(phase),
        )


def make_trainer(strategy: ConceptStrategy, *, listeners=(), prior: Prior | None = None, **how) -> ContinualTrainer:
    training = strategy.setting.training
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=True,
        mixed_precision=training.mixed_precision,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
    )
    folder = ConceptFolder(strategy.setting.output_dir)
    batches = Batches(strategy, prior)
    return ContinualTrainer(strategy, batches, folder=folder, accelerator=accelerator, listeners=listeners, **how)


def learn(strategy: ConceptStrategy, **how) -> ConceptStrategy:
    """Run all tasks."""
    make_trainer(strategy, **how).train()
    return strategy


def samples(strategy: ConceptStrategy, *class_ids: int) -> torch.Tensor:
    """Images of a prompt of some concepts, or of none."""
    concepts = [strategy.setting.concepts[class_id] for class_id in class_ids]
    prompt = " d ".join(one.prompt(one.eval_prompts[0]) for one in concepts) or "a b"
    with strategy.sampling(*class_ids) as pipe:
        return draw(pipe, [prompt], 2, purpose="test", seed=0, resolution=8, config=SAMPLING)


def weights(model: TextToImageModel) -> dict[str, torch.Tensor]:
    """All weights of the base, as they are now, and nothing else: of embeddings, the rows of the letters."""
    return {
        name: (one[:LETTERS] if "token_embedding" in name else one).clone()
        for name, one in model.state_dict().items()
        if not name.startswith("rows.")
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of what was learned, by path."""
    places = [
        folder / name
        for name in ("concepts", "model", "checkpoints/model_changes", "checkpoints/fisher", "checkpoints/strategy")
    ]
    files = [path for place in places for path in sorted(place.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


ALL = tuple(CONCEPT_STRATEGIES)
# Whose adapters start without an effect.
ADAPTERS = tuple(name for name in ALL if name not in ("textual_inversion", "custom_diffusion", "cns"))
PER_CONCEPT = ("funlora", "lora", "textual_inversion")
