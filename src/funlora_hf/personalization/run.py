"""Do a whole run of concepts from its arguments: base, concepts, strategy, training, evaluation, report."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..continual.config import LATEST, run_settings
from ..continual.learning import Phase
from ..continual.run_context import ended, held, start_trackers
from ..continual.termination import Termination
from ..continual.time_limit import TimeLimit
from ..continual.trainer import ContinualTrainer, Listener
from ..data.tasks import Task
from ..run import make_accelerator
from ..text_to_image.model import TextToImageModel
from ..text_to_image.objective import Objective
from ..utils.checks import did_you_mean
from ..utils.files import file_sha256
from .arguments import (
    TINY,
    ConceptArguments,
    ConceptEvaluationArguments,
    ConceptTrainingArguments,
)
from .batches import ConceptBatches
from .concepts import Concept, check_concepts, load_concepts
from .evaluator import ConceptEvaluator
from .found_concepts import load_base
from .prior import Prior, class_images
from .report import report_finished, report_run
from .run_folder import ConceptFolder
from .sharing import ConceptPublisher
from .strategies.base import ConceptSetting, ConceptStrategy
from .strategies.registry import concept_strategy


logger = logging.getLogger(__name__)


@dataclass
class ConceptRunArguments:
    """All arguments of a run of concepts, checked against each other.

    Raises:
        ValueError: an unknown strategy, or options that it does not have.
    """

    concepts: ConceptArguments
    training: ConceptTrainingArguments
    evaluation: ConceptEvaluationArguments

    def __post_init__(self) -> None:
        concept_strategy(self.training.strategy).make_options(self.training.strategy_options or {})
        if not self.evaluation.evaluation:
            # The other settings are also those with which the base draws class images.
            draws, of_evaluation = (
                self.concepts.with_prior_preservation,
                ("num_samples_per_prompt", "clip_model", "dino_model"),
            )
            for one in fields(self.evaluation):
                value = getattr(self.evaluation, one.name)
                if value not in (False, one.default) and (one.name in of_evaluation or not draws):
                    raise ValueError(
                        f"`{one.name}` is {value!r}, but `evaluation` is False: leave one of the two out."
                    )

    @classmethod
    def of(cls, folder: str | os.PathLike) -> ConceptRunArguments:
        """Return the arguments of the run in a folder; the folder may have been moved.

        Raises:
            FileNotFoundError: there is no run in the folder.
            ValueError: a run of classes.
        """
        run = ConceptFolder(Path(folder))
        if "ModelArguments" in run.settings():
            raise ValueError(f"{os.fspath(folder)!r} holds a run of classes, expected one of `funlora personalize`.")
        arguments = cls(*run.read_arguments())
        arguments.training.output_dir = os.fspath(folder)
        return arguments


def personalize(arguments: ConceptRunArguments, *, termination: Termination | None = None) -> dict[str, Any] | None:
    """Learn concepts one after another, evaluate and report, or resume a run that was stopped.

    Args:
        arguments: the arguments of the run.
        termination: an entered context, for a run that SIGTERM and SIGINT should stop at a checkpoint; None: none.

    Returns:
        The contents of results.json; None on all processes except the main one.

    Raises:
        PushError: `push_to_hub` is set, but the finished run could not be pushed.
        ForgettingError: the samples of an earlier concept have changed, although the strategy promises that they stay.
        TimeLimitReached, Terminated: the run can be resumed.
        FolderInUseError: another run uses `output_dir`.
        WriteError: a file could not be written; finished parts are safe.
        ValueError, FileExistsError, FileNotFoundError: arguments that do not fit each other, the concepts, the base or the folder.
    """
    return ConceptRun(arguments, termination).learn()


class ConceptRun:
    """Creates and joins the parts of a run; its time limit starts when it is created."""

    def __init__(self, arguments: ConceptRunArguments, termination: Termination | None) -> None:
        self.arguments, self.training, self.termination = arguments, arguments.training, termination
        self.limit = TimeLimit(self.training.time_limit_minutes)
        self.accelerator = make_accelerator(self.training)
        self.folder = ConceptFolder(Path(self.training.output_dir))

    def learn(self) -> dict[str, Any] | None:
        """Train, evaluate and report; resume a run where it stopped."""
        strategy = self.strategy()
        accelerator, folder = self.accelerator, self.folder
        # It loads its judges, or fails now.
        evaluator = ConceptEvaluator(strategy, self.arguments.evaluation, folder=folder, accelerator=accelerator)
        with held(folder.path, accelerator, self.training):
            if accelerator.is_main_process:
                folder.open(
                    self._settings(strategy.setting),
                    overwrite=self.training.overwrite_output_dir,
                    resume=self.training.resume_from_checkpoint == LATEST,
                    needed=self._needed(strategy.setting),
                )
            accelerator.wait_for_everyone()
            start_trackers(accelerator, self.training)
            with folder.staying():
                is_main = accelerator.is_main_process
                publishers = [ConceptPublisher(strategy)] if self.training.push_to_hub and is_main else []
                if folder.results.is_file():
                    accelerator.end_training()
                    results = report_finished(folder) if is_main else None
                else:
                    with ended(accelerator):
                        evaluator.before()
                        self._trainer(strategy, [evaluator, *publishers]).train()
                        evaluator.after()
                    results = report_run(evaluator, vars(self.arguments).values()) if is_main else None
                for publisher in publishers:
                    publisher.end_run()
                return results

    @property
    def evaluates(self) -> bool:
        """Whether concepts are sampled and scored."""
        return self.arguments.evaluation.evaluation

    def strategy(self) -> ConceptStrategy:
        """Load the base and the concepts, check everything, and return the strategy; nothing is written."""
        given, training = self.arguments.concepts, self.training
        known = load_concepts(given.concepts, instance_prompt=given.instance_prompt)
        concepts = {index: known[index] for index in self._order(known)}
        model = self._model()
        unread = [one.name for one in concepts.values() if one.class_data_dir and not given.with_prior_preservation]
        if unread:
            logger.info("class_data_dir of %s is not read without --with_prior_preservation", ", ".join(unread))
        check_concepts(
            list(concepts.values()),
            model.row_tokenizers,
            num_vectors=given.num_vectors,
            evaluated=self.evaluates,
        )
        tokens = {one.token: one.initializer for one in concepts.values()}
        layerwise = concept_strategy(training.strategy).layerwise
        model.add_rows(tokens, num_vectors=given.num_vectors, layerwise=layerwise)
        model.to(self.accelerator.device)
        self._check_resolution(model)
        objective = Objective(
            model.scheduler,
            timestep_density=training.timestep_density,
            snr_gamma=given.snr_gamma,
            noise_offset=given.noise_offset,
        )
        setting = ConceptSetting(
            output_dir=self.folder.path,
            class_names={index: one.name for index, one in concepts.items()},
            tasks=[Task(number, (index,)) for number, index in enumerate(concepts)],
            training=training,
            device=self.accelerator.device,
            model=model,
            concepts=concepts,
            arguments=given,
            objective=objective,
        )
        strategy = concept_strategy(training.strategy)(setting)
        strategy.check()
        return strategy

    def _model(self) -> TextToImageModel:
        given = self.arguments.concepts
        dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.training.mixed_precision]
        return load_base(
            given.pretrained_model_name_or_path,
            revision=given.revision,
            variant=given.variant,
            device=self.accelerator.device,
            dtype=dtype,
            drop_t5=given.drop_t5,
        )

    def _check_resolution(self, model: TextToImageModel) -> None:
        given, steps = self.arguments.concepts, model.vae_scale_factor * model.patch_size
        # Pipelines take multiples of 8 only.
        if given.resolution is not None and given.resolution % (multiple := math.lcm(8, steps)):
            raise ValueError(f"`resolution` is {given.resolution}, expected a multiple of {multiple}.")
        is_judged = given.pretrained_model_name_or_path == TINY and self.arguments.evaluation.evaluation
        if is_judged and given.resolution not in (None, model.resolution):
            raise ValueError(
                f"`resolution` is {given.resolution}, expected {model.resolution} or None, since the judge of the package's own base "
                "reads no other: leave it out, or pass --no_evaluation."
            )

    def _order(self, concepts: list[Concept]) -> list[int]:
        """Return the indices of the concepts in the order of learning."""
        names = [one.name for one in concepts]
        order = self.arguments.concepts.concept_order or names
        for name in order:
            if name not in names:
                raise ValueError(
                    f"`concept_order` has {name!r}, expected some of {', '.join(map(repr, names))}.{did_you_mean(name, names)}"
                )
        if len(set(order)) < len(order):
            raise ValueError(f"`concept_order` is {order}, expected each name once.")
        return [names.index(name) for name in order]

    def _needed(self, setting: ConceptSetting) -> dict[str, str]:
        """Return the files and folders that the run reads, by what names them."""
        given, evaluation = self.arguments.concepts, self.arguments.evaluation
        read = {
            "concepts": given.concepts,
            "pretrained_model_name_or_path": given.pretrained_model_name_or_path,
            "clip_model": evaluation.clip_model or "",
            "dino_model": evaluation.dino_model or "",
        }
        for one in setting.concepts.values():
            read[f"images of {one.name}"] = str(one.images[0].parent)
            read[f"references of {one.name}"] = str(one.references[0].parent)
            read[f"class_data_dir of {one.name}"] = str(one.class_data_dir or "")
        return {name: place for name, place in read.items() if place and Path(place).exists()}

    def _settings(self, setting: ConceptSetting) -> dict[str, Any]:
        """Return what a resumed run has to match: arguments, concepts with their images, order."""
        of_run = self.arguments
        concepts = {f"class {index}": about(one) for index, one in setting.concepts.items()}
        return {
            **run_settings(of_run.concepts, of_run.training, of_run.evaluation),
            "classes": concepts,
            "tasks": {f"task {task.index + 1}": list(task.class_ids) for task in setting.tasks},
        }

    def _prior(self, setting: ConceptSetting) -> Prior | None:
        """Return the pictures of the concepts' classes; the base draws missing ones, before it learns anything."""
        given, evaluation = self.arguments.concepts, self.arguments.evaluation
        if not given.with_prior_preservation:
            return None
        images = class_images(
            setting.model.pipeline(),
            setting.concepts,
            self.folder.checkpoints / "class_images",
            num_class_images=given.num_class_images,
            resolution=given.resolution or setting.model.resolution,
            seed=self.training.seed,
            sample_batch_size=evaluation.sampling_batch_size,
            origin={name: getattr(given, name) for name in ("pretrained_model_name_or_path", "revision", "variant")},
            accelerator=self.accelerator,
            num_inference_steps=evaluation.num_inference_steps,
            guidance_scale=evaluation.guidance_scale,
        )
        return Prior(images, loss_weight=given.prior_loss_weight)

    def _trainer(
        self, strategy: ConceptStrategy, listeners: Sequence[Listener] = (), *, folder: ConceptFolder | None = None
    ) -> ContinualTrainer:
        setting, given = strategy.setting, self.arguments.concepts
        prior = self._prior(setting)

        def batches(phase: Phase) -> ConceptBatches:
            return ConceptBatches(
                setting.model,
                {class_id: setting.concepts[class_id] for class_id in phase.class_ids},
                phase,
                seed=self.training.seed,
                objective=setting.objective,
                random_flip=given.random_flip,
                resolution=given.resolution or setting.model.resolution,
                prior=prior,
                replayed=strategy.replayed(phase),
            )

        return ContinualTrainer(
            strategy,
            batches,
            folder=folder or self.folder,
            accelerator=self.accelerator,
            listeners=listeners,
            limit=self.limit,
            termination=self.termination,
        )


def about(concept: Concept) -> dict[str, Any]:
    """Return what makes a concept another one, JSON-able: its name, all its prompts, hashes of its pictures."""
    return {
        "name": concept.name,
        "prompts": [concept.token, concept.initializer, *concept.texts(), *filter(None, [concept.pair_prompt])],
        "images": [file_sha256(path) for path in (*concept.images, *concept.references)],
    }
