"""Evaluate a run of concepts after each task: samples of each concept so far, of its noun, and of prompts of no concept.

Its records are kept in the run's folder, so that a resumed run does not measure twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from functools import cached_property
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data.tasks import Task
from ..sampling.drawing import tensor_sha256
from ..text_to_image.token_rows import prompt_length
from ..utils.files import read_mapping, read_tensors, write_json, write_tensors
from ..utils.progress import Progress
from .arguments import ConceptEvaluationArguments
from .concepts import Concept
from .drawing import draw
from .judges import Judge, Scores, judges
from .pictures import load_images
from .run_folder import ConceptFolder
from .scores import mean_and_error
from .strategies.base import ConceptStrategy
from .usual_captions import usual_captions


logger = logging.getLogger(__name__)

# Images of each concept and time that are kept, to look at.
_KEPT = 8


@dataclass(eq=False, repr=False)
class ConceptEvaluator:
    """Evaluates a strategy on the base that its setting has."""

    strategy: ConceptStrategy
    config: ConceptEvaluationArguments
    _: KW_ONLY
    folder: ConceptFolder
    accelerator: Accelerator

    def __post_init__(self) -> None:
        setting = self.strategy.setting
        self.setting, self.seed, self.tasks = setting, setting.training.seed, setting.tasks
        self.resolution = setting.arguments.resolution or setting.model.resolution
        self._settings = {name: value for name, value in asdict(self.config).items() if name != "evaluation"}
        self._judges: list[Judge] = []
        if self.config.evaluation:
            self._judges = judges(self.config, tiny=setting.is_tiny, device=setting.device)
        self.base_prompts = usual_captions(tiny=setting.is_tiny)

    def before(self) -> None:
        """Measure, once, what the untouched base does with the nouns: the floor of every score; and the ceiling."""
        path = self.folder.evaluation / "before.json"
        if not self.config.evaluation or not self.accelerator.is_main_process or self._read(path) is not None:
            return
        record: dict[str, Any] = {"settings": self._settings, "floor": {}, "ceiling": {}}
        pipe = self.setting.model.pipeline()
        for class_id, concept in self.setting.concepts.items():
            prompts = [concept.plain(concept.prompt(template)) for template in concept.eval_prompts]
            images = self._draw(pipe, prompts, concept.name)
            record["floor"][str(class_id)] = _means(self._scores(images, class_id, self._each(prompts)))
            references = load_images(concept.references, size=self.resolution)
            texts = [concept.plain(concept.caption(image)) for image in concept.references]
            record["ceiling"][str(class_id)] = _means(self._scores(references, class_id, texts))
            nouns = self._draw(pipe, [concept.class_caption], f"{concept.name} noun")
            write_tensors(self.folder.evaluation / "before" / f"{concept.name}.safetensors", {"nouns": nouns})
        images = self._draw(pipe, self.base_prompts, "base", samples=1)
        record["base"] = _means(self._base(images, self.base_prompts))
        write_tensors(self.folder.evaluation / "before" / "base.safetensors", {"images": images})
        write_json(path, record)

    def end_task(self, task: Task) -> None:
        """Sample and measure after a task, once; a concept that never changes only after its own."""
        if not self.config.evaluation:
            return
        changes = self.strategy.learning_changes_past_classes
        seen = self.setting.seen(task) if changes else task.class_ids
        if self.strategy.is_past(task):
            return
        # Each process's share does not depend on what others have measured in the meantime.
        mine = seen[self.accelerator.process_index :: self.accelerator.num_processes]
        mine = tuple(class_id for class_id in mine if self._read(self._record(class_id, task)) is None)
        quiet = not self.accelerator.is_main_process
        with Progress(len(mine), f"samples, task {task.index + 1}", disable=quiet) as bar:
            for class_id in mine:
                self._measure(class_id, task)
                bar.update()
        base = self.folder.evaluation / f"task_{task.index + 1}" / "base.json"
        if not quiet and self._read(base) is None and (changes or task.index == 0):
            with self.strategy.sampling() as pipe:
                images = self._draw(pipe, self.base_prompts, "base", samples=1)
            write_json(base, {"settings": self._settings, **self._drift(images)})
        self.accelerator.wait_for_everyone()

    def after(self) -> None:
        """At the end: measure two concepts in one prompt, and whether concepts are as they were, if the strategy promises it."""
        if not self.config.evaluation or not self.accelerator.is_main_process:
            return
        self._measure_pairs(self.folder.evaluation / "pairs.json")
        if not self.strategy.learning_changes_past_classes:
            self._compare(self.folder.evaluation / "after.json")

    def _measure_pairs(self, path: Path) -> None:
        """Measure neighbours in the order of learning, and each style with each subject, by what is measured of a single concept."""
        if self._read(path) is not None:
            return
        tokenizers = self.setting.model.row_tokenizers.values()
        pairs = []
        for both, prompt in pairs_with_prompts(self.setting.concepts):
            one, other = (self.setting.concepts[class_id] for class_id in both)
            if any(prompt_length(prompt, tokenizer) > tokenizer.model_max_length for tokenizer in tokenizers):
                logger.warning("%s and %s are not measured together: %r is too long", one.name, other.name, prompt)
                continue
            with self.strategy.sampling(*both) as pipe:
                images = self._draw(pipe, [prompt], f"{one.name} and {other.name}")
            plain = self._each([one.plain(other.plain(prompt))])
            scores = {
                self.setting.concepts[class_id].name: _means(self._scores(images, class_id, plain))
                for class_id in both
            }
            pairs.append({"prompt": prompt, "scores": scores})
        write_json(path, {"settings": self._settings, "pairs": pairs})

    def _compare(self, path: Path) -> None:
        """Draw the first images of every concept again, and compare."""
        if self._read(path) is not None:
            return
        changed = []
        for class_id, concept in self.setting.concepts.items():
            with self.strategy.sampling(class_id) as pipe:
                again = self._draw(pipe, self._prompts(class_id)[:1], concept.name)
            before = read_mapping(self._record(class_id, self._own_task(class_id)), keys=["sha256"])["sha256"]
            if tensor_sha256(again) != before:
                changed.append(concept.name)
        write_json(path, {"settings": self._settings, "identical": not changed, "changed": changed})

    def record(self, class_id: int, task: Task) -> dict[str, Any] | None:
        """Return what was measured of a concept after a task; None: nothing."""
        if not self.strategy.learning_changes_past_classes:
            task = self._own_task(class_id)
        return self._read(self._record(class_id, task))

    def of_run(self, name: str) -> dict[str, Any] | None:
        """Return the record "before", "pairs", "after" or, for a task from 1, "task_<t>/base"; None: there is none."""
        return self._read(self.folder.evaluation / f"{name}.json")

    def images(self, class_id: int, task: Task) -> torch.Tensor | None:
        """Return the first images of a concept after a task, uint8 `(n, 3, h, w)`, n <= 8; None: there are none."""
        if not self.strategy.learning_changes_past_classes:
            task = self._own_task(class_id)
        path = self._record(class_id, task).with_suffix(".safetensors")
        return read_tensors(path, remedy="evaluate again")["images"] if path.is_file() else None

    def _measure(self, class_id: int, task: Task) -> None:
        started, concept = time.perf_counter(), self.setting.concepts[class_id]
        prompts, path = self._prompts(class_id), self._record(class_id, task)
        with self.strategy.sampling(class_id) as pipe:
            images = self._draw(pipe, prompts, concept.name)
            # By themselves, as `after` draws them: the size of a batch may change bits.
            first = self._draw(pipe, prompts[:1], concept.name)
            nouns = self._draw(pipe, [concept.class_caption], f"{concept.name} noun")
            others = self._draw(pipe, self.base_prompts, "base", samples=1)
        scores = self._scores(images, class_id, self._each([concept.plain(prompt) for prompt in prompts]))
        before = read_tensors(self.folder.evaluation / "before" / f"{concept.name}.safetensors", remedy="start again")
        texts = self._each([concept.class_caption])
        now, then = (self._scores(some, class_id, texts) for some in (nouns, before["nouns"]))
        name = "attr" if "attr" in now else "clip_i"
        leak = {"leak": (now[name].mean() - then[name].mean()).item()} if name in now else {}
        write_tensors(path.with_suffix(".safetensors"), {"images": images[:_KEPT]})
        record = {
            "settings": self._settings,
            "scores": {**_means(scores), **leak},
            "standard_errors": {name: mean_and_error(values)[1] for name, values in scores.items()},
            "with_adapter": self._drift(others),
            "sha256": tensor_sha256(first),
            "seconds": time.perf_counter() - started,
        }
        self.folder.check_there()
        write_json(path, record)

    @cached_property
    def _base_images(self) -> torch.Tensor:
        return read_tensors(self.folder.evaluation / "before" / "base.safetensors", remedy="start again")["images"]

    def _drift(self, images: torch.Tensor) -> dict[str, float]:
        """Return how base prompts are followed, and how far their images are from the base's, drawn from the same noise."""
        before = self._base_images
        change = 1 - self._judges[0].similarity(images, before).mean().item() if self._judges else None
        same = (images == before).flatten(1).all(dim=1).float().mean().item()
        return {
            **_means(self._base(images, self.base_prompts)),
            **({} if change is None else {"change": change}),
            "same": same,
        }

    def _scores(self, images: torch.Tensor, class_id: int, prompts: Sequence[str]) -> Scores:
        concept = self.setting.concepts[class_id]
        return {name: one for judge in self._judges for name, one in judge.concept(images, concept, prompts).items()}

    def _base(self, images: torch.Tensor, prompts: Sequence[str]) -> Scores:
        return {name: one for judge in self._judges for name, one in judge.base(images, prompts).items()}

    def _prompts(self, class_id: int) -> list[str]:
        concept = self.setting.concepts[class_id]
        return [concept.prompt(template) for template in concept.eval_prompts]

    def _each(self, prompts: Sequence[str]) -> list[str]:
        return [prompt for prompt in prompts for _ in range(self.config.num_samples_per_prompt)]

    def _draw(self, pipe: Any, prompts: Sequence[str], purpose: str, samples: int | None = None) -> torch.Tensor:
        return draw(
            pipe,
            prompts,
            samples or self.config.num_samples_per_prompt,
            purpose=purpose,
            seed=self.seed,
            resolution=self.resolution,
            config=self.config,
        )

    def _record(self, class_id: int, task: Task) -> Path:
        return self.folder.evaluation / f"task_{task.index + 1}" / f"{self.setting.concepts[class_id].name}.json"

    def _read(self, path: Path) -> dict[str, Any] | None:
        """Return a record with the present settings, or None."""
        record = read_mapping(path) if path.is_file() else None
        return record if record is not None and record.get("settings") == self._settings else None

    def _own_task(self, class_id: int) -> Task:
        return next(task for task in self.tasks if class_id in task.class_ids)


def pairs_with_prompts(concepts: Mapping[int, Concept]) -> list[tuple[tuple[int, int], str]]:
    """Return which two concepts are drawn together, by what prompt: neighbours in the order, and each style with each subject."""
    neighbours, found = list(pairwise(concepts)), []
    for both in combinations(concepts, 2):
        one, other = (concepts[class_id] for class_id in both)
        has_style = one.is_style or other.is_style
        if (has_style or both in neighbours) and (prompt := one.prompt_with(other)):
            found.append((both, prompt))
    return found


def _means(scores: Scores) -> dict[str, float]:
    return {name: values.mean().item() for name, values in scores.items()}
