"""Add concepts to a run of concepts: `funlora add` for those."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..add import HOW, NOW, settings_parser
from ..continual.config import LATEST
from ..continual.run_context import ended, held
from ..continual.termination import Termination
from ..data.tasks import Task
from ..hub.concept_folders import CONCEPT_FILE
from ..utils.arguments import refuse_unknown, some_fields
from ..utils.checks import expanded, shortened
from ..utils.files import read_mapping, recover_folder, write_json
from .arguments import ConceptTrainingArguments
from .concept_folder import parse_record
from .concepts import Concept, check_together
from .run import ConceptRun, ConceptRunArguments, about
from .run_folder import PHASE, AddedConcepts
from .strategies.base import ConceptStrategy
from .strategies.per_concept import PerConcept
from .strategies.registry import CONCEPT_STRATEGIES, concept_strategy


logger = logging.getLogger(__name__)

SETTINGS = (*HOW, *NOW)
"""The arguments of a run that `add_concepts` takes: those that do not change what is learned."""


def parse(arguments: Sequence[str], *, prog: str) -> dict[str, Any]:
    """Parse a command line into arguments of `add_concepts`. An unknown argument ends the process with 2."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument(
        "images",
        metavar="IMAGES",
        help="folder of pictures of a concept; folder of such folders; concepts.json; or data set on the Hub",
    )
    own.add_argument("--to", required=True, help="folder of a run of `funlora personalize`")
    text = "prompt of the pictures, with the new token, if IMAGES is one folder of pictures or a data set"
    own.add_argument("--instance_prompt", help=text)
    parser = settings_parser(
        own,
        [some_fields(ConceptTrainingArguments, SETTINGS)],
        prog=prog,
        to="RUN",
        description="Add concepts to a run: learn each with the run's settings on its base, and change nothing else.",
    )
    given, unknown = parser.parse_known_args(arguments)
    refuse_unknown(parser, unknown)
    return vars(given)


@dataclass(frozen=True)
class Added:
    """The result of `add_concepts`.

    Args:
        output_dir: folder of the run, with the concepts in `concepts/<name>/`.
        concepts: name -> the entry of the concept in results.json under `added`.
        prompts: name -> a prompt with its token.
        trained: names of the new concepts; the others already existed, from the same pictures and prompts.
    """

    output_dir: Path
    concepts: dict[str, dict[str, Any]]
    prompts: dict[str, str]
    trained: tuple[str, ...]


def add_concepts(
    images: str | os.PathLike,
    to: str | os.PathLike,
    *,
    instance_prompt: str | None = None,
    termination: Termination | None = None,
    **settings: Any,
) -> Added:
    """Learn more concepts with a run's settings, on its untouched base; change nothing else.

    A concept gets the same numbers as if the run had had it from the start. Nothing is evaluated. If the process is killed, the same
    call continues, and writes the same bytes.

    Args:
        images: pictures of concepts, as for [`load_concepts`].
        to: folder of a run whose strategy learns each concept for itself: `funlora`, `lora` or `textual_inversion`.
        instance_prompt: prompt with the new token, for one folder of pictures or one data set.
        termination: an entered context, to stop at a checkpoint at SIGTERM and SIGINT.
        **settings: arguments of a run that are in `SETTINGS`. The defaults are the run's, without its time limit.

    Raises:
        ValueError: arguments or concepts that cannot be used, a run whose concepts change each other, or a name or token that the
            run has already; nothing is written then.
        FileNotFoundError: no such concepts, base or run.
        FolderInUseError: a run uses the folder.
        NonFiniteLossError, WriteError, TimeLimitReached, Terminated: as for a run; finished concepts are safe.
    """
    if unknown := sorted(settings.keys() - set(SETTINGS)):
        raise ValueError(
            f"`{unknown[0]}` is not an argument of `add` for concepts, expected some of: {', '.join(SETTINGS)}."
        )
    place = expanded("to", os.fspath(to))
    of_run = ConceptRunArguments.of(place)
    strategy = of_run.training.strategy
    if not _learns_alone(concept_strategy(strategy)):
        own = ", ".join(name for name, kind in CONCEPT_STRATEGIES.items() if _learns_alone(kind))
        raise ValueError(
            f"`to` {place!r} is a run of `strategy` {strategy!r}, with which concepts change how others are drawn, so none can be added alone: "
            f"learn all of them again in one run, or add to a run of one of: {own}."
        )
    fixed = {
        "resume_from_checkpoint": LATEST,
        "overwrite_output_dir": False,
        "report_to": "none",
        "push_to_hub": False,
    }
    none = dict.fromkeys((*NOW, "hub_model_id", "hub_private_repo", "hub_license"))
    training = replace(of_run.training, **{**fixed, **none, **settings})
    concepts = replace(
        of_run.concepts, concepts=os.fspath(images), concept_order=None, instance_prompt=instance_prompt
    )
    return _Addition(replace(of_run, concepts=concepts, training=training), termination).add()


def _learns_alone(kind: type[ConceptStrategy]) -> bool:
    return issubclass(kind, PerConcept) and not kind.learning_changes_past_classes


class _Addition(ConceptRun):
    """One call of `add_concepts`."""

    @property
    def evaluates(self) -> bool:
        return False

    def add(self) -> Added:
        """Lock the folder, and learn the concepts that do not exist yet."""
        try:
            strategy = self.strategy()
        except (ValueError, FileNotFoundError) as error:
            if len(error.args) == 1:  # use the names of the arguments here
                error.args = (str(error).replace("`concepts` is", "`images` is"),)
            raise
        is_main, added = self.accelerator.is_main_process, AddedConcepts(self.folder)
        concepts = {one.name: one for one in strategy.setting.concepts.values()}
        self._choose(concepts, added)
        with held(self.folder.path, self.accelerator, self.training), ended(self.accelerator):
            if is_main:
                recover_folder(strategy.concepts_dir)
                recover_folder(added.folder.checkpoints)
            self.accelerator.wait_for_everyone()
            # Again, since another process may have added concepts until the folder was locked.
            records = self._choose(concepts, added)
            new = tuple(name for name in concepts if not (strategy.concepts_dir / name / CONCEPT_FILE).is_file())
            self.accelerator.wait_for_everyone()
            for name, record in records.items() if is_main else ():
                if name in added.begun():
                    logger.warning(
                        "concept %s was begun with other pictures or prompts: its steps so far are dropped", name
                    )
                added.keep(f"{PHASE}{name}", record)
            self.accelerator.wait_for_everyone()
            task = Task(0, tuple(strategy.setting.concepts))
            self._trainer(strategy, folder=added.folder).learn_beside(task)
            finished = added.finished()
            if is_main and self.folder.results.is_file():
                write_json(self.folder.results, {**read_mapping(self.folder.results), "added": finished})
        prompts = {name: one.instance_prompt for name, one in concepts.items()}
        return Added(self.folder.path, {name: finished[name] for name in concepts}, prompts, new)

    def _choose(self, concepts: Mapping[str, Concept], added: AddedConcepts) -> dict[str, dict[str, Any]]:
        """Return the records of the concepts to begin; raise a ValueError if one has the name or token of another one's."""
        begun, source = added.begun(), self.arguments.concepts.concepts
        same = {name for name, one in concepts.items() if about(one).items() <= begun.get(name, {}).items()}
        others = [one for one in self._known() if one.name not in same]
        if taken := [one.name for one in others if one.name in concepts]:
            raise ValueError(
                f"{shortened(repr(source), 300)} has concepts that the run in {self.folder.path} has already, or has yet to learn: "
                f"{', '.join(taken)}. Nothing was learned. Another concept needs another name, that of its folder or in a concepts.json; to "
                f"learn one again, delete it first: funlora delete {taken[0]} --output_dir {self.folder.path}."
            )
        where = f"{shortened(repr(source), 300)} and the run in {self.folder.path}"
        check_together([*others, *concepts.values()], where)
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return {
            name: {**about(one), "num_images": len(one.images), "source": source, "date": date}
            for name, one in concepts.items()
            if name not in same
        }

    def _known(self) -> list[Concept]:
        """Return the concepts that are in the run's folder, and those that it has yet to learn, without their pictures."""
        records = map(parse_record, sorted(self.folder.path.glob(f"concepts/*/{CONCEPT_FILE}")))
        texts = {one.name: (one.token, one.noun, one.instance_prompt) for one in records}
        if not self.folder.results.is_file():
            for one in self.folder.settings()["classes"].values():
                token, noun, prompt, *_ = one["prompts"]
                texts.setdefault(one["name"], (token, noun, prompt))
        return [Concept(name, token, noun, noun, prompt, (), ()) for name, (token, noun, prompt) in texts.items()]
