"""Evaluate a run after each task: samples, classifier, accuracy matrix, image quality, the proof of zero forgetting.

The trainer calls it when a task is over. Its results are kept in the run's folder, so that a resumed run does not
measure twice.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from ..adapters.class_folder import ADAPTERS_FOLDER
from ..classifier import percentage, predict, train_classifier
from ..continual.config import EvaluationArguments, measuring_settings
from ..continual.run_folder import RunFolder
from ..continual.strategy import Strategy
from ..data.image_data import ImageClassificationData
from ..data.tasks import Task
from ..held_out import held_out_loss
from ..sampling.drawing import Samples, draw_samples, tensor_sha256, to_uint8
from ..sampling.pipeline import FunLoraPipeline
from ..utils.files import folder_sha256, read_mapping, read_tensors, write_json, write_tensors
from ..utils.progress import Progress
from ..utils.seeds import derive_seed
from .drift import class_drift
from .features import ClassifierFeatures, FeatureExtractor, InceptionFeatures, extract_features
from .figures import image_grid
from .image_quality import compare_images, match_classes, reference_features


logger = logging.getLogger(__name__)

# Settings that first samples depend on.
_DRAWN_BY = (
    "num_probe_samples",
    "sampling_batch_size",
    "solver",
    "num_inference_steps",
    "solver_tolerance",
    "guidance_scale",
)


@dataclass(eq=False, repr=False)
class RunEvaluator:
    """Evaluates a strategy on real images; those of the classes of a given base may be missing."""

    strategy: Strategy
    data: ImageClassificationData
    _: KW_ONLY
    config: EvaluationArguments
    folder: RunFolder
    accelerator: Accelerator

    def __post_init__(self) -> None:
        setting = self.strategy.setting
        self.tasks, self.seed = setting.tasks, setting.training.seed
        self._classes = setting.seen(self.tasks[-1])
        self._settings = measuring_settings(asdict(self.config))
        self._classifier = self.config.classifier(setting.training.max_train_steps)
        # Decoded once, since each task is also tested on the images of all earlier ones.
        self._tests: dict[int, torch.Tensor] = {}
        self._reference: ClassifierFeatures | None = None

    def end_task(self, task: Task) -> None:
        """Sample and measure after a task, once. Without `evaluation`, keep only what `zero_forgetting` compares with.

        If the generator has learned a later task, so that the task cannot be measured any more, only warn.
        """
        record, seen = self._record(task), self.strategy.setting.seen(task)
        if not self.config.evaluation:
            is_new = not all(self._probe(class_id).is_file() for class_id in task.class_ids)
            if self.strategy.has_frozen_base and is_new and self.accelerator.is_main_process:
                with self.strategy.inference(seen) as pipe:
                    self._remember_start(pipe, task)
            return
        if self._measured(task) is not None:
            return
        if self.strategy.is_past(task):
            logger.warning("Task %d is not evaluated: the generator has learned a later task since.", task.index + 1)
            return
        started = time.perf_counter()
        with self.strategy.inference(seen) as pipe:
            if self.accelerator.is_main_process:
                self._remember_start(pipe, task)
            mine = seen[self.accelerator.process_index :: self.accelerator.num_processes]
            with Progress(
                len(mine), f"samples, task {task.index + 1}", disable=not self.accelerator.is_main_process
            ) as bar:
                for class_id in mine:
                    path = self._sample_path(class_id, task)
                    if not path.is_file():
                        samples = self._draw(pipe, class_id, "synthetic")
                        write_tensors(path, {"images": to_uint8(samples.images), "nfe": torch.tensor(samples.nfe)})
                    bar.update()
        self.accelerator.wait_for_everyone()
        sampled = time.perf_counter()
        if self.accelerator.is_main_process:
            for class_id in task.class_ids:
                images = self.synthetic_images(class_id, task)[:16]
                image_grid(images, self.folder.class_figure(class_id), columns=4)
            row, per_class = self._accuracies(task, seen)
            measured = {
                "settings": self._settings,
                "accuracies": row,
                "class_accuracies": per_class,
                "seconds": {"sampling": sampled - started, "classifier": time.perf_counter() - sampled},
            }
            own = self.strategy.own_classifier() if all(self._count(c, "test") for c in seen) else None
            measured["own_classifier"] = None if own is None else self._tested(own, task, seen)[0]
            if self.strategy.learning_changes_past_classes:
                measured["held_out_losses"] = self.held_out_losses(seen)
            self.folder.check_there()
            write_json(record, measured)

    def synthetic_images(self, class_id: int, task: Task) -> torch.Tensor:
        """Return the images sampled of a class after a task, uint8, `(n, channels, height, width)`."""
        return self._samples(class_id, task)["images"]

    def nfe(self) -> float:
        """Return how often the U-Net ran for the images of a class after the last task, averaged over the classes."""
        return mean(self._samples(class_id, self.tasks[-1])["nfe"].item() for class_id in self._classes)

    def records(self) -> list[dict[str, Any] | None]:
        """Return what was measured after each task; None for a task that was not evaluated, or with other settings."""
        return [self._measured(task) for task in self.tasks]

    def forget(self) -> None:
        """Delete what can be sampled and measured again."""
        self.folder.forget_samples()
        for task in self.tasks:
            if not self.strategy.is_past(task):
                self._record(task).unlink(missing_ok=True)

    def sampled_classes(self, task: Task) -> tuple[int, ...]:
        """Return the classes that are sampled after a task: the new ones, or all seen if learning changes past classes."""
        return self.strategy.setting.seen(task) if self.strategy.learning_changes_past_classes else task.class_ids

    def sampled(self) -> list[Task]:
        """Return the tasks after which there are samples of all classes."""
        seen = self.strategy.setting.seen
        return [task for task in self.tasks if all(self._sample_path(c, task).is_file() for c in seen(task))]

    def keep_first_samples(self) -> None:
        """Write up to 8 samples of every class after every task, to look at them side by side; other entries of the file stay.

        The file has `task_<t>/class_<id>`, t from 1, uint8 `(n, channels, height, width)`, n <= 8.
        """
        path = self.folder.samples
        tensors = load_file(path) if path.is_file() else {}
        for task in self.sampled():
            for class_id in self.strategy.setting.seen(task):
                images = self.synthetic_images(class_id, task)[:8]
                tensors[f"task_{task.index + 1}/class_{class_id}"] = images.contiguous()
        if tensors:
            write_tensors(path, tensors)

    def held_out_losses(self, classes: Sequence[int] | None = None) -> dict[str, float]:
        """Compute the held-out loss, by id, of those `classes` that have test images, with the present generator; None: all.

        Empty for a strategy without one.
        """
        if not self.strategy.has_held_out_loss:
            return {}
        classes = [c for c in (self._classes if classes is None else classes) if self._count(c, "test")]
        sigmas = self.config.held_out_sigmas
        with self.strategy.inference(classes) as pipe:
            return {
                str(c): held_out_loss(pipe, c, self._test_images(c), num_sigmas=sigmas, seed=self.seed)
                for c in classes
            }

    def image_quality(self) -> dict[str, Any] | None:
        """Measure how near the images sampled after the last task are to the test images, over all classes that have any.

        Returns:
            The fields of [`ImageQuality`]; None if `image_quality` is 'none', or if there are too few real images.

        Raises:
            ImportError: a package that it needs is not installed.
            OSError: the weights of Inception are not available.
            RuntimeError: the reference classifier's loss is not finite.
        """
        if self.config.image_quality == "none":
            return None
        tested = [class_id for class_id in self._classes if self._count(class_id, "test")]
        trained = [class_id for class_id in self._classes if self._count(class_id, "train")]
        if not tested or len(trained) < 2:
            logger.warning(
                "No image quality: of the classes %s, %d have test images and %d training images, expected at least one "
                "and two.",
                list(self._classes),
                len(tested),
                len(trained),
            )
            return None
        real, generated = match_classes(
            {class_id: self._test_images(class_id) for class_id in tested},
            {class_id: self.synthetic_images(class_id, self.tasks[-1]) for class_id in tested},
        )
        if len(real) < 2:
            logger.warning("No image quality: there is only one pair of a real and a sampled image to compare.")
            return None
        extractor: FeatureExtractor
        if self.config.image_quality == "inception":
            extractor = InceptionFeatures().to(self.accelerator.device)
        else:
            extractor = self._reference_features(trained)
        return asdict(compare_images(real, generated, extractor, neighbours=self.config.image_quality_neighbours))

    def real_accuracy(self) -> float | None:
        """Measure the `LA` (%) that as many real images give: the last task's classifier learns from the first
        `num_samples_per_class` training images of each class (all, where there are fewer) instead of from samples.

        None if a class has no training or no test image.

        Raises:
            RuntimeError: the classifier's loss is not finite.

        Source: the upper bound "classifier on real data" of arXiv 2510.02631 [text]; with as many images as samples [ours].
        """
        if not all(self._count(c, split) for c in self._classes for split in ("train", "test")):
            return None
        images = [self.data.images(c)[: self.config.num_samples_per_class] for c in self._classes]
        classifier = self._train_classifier(images, self.tasks[-1], "classifier of real images")
        return mean(self._tested(classifier, self.tasks[-1], self._classes)[0])

    def drift(self) -> dict[str, Any] | None:
        """Measure how far each class's samples after each task are from its test images, in features of the reference classifier.

        Returns:
            "by_task": what `class_drift` measures, by class id, for each task, or None for a task whose samples are gone; "real": the
            same for one half of a class's test images against the other. None if `image_quality` is not 'classifier', or if there are
            too few real images.

        Raises:
            RuntimeError: the reference classifier's loss is not finite.
        """
        trained = sorted(class_id for class_id in self._classes if self._count(class_id, "train"))
        labels = {c: row for row, c in enumerate(trained) if self._count(c, "test")}
        if self.config.image_quality != "classifier" or not labels or len(trained) < 2:
            return None
        extractor = self._reference_features(trained)
        real = {c: extract_features(extractor, self._test_images(c)) for c in labels}
        measured: dict[Path, dict[str, float | None]] = {}

        def of_class(class_id: int, task: Task) -> dict[str, float | None]:
            path = self._sample_path(class_id, task)
            if path not in measured:  # a class that never changes has one file
                drawn = extract_features(extractor, self.synthetic_images(class_id, task))
                measured[path] = class_drift(real[class_id], drawn, extractor.head, labels[class_id])
            return measured[path]

        rows, sampled = [], self.sampled()
        for task, record in zip(self.tasks, self.records(), strict=True):
            if record is not None and task in sampled:
                seen = self.strategy.setting.seen(task)
                record["drift"] = {str(c): of_class(c, task) for c in seen if c in labels}
                write_json(self._record(task), record)  # its samples may be gone when the run is evaluated again
            rows.append(record and record.get("drift"))
        halves = {c: (one[::2], one[1::2]) for c, one in real.items() if len(one) > 1}
        chance = {str(c): class_drift(*both, extractor.head, labels[c]) for c, both in halves.items()}
        return {"by_task": rows, "real": chance}

    def zero_forgetting(self) -> dict[str, Any] | None:
        """Compare each class's first samples and the base's folder, bit for bit, with what they were when they were new.

        Returns None for a strategy without a frozen base.
        """
        if not self.strategy.has_frozen_base:
            return None
        changed, not_comparable = [], []
        with self.strategy.inference(self._classes) as pipe:
            for class_id in self._classes:
                before = read_mapping(self._probe(class_id), keys=("environment", "sha256"))
                # With the settings of that time, since those of the evaluation may have changed.
                config = replace(self.config, **{"guidance_scale": 1.0, **before.get("drawn", {})})
                if before["environment"] != self._environment():
                    not_comparable.append(class_id)
                elif before["sha256"] != tensor_sha256(self._draw(pipe, class_id, "probe", config).images):
                    changed.append(class_id)
        if not_comparable:
            logger.warning(
                "The first samples of classes %s were drawn on another machine or thread count, where rounding differs: "
                "they are left out of the comparison.",
                not_comparable,
            )
        compared = len(self._classes) - len(not_comparable)
        return {
            "identical": not changed if compared else None,
            "classes_compared": compared,
            "classes_changed": changed,
            "base_sha256_before": read_mapping(self.folder.evaluation / "base.json", keys=["sha256"])["sha256"],
            "base_sha256_after": self._base_sha256(),
        }

    def _reference_features(self, trained: Sequence[int]) -> ClassifierFeatures:
        """Return the features of a classifier of all real training images, which is trained once."""
        if self._reference is None:
            images = {class_id: self.data.images(class_id) for class_id in trained}
            self._reference = reference_features(images, config=self._classifier, device=self.accelerator.device)
        return self._reference

    def _samples(self, class_id: int, task: Task) -> dict[str, torch.Tensor]:
        # If tasks change the generator, its state after an earlier task is gone.
        if self.strategy.learning_changes_past_classes and task != self.tasks[-1]:
            remedy = "start again with --overwrite_output_dir"
        else:
            remedy = f"delete it and {self._record(task)}, and --resume_from_checkpoint latest draws it again"
        return read_tensors(self._sample_path(class_id, task), remedy=remedy, keys=("images", "nfe"))

    def _sample_path(self, class_id: int, task: Task) -> Path:
        # A class that never changes is sampled once for all tasks: the same seed would give the same images.
        changes = self.strategy.learning_changes_past_classes
        return (
            self.folder.synthetic / (f"task_{task.index + 1}" if changes else "all") / f"class_{class_id}.safetensors"
        )

    def _draw(
        self, pipe: FunLoraPipeline, class_id: int, purpose: str, config: EvaluationArguments | None = None
    ) -> Samples:
        config = config or self.config
        return draw_samples(
            pipe,
            class_id,
            config.num_probe_samples if purpose == "probe" else config.num_samples_per_class,
            purpose=purpose,
            seed=self.seed,
            batch_size=config.sampling_batch_size,
            solver=config.solver,
            num_inference_steps=config.num_inference_steps,
            tolerance=config.solver_tolerance,
            guidance_scale=config.guidance_scale,
        )

    def _accuracies(self, task: Task, seen: Sequence[int]) -> tuple[list[float], dict[str, float]] | tuple[None, None]:
        """Compute a row of the accuracy matrix, % on the test images of each task so far, and the % on those of each class.

        Both are None where they cannot be measured.
        """
        missing = {c for c in self.tasks[0].class_ids if not self._count(c, "train")}
        missing |= {c for c in seen if not self._count(c, "test")}
        if missing:
            logger.warning(
                "No accuracy: the dataset has no real images of classes %s, which the classifier needs.",
                sorted(missing),
            )
            return None, None
        images = [self.data.images(c) if task.index == 0 else self.synthetic_images(c, task) for c in seen]
        return self._tested(self._train_classifier(images, task, f"classifier, task {task.index + 1}"), task, seen)

    def _train_classifier(self, images: Sequence[torch.Tensor], task: Task, description: str) -> nn.Module:
        """Train the classifier of a task on the images of each class, in the order of the classes."""
        labels = [torch.full((len(part),), row) for row, part in enumerate(images)]
        return train_classifier(
            torch.cat(list(images)),
            torch.cat(labels),
            num_classes=len(images),
            config=self._classifier,
            seed=derive_seed(self.seed, "classifier", task.index),
            device=self.accelerator.device,
            description=description,
        )

    def _tested(self, classifier: nn.Module, task: Task, seen: Sequence[int]) -> tuple[list[float], dict[str, float]]:
        """Return a classifier's % of right answers on the test images of each task so far, and on those of each class."""
        row: list[float] = []
        per_class: dict[str, float] = {}
        for earlier in self.tasks[: task.index + 1]:
            tests = [self._test_images(class_id) for class_id in earlier.class_ids]
            truth = [torch.full((len(x),), seen.index(c)) for c, x in zip(earlier.class_ids, tests, strict=True)]
            correct = predict(classifier, torch.cat(tests)) == torch.cat(truth)
            row.append(percentage(correct))
            parts = correct.split([len(test) for test in tests])
            per_class |= {str(c): percentage(part) for c, part in zip(earlier.class_ids, parts, strict=True)}
        return row, per_class

    def _test_images(self, class_id: int) -> torch.Tensor:
        if class_id not in self._tests:
            self._tests[class_id] = self.data.images(class_id, split="test")
        return self._tests[class_id]

    def _count(self, class_id: int, split: str) -> int:
        return self.data.count(class_id, split=split) if class_id in self.data.class_names else 0

    def _remember_start(self, pipe: FunLoraPipeline, task: Task) -> None:
        """Keep what `zero_forgetting` compares with: hashes of the base and of each new class's first samples."""
        base = self.folder.evaluation / "base.json"
        if self.strategy.has_frozen_base and not base.is_file():
            write_json(base, {"sha256": self._base_sha256()})
        for class_id in task.class_ids:
            path = self._probe(class_id)
            if not path.is_file():
                sha256 = tensor_sha256(self._draw(pipe, class_id, "probe").images)
                drawn = {name: getattr(self.config, name) for name in _DRAWN_BY}
                write_json(path, {"sha256": sha256, "environment": self._environment(), "drawn": drawn})

    def _probe(self, class_id: int) -> Path:
        return self.folder.checkpoints / "probes" / f"class_{class_id}.json"

    def _record(self, task: Task) -> Path:
        return self.folder.evaluation / f"task_{task.index + 1}.json"

    def _measured(self, task: Task) -> dict[str, Any] | None:
        """Return what was measured after a task with the present settings; records of earlier versions name no settings."""
        record = read_mapping(self._record(task)) if self._record(task).is_file() else None
        return None if record is None or record.get("settings", self._settings) != self._settings else record

    def _environment(self) -> dict[str, Any]:
        """Return what the last bits of a result may depend on."""
        device = self.accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
        return {
            "device": f"{device.type} {name}".strip(),
            "machine": platform.node(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def _base_sha256(self) -> str:
        return folder_sha256(self.strategy.setting.base_dir, leave_out=[ADAPTERS_FOLDER])
